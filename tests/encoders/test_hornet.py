"""HorNet: timm's interface, sizes, precision, published files, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import group_parameters
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images import hornet
from isthmus.encoders.images.hornet import HorNet, HorNetBlock
from isthmus.layers.gnconv import GlobalLocalFilter
from isthmus.layers.sparse_conv.check import check_leaks
from tests.encoders.flops import agrees, multiply_adds

SIZES: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5, "layer_scale": 0.5}
FILTERS = (None, None, (4, 3), (2, 2))


def tiny(**kwargs: Any) -> HorNet:
    torch.manual_seed(0)
    given = {**SIZES, **kwargs}
    if given.get("filters"):
        given["dims"] = (8, 16, 32, 64)
    return HorNet(**given).eval()


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize("filters", [None, FILTERS])
def test_any_size_gives_the_described_levels_rounded_down(filters: Any) -> None:
    model = tiny(filters=filters)
    for size in ((64, 96), (70, 83), (32, 32)):
        with torch.no_grad():
            _, levels = model.forward_intermediates(image(*size))
            assert torch.equal(model.forward_head(model.forward_features(image(*size))), model(image(*size)))
        for level, info in zip(levels, model.feature_info, strict=True):
            assert level.shape[1:] == (info["num_chs"], *(side // info["reduction"] for side in size))


def test_norms_of_the_levels_leave_the_classifier_alone() -> None:
    model = tiny(norm_features=True)
    with torch.no_grad():
        for p in model.norms.parameters():  # type: ignore[union-attr]
            p.add_(torch.rand_like(p))
        last, levels = model.forward_intermediates(image(), [1, 3])
        norms: Any = model.norms
        torch.testing.assert_close(levels[1], norms[3](last))
        model.norms = None
        assert torch.equal(model.forward_intermediates(image(), [1, 3])[0], last)


def test_orders_double_in_width_and_blocks_add_themselves() -> None:
    model = tiny()
    blocks = [m for m in model.modules() if isinstance(m, HorNetBlock)]
    assert [b.gnconv.widths for b in blocks][:2] == [[4, 8], [4, 8, 16]]
    assert [b.gnconv.order for b in blocks] == [2, 3, 4, 4, 5]
    block, x = HorNetBlock(8, 2, layer_scale=1e-6).eval(), image(7, 9, 8)
    with torch.no_grad():
        assert 0 < (block(x) - x).abs().max() < 1e-4
        for gamma in (block.gamma1, block.gamma2):
            gamma.zero_()  # type: ignore[union-attr]
        assert torch.equal(block(x), x)
    assert HorNetBlock(8, 2, layer_scale=0).gamma1 is None


def test_initial_weights_are_normal_or_uniform() -> None:
    for uniform in (False, True):
        weight = tiny(uniform_init=uniform).stages[3].blocks[0].pwconv1.weight.detach()
        largest = (6 / sum(weight.shape)) ** 0.5
        assert float(weight.std()) == pytest.approx(largest / 3**0.5 if uniform else 0.02, rel=0.1)
    head: Any = tiny(head_init_scale=0.5).head
    assert float(head.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    filters = [m for m in tiny(filters=FILTERS).modules() if isinstance(m, GlobalLocalFilter)]
    assert float(filters[0].complex_weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_timm_interface() -> None:
    model: Any = timm.create_model("hornet_tiny_7x7", **SIZES, in_chans=1)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(7)
    assert model(image(channels=1, batch=1)).shape == (1, 7)
    model.reset_classifier(0, "max")
    assert model(image(channels=1)).shape == (2, 32)
    assert model.forward_head(model.forward_features(image(channels=1)), pre_logits=True).shape == (2, 32)
    features: Any = timm.create_model(
        "hornet_tiny_7x7", features_only=True, out_indices=(0, 2), norm_features=True, **SIZES
    )
    assert [f.shape[1:] for f in features(image(70, 83))] == [(8, 17, 20), (24, 4, 5)]
    assert len(features.model.norms) == 3
    assert Backbone("hornet_small_gf", reductions=(8, 32), **{**SIZES, "dims": (8, 16, 32, 64)})(image())[1].shape == (
        2,
        64,
        2,
        2,
    )
    groups: Any = group_parameters(model, model.group_matcher(), return_values=False, reverse=True)  # type: ignore[arg-type]
    assert groups["stem.0.weight"] < groups["stages.0.blocks.0.gamma1"] < groups["stages.3.blocks.0.pwconv1.weight"]


def test_small_pictures_take_a_finer_stem() -> None:
    model = tiny(stem_stride=1)
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8]
    assert model(image(8, 9)).shape == (2, 5)


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny(filters=FILTERS).train()
        model.set_grad_checkpointing(checkpointing)
        model(image()).square().mean().backward()
        found.append({k: p.grad for k, p in model.named_parameters()})
        assert all(g is not None and g.abs().sum() > 0 for g in found[-1].values())
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("filters", [None, FILTERS])
def test_half_precision_and_autocast_are_finite(filters: Any) -> None:
    """Products of six factors stay within half precision, because of the norm in front and the scale of 1/3."""
    model = tiny(filters=filters)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(100 * image())).all()
    with torch.no_grad():
        assert torch.isfinite(model.half()(100 * image().half())).all()


def test_sparse_pre_training_takes_kernels_and_refuses_filters() -> None:
    assert check_leaks(Backbone(tiny()), 64, 32) == []
    with pytest.raises(UserError, match=r"fft_rfft2 on a map .* has no sparse form"):
        check_leaks(Backbone(tiny(filters=FILTERS)), 64, 32)
    assert check_leaks(Backbone(tiny(filters=FILTERS), reductions=(4, 8)), 64, 32) == []


#: Pixels a side and multiply-adds in 1e9, as the paper's table has them.
PUBLISHED_FLOPS = {
    "hornet_tiny_7x7": (224, "4.0"),
    "hornet_tiny_gf": (224, "3.9"),
    "hornet_small_7x7": (224, "8.8"),
    "hornet_small_gf": (224, "8.7"),
    "hornet_base_7x7": (224, "15.6"),
    "hornet_base_gf": (224, "15.5"),
    "hornet_large_7x7": (224, "34.8"),
    "hornet_large_gf": (224, "34.7"),
    "hornet_large_gf_img384": (384, "101.8"),
}


@pytest.mark.parametrize("name", PUBLISHED_FLOPS)
def test_published_flops(name: str) -> None:
    size, billions = PUBLISHED_FLOPS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert agrees(multiply_adds(model, size), billions)


def test_head_of_22k() -> None:
    """10,450 classes make the published L of ImageNet-22K."""
    with torch.device("meta"):
        large = timm.create_model("hornet_large_7x7", num_classes=10450)
    assert sum(p.numel() for p in large.parameters()) == 194_542_504 + 9450 * (1536 + 1)
    assert hornet.default_cfgs["hornet_large_gf"].cfgs["in22k"].num_classes == 10450


def official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of ours under the published names."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", key)
        key = re.sub(r"^norms\.(\d)\.", r"norm\1.", key)
        renamed[key.replace("head.fc.", "head.").replace("head.norm.", "norm.")] = value
    return renamed


def test_published_files_load() -> None:
    model = tiny(filters=FILTERS, norm_features=True)
    state = official(model.state_dict())
    assert {"downsample_layers.3.1.weight", "stages.2.1.gnconv.dwconv.complex_weight", "norm3.bias"} <= state.keys()
    for form in (
        {"model": state},
        {"state_dict": {f"backbone.{k}": v for k, v in state.items()} | {"neck.x": torch.ones(1)}},
        state,
    ):
        got = hornet.convert_official(form)
        assert got.keys() == model.state_dict().keys()
        assert all(torch.equal(v, got[k]) for k, v in model.state_dict().items())


def test_filters_of_a_file_are_resized_to_the_model() -> None:
    small, large = tiny(filters=FILTERS), tiny(filters=(None, None, (8, 5), (4, 3)))
    large.load_state_dict(hornet.checkpoint_filter_fn({"model": official(small.state_dict())}, large))
    ours, theirs = (m.stages[2].blocks[0].gnconv.dwconv for m in (large, small))
    torch.testing.assert_close(ours.resized((8, 8)), theirs.resized((8, 8)))
    with torch.no_grad():
        torch.testing.assert_close(large(image(128, 128)), small(image(128, 128)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(dims=(8, 16, 20, 32)), "width 20 does not divide by 8, as order 4 needs; near are 16, 24, 32"),
        (lambda: tiny(dims=(8, 16, 24)), "four of each, one a stage"),
        (lambda: tiny(scales=(1, 1)), "four of each, one a stage"),
        (lambda: tiny(orders=(0, 1, 2, 3)), "orders is at least 1"),
        (lambda: tiny(kernel=4), "odd kernel"),
        (lambda: tiny(stem_stride=0), "at least 1"),
        (lambda: tiny()(image(channels=4)), "(2, 4, 64, 64); this network takes (B, 3, H, W)"),
        (lambda: tiny()(image(31, 64)), "31x64 pixels; the last stage of this network needs 32"),
        (lambda: tiny(stem_stride=1)(image(7, 8)), "needs 8 a side"),
        (lambda: tiny().forward_intermediates(image(), output_fmt="NLC"), "'NLC': the maps of a convnet"),
        (
            lambda: hornet.checkpoint_filter_fn(official(tiny().state_dict()), tiny(dims=(8, 16, 32, 32))),
            "of the checkpoint is (24, 16, 2, 2), of the model (32, 16, 2, 2): they are two different sizes",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
