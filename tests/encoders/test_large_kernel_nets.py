"""UniRepLKNet and RepLKNet as timm users meet them: levels, heads, merging, checkpoints, bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from isthmus.codec import Codec
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images import replknet, unireplknet
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.layers.sparse_conv.check import check_leaks
from tests.encoders.flops import agrees, multiply_adds
from tests.layers.test_reparam import trained

TINY: dict[str, dict[str, Any]] = {
    "unireplknet_a": {
        "depths": (1, 1, 2, 1),
        "dims": (8, 16, 24, 32),
        "kernel_sizes": ((3,), (13,), (7, 5), (0,)),
        "layer_scale": 0.5,
    },
    "replknet_31b": {
        "layers": (1, 1, 1, 1),
        "channels": (8, 16, 24, 32),
        "large_kernel_sizes": (31, 13, 9, 5),
        "dw_ratio": 1.5,
    },
}
both = pytest.mark.parametrize("name", TINY)


def tiny(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return trained(timm.create_model(name, **{"num_classes": 5, **TINY[name], **kwargs}))


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height + width))


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=bound * float(b.detach().abs().max()), rtol=0)


@both
def test_merged_network_gives_the_same_outputs_and_is_a_no_op_the_second_time(name: str) -> None:
    model, x = tiny(name), image()
    with torch.no_grad():
        logits = model(x)
        levels = model.forward_intermediates(x, intermediates_only=True)
        through_timm = reparameterize_model(model)
        model.reparameterize()
        for merged in (model, through_timm):
            close(merged(x), logits)
            for a, b in zip(merged.forward_intermediates(x, intermediates_only=True), levels, strict=True):
                close(a, b)
    inside = [m for m in model.stages.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not inside
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.reparameterize()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@both
def test_merging_is_refused_while_training(name: str) -> None:
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        tiny(name).train().reparameterize()


@both
def test_merged_codec_is_saved_and_rebuilt_merged(name: str, tmp_path: Path) -> None:
    from isthmus.codec import create_timm

    model = trained(create_timm(name, **TINY[name]))
    model.reparameterize()
    codec = Codec(Backbone(model)).eval()
    codec.save_pretrained(tmp_path)
    with torch.no_grad():
        for a, b in zip(Codec.from_pretrained(tmp_path)(image()).prediction, codec(image()).prediction, strict=True):
            assert torch.equal(a, b)


@both
@pytest.mark.parametrize("size", [(64, 96), (75, 50), (32, 32), (9, 40)], ids=str)
def test_any_size_gives_the_described_levels(name: str, size: tuple[int, int]) -> None:
    model = tiny(name)
    with torch.no_grad():
        last, levels = model.forward_intermediates(image(*size))
        close(model.forward_head(model.forward_features(image(*size))), model(image(*size)))
    assert len(levels) == 4
    for level, info in zip(levels, model.feature_info, strict=True):
        assert level.shape[1] == info["num_chs"]
        assert tuple(level.shape[2:]) == tuple(-(-side // info["reduction"]) for side in size)
    assert last.shape == levels[-1].shape


@both
def test_dense_norms_are_on_every_level(name: str) -> None:
    plain, normed = tiny(name), tiny(name, norm_features=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        raw = plain.forward_intermediates(image(), intermediates_only=True)
        got = normed.forward_intermediates(image(), intermediates_only=True)
        for level, norm, base in zip(got, normed.norms, raw, strict=True):
            close(level, norm(base))


@both
def test_nothing_leaks_from_hidden_pixels(name: str) -> None:
    """SparK pre-trains them unchanged, merged or not."""
    encoder = Backbone(tiny(name))
    assert check_leaks(encoder, 64, 32) == []


#: Pixels a side and multiply-adds of the merged network in 1e9, as the papers' tables have them.
PUBLISHED_FLOPS = {
    "unireplknet_a": (224, "0.6"),
    "unireplknet_f": (224, "0.9"),
    "unireplknet_p": (224, "1.6"),
    "unireplknet_n": (224, "2.8"),
    "unireplknet_t": (224, "4.9"),
    "unireplknet_s": (224, "9.1"),
    "unireplknet_b": (384, "47.2"),
    "unireplknet_l": (384, "105.4"),
    "unireplknet_xl": (384, "187"),
    "replknet_31b": (224, "15.3"),
    "replknet_31l": (384, "96.0"),
    "replknet_xl": (320, "128.7"),
}


@pytest.mark.parametrize("name", PUBLISHED_FLOPS)
def test_published_flops(name: str) -> None:
    size, billions = PUBLISHED_FLOPS[name]
    with torch.device("meta"):
        model = timm.create_model(name, deploy=True)
    assert agrees(multiply_adds(model, size), billions)


def official_unireplknet(state: dict[str, Tensor], kernels: dict[int, int]) -> dict[str, Tensor]:
    """Our names → the published ones, written from the sheet's list of keys; one large kernel for every stage."""
    branches = unireplknet.BRANCHES
    found = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d)\.", r"stages.\1.\2.", key)
        if m := re.match(r"(stages\.(\d)\.\d\.dwconv\.)branches\.(\d)\.(conv|norm)\.(.*)", key):
            k, r = branches[kernels[int(m[2])]][int(m[3])]
            key = f"{m[1]}dil_{'conv' if m[4] == 'conv' else 'bn'}_k{k}_{r}.{m[5]}"
        key = key.replace("dwconv.main.conv", "dwconv.lk_origin").replace("dwconv.main.norm", "dwconv.origin_bn")
        key = key.replace("dwconv.conv.", "dwconv.lk_origin.").replace(".se.fc1.", ".se.down.")
        key = key.replace(".se.fc2.", ".se.up.").replace(".fc1.", ".pwconv1.1.").replace(".norm2.", ".pwconv2.2.")
        key = re.sub(r"(stages\.\d\.\d\.)fc2\.", r"\1pwconv2.0.", key)
        if ".grn." in key:
            key = key.replace(".grn.weight", ".act.1.gamma").replace(".grn.bias", ".act.1.beta")
            value = value.view(1, 1, 1, -1)
        found[key.replace("head.norm", "norm").replace("head.fc", "head")] = value
    return found


@pytest.mark.parametrize("merged", [False, True])
def test_timm_loads_a_published_checkpoint(merged: bool, tmp_path: Path) -> None:
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "kernel_sizes": ((3,), (13,), (7,), (5,))}
    trained_model = trained(timm.create_model("unireplknet_a", **sizes))
    if merged:
        trained_model.reparameterize()
    state = official_unireplknet(trained_model.state_dict(), {1: 13, 2: 7})
    assert "stages.1.0.dwconv.lk_origin.weight" in state
    torch.save({"model": state}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth")}
    arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, **sizes}
    loaded = timm.create_model("unireplknet_a", deploy=merged, **arguments).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image()), trained_model(image()))
    if merged:
        with pytest.raises(ValueError, match="deploy=True"):
            timm.create_model("unireplknet_a", **arguments)
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("unireplknet_a", deploy=merged, **{**arguments, "dims": (16, 16, 24, 32)})


def official_replknet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names → the published ones, written from the sheet's list of keys."""
    found = {}
    for key, value in state.items():
        key = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"transitions.{int(m[1]) - 1}.", key)
        if m := re.match(r"(stages\.\d\.blocks\.)(\d+)\.norm\.(.*)", key):
            key = f"{m[1]}{m[2]}.{'preffn_bn' if int(m[2]) % 2 else 'prelkb_bn'}.{m[3]}"
        key = key.replace(".large.main.", ".large_kernel.lkb_origin.").replace(
            ".large.conv.", ".large_kernel.lkb_reparam."
        )
        key = key.replace(".large.branches.0.", ".large_kernel.small_conv.")
        key = re.sub(r"(stem\.\d|transitions\.\d\.\d|pw\d|lkb_origin|small_conv)\.norm\.", r"\1.bn.", key)
        key = re.sub(r"^norms\.(\d)\.", r"stages.\1.norm.", key)
        found[key.replace("head.fc.", "head.")] = value
    return found


@pytest.mark.parametrize("merged", [False, True])
def test_published_replknet_checkpoints_load(merged: bool) -> None:
    """Merged ones too, in which only the large kernels are merged and all other batch norms are left."""
    model, x = tiny("replknet_31b"), image()
    loaded = tiny("replknet_31b", deploy=merged)
    with torch.no_grad():
        logits = model(x)
        if merged:
            for module in model.modules():
                if isinstance(module, replknet.LargeKernelBlock):
                    module.large.reparameterize()
        state = official_replknet(model.state_dict())
        assert ("stages.0.blocks.0.large_kernel.lkb_reparam.bias" in state) == merged
        assert {"stem.0.bn.weight", "stages.0.blocks.0.prelkb_bn.bias", "transitions.2.1.bn.weight"} <= state.keys()
        loaded.load_state_dict(replknet.checkpoint_filter_fn({"model": state}, loaded))
        close(loaded(x), logits)
        model.reparameterize()
        close(model(x), logits)
    if merged:  # what is folded already is left alone
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in replknet.fold_state(state).items())


@both
def test_backbone_of_a_detector_loads_alone(name: str) -> None:
    model = tiny(name, norm_features=True, num_classes=0)
    ours = {k: v for k, v in model.state_dict().items() if not k.startswith(("norm.", "head."))}
    kernels = {1: 13, 2: 7}
    if name == "unireplknet_a":
        model = tiny(name, norm_features=True, num_classes=0, kernel_sizes=((3,), (13,), (7, 7), (3,)))
        ours = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
        dense = {re.sub(r"^norms\.", "norm", k): v for k, v in official_unireplknet(ours, kernels).items()}
    else:
        dense = official_replknet(ours)
    state = {"neck.x": torch.ones(1), **{f"module.backbone.{k}": v for k, v in dense.items()}}
    module = unireplknet if name == "unireplknet_a" else replknet
    for form in ({"state_dict": state}, state, {"model": dense}):
        got = module.convert_official(form)
        assert got.keys() == ours.keys()
        assert all(torch.equal(value, got[key]) for key, value in ours.items())


def test_merged_replknet_checkpoint_needs_a_merged_model() -> None:
    model = tiny("replknet_31b")
    merged = {"stages.0.blocks.0.large_kernel.lkb_reparam.weight": torch.zeros(12, 1, 31, 31)}
    with pytest.raises(ValueError, match="deploy=True"):
        replknet.checkpoint_filter_fn(merged, model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unireplknet_a", {"kernel_sizes": ((4,), (13,), (7, 5), (3,))}, "odd kernel"),
        ("unireplknet_a", {"kernel_sizes": ((3,), (8,), (7, 5), (3,))}, "no dilated branches"),
        ("unireplknet_a", {"kernel_sizes": ((3,), (13,), (7,), (3,))}, "must agree"),
        ("unireplknet_a", {"dims": (8, 16, 24)}, "must agree"),
        ("replknet_31b", {"large_kernel_sizes": (31, 13, 9, 4)}, "must be odd"),
        ("replknet_31b", {"large_kernel_sizes": (31, 13, 9, 3)}, "no larger"),
        ("replknet_31b", {"layers": (1, 1, 1)}, "one entry a stage"),
    ],
)
def test_impossible_networks_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(name, **change)


def test_published_kernels() -> None:
    assert unireplknet.default_kernels((3, 3, 18, 3))[2] == (13, 3) * 9
    assert unireplknet.default_kernels((3, 3, 27, 3))[2] == (13, 3, 3) * 9
    assert unireplknet.default_kernels((2, 2, 6, 2)) == ((3, 3), (13, 13), (13,) * 6, (13, 13))
    model = timm.create_model("unireplknet_t", dims=(8, 8, 8, 8))
    large = [m for m in model.modules() if isinstance(m, DepthwiseConv) and m.kernel_size == (13, 13)]
    assert len(large) == 3 + 9 + 3


def test_response_norm_of_dead_channels_has_finite_gradients() -> None:
    norm = unireplknet.ResponseNorm(4)
    norm.weight.data.fill_(0.5)
    x = image(4, 6, channels=4).permute(0, 2, 3, 1).clone()
    x[..., 1] = 0
    x.requires_grad_()
    y = norm(x)
    response = x.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(y, x * (1 + 0.5 * response / (response.mean(-1, keepdim=True) + 1e-6)))
    y.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
