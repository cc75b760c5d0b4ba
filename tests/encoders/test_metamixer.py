"""FFNet: timm's interface, any size, merging, published files, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from isthmus.codec import Codec, create_timm
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images import metamixer
from isthmus.encoders.images.metamixer import FFNet, FFNetSeg, MixerNet
from isthmus.layers.metamixer import NormConvSkip, Residual, ffnified_attention, self_attention
from isthmus.layers.reparam import ReparamConv
from isthmus.layers.sparse_conv.check import check_leaks
from tests.encoders.flops import agrees, multiply_adds
from tests.layers.test_metamixer import close
from tests.layers.test_reparam import trained

SIZES: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 32), "stem_width": 8, "num_classes": 5}
NAMES = ("metamixer_ffnet_1", "metamixer_ffnet_2", "metamixer_ffnet_seg")


def tiny(name: str = "metamixer_ffnet_2", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return trained(timm.create_model(name, **{**SIZES, "layer_scale": 0.5, **kwargs}))


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height + width))


# ------------------------------------------------------------------------------------------------------ timm's habits


@pytest.mark.parametrize("name", NAMES)
def test_any_size_gives_the_described_levels_rounded_up(name: str) -> None:
    model = tiny(name)
    for size in ((64, 96), (70, 83), (33, 31), (5, 9)):
        with torch.no_grad():
            _, levels = model.forward_intermediates(image(*size))
            close(model.forward_head(model.forward_features(image(*size))), model(image(*size)))
        for level, info in zip(levels, model.feature_info, strict=True):
            assert level.shape[1:] == (info["num_chs"], *(-(-side // info["reduction"]) for side in size))


@pytest.mark.parametrize("name", NAMES)
def test_interface_of_timm(name: str) -> None:
    model, width = tiny(name), 1280 if name.endswith("seg") else 32
    assert model.head_hidden_size == width
    assert model.forward_head(model.forward_features(image()), pre_logits=True).shape == (2, width)
    model.reset_classifier(7, "max")
    assert model(image()).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(image()).shape == (2, width)
    features = timm.create_model(name, features_only=True, out_indices=(1, 3), **{**SIZES, "in_chans": 4})
    assert [f.shape[1:] for f in features(image(channels=4))] == [(16, 8, 8), (32, 2, 2)]
    assert tiny(name, num_classes=0, in_chans=1)(image(channels=1, batch=1)).shape == (1, 32)
    assert [level.shape[1] for level in Backbone(tiny(name), reductions=(8, 16, 32))(image())] == [16, 16, 32]


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(checkpointing)
        model(image()).square().mean().backward()
        found.append({k: p.grad for k, p in model.named_parameters()})
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-6, rtol=1e-3)


def test_half_precision_and_autocast_are_finite() -> None:
    for name in NAMES:
        model = tiny(name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(10 * image())).all()
        with torch.no_grad():
            assert torch.isfinite(model.bfloat16()(image().bfloat16())).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaks_from_hidden_pixels(name: str) -> None:
    """SparK pre-trains it, trained form and merged."""
    model = tiny(name)
    assert check_leaks(Backbone(model), 64, 32) == []


def test_one_image_is_fine_in_evaluation_and_with_maps_of_more_than_one_place() -> None:
    model = tiny()
    with torch.no_grad():
        assert torch.isfinite(model(image(32, 32, batch=1))).all()
    assert model.train()(image(64, 64, batch=1)).shape == (1, 5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(image(32, 32, batch=1))


# ------------------------------------------------------------------------------------------------------------ structure


def test_stem_has_no_activation_behind_its_last_convolution() -> None:
    assert [type(part).__name__ for part in tiny().stem] == ["ConvNorm", "GELU", "ConvNorm"]
    names = [type(part).__name__ for part in tiny("metamixer_ffnet_seg").stem]
    assert names == ["ConvNorm", "GELU", "ConvNorm", "GELU", "ConvNorm", "ConvNorm"]


def test_kernels_stand_where_they_are_published() -> None:
    """3x3 key and value operators have a bias and no norm; of the channel mixers FFNet-1 alone has 3x3 everywhere."""
    for name, kernels in (("metamixer_ffnet_1", (3, 3, 3, 3)), ("metamixer_ffnet_3", (7, 7, 7, 7))):
        for stage, kernel, operator in zip(tiny(name).stages, kernels, (3, 3, 7, 7), strict=True):
            block = stage.blocks[0]
            assert block.channel_mixer.main.query.kernel == (kernel, kernel)
            for unit in (block.token_mixer.main.key, block.token_mixer.main.value):
                assert unit.kernel == (operator, operator)
                assert unit.merged == (operator == 3)
    for stage, operator in zip(tiny("metamixer_ffnet_seg").stages, (3, 3, 9, 9), strict=True):
        assert stage.blocks[0].token_mixer.main.key.kernel == (operator, operator)
        assert len(stage.blocks[0].channel_mixer.main.query.branches) == 0


def test_squeeze_excite_is_in_even_blocks_of_its_stages() -> None:
    model = tiny(depths=(1, 1, 3, 1), squeeze_excite=(False, False, True, False))
    assert [[hasattr(b, "se") for b in s.blocks] for s in model.stages] == [
        [False],
        [False],
        [True, False, True],
        [False],
    ]


def test_drop_path_grows_over_all_blocks_and_is_shared_by_both_residuals() -> None:
    model = FFNet(**SIZES, drop_path_rate=0.4)
    rates = [[getattr(m.drop_path, "drop_prob", 0.0) for m in b if isinstance(m, Residual)]
             for s in model.stages for b in s.blocks]  # fmt: skip
    assert [a for a, _ in rates] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert all(a == b for a, b in rates)


def test_dense_backbone_norms_every_level_and_not_the_last_map() -> None:
    model = tiny(norm_features=True, num_classes=0)
    assert isinstance(model.norm, nn.Identity)
    with torch.no_grad():
        for level in model.forward_intermediates(image(), intermediates_only=True):
            assert float(level.mean(1).abs().max()) < 1e-5
            assert float(level.var(1, correction=0).mean()) == pytest.approx(1.0, abs=1e-3)
    assert [norm.eps for norm in model.norms] == [1e-6] * 4


def test_tail_norm_can_be_a_layer_norm() -> None:
    model = tiny(tail_norm="layer")
    assert not isinstance(model.norm, nn.BatchNorm2d)
    assert model(image()).shape == (2, 5)


# -------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fold", [False, True])
def test_merged_network_gives_the_same_outputs(name: str, fold: bool) -> None:
    model, x = tiny(name), image(70, 83)
    with torch.no_grad():
        logits, levels = model(x), model.forward_intermediates(x, intermediates_only=True)
        close(reparameterize_model(model)(x), logits)
        model.reparameterize(fold)
        close(model(x), logits)
        for a, b in zip(model.forward_intermediates(x, intermediates_only=True), levels, strict=True):
            close(a, b)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ([] if name.endswith("seg") else [model.norm])
    assert any("gamma" in key for key in model.state_dict()) != fold


def test_merging_twice_or_in_training_mode_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"FFNet is in training mode; call \.eval\(\)"):
        model.train().reparameterize()
    model.eval().reparameterize()
    with pytest.raises(ValueError, match="this FFNet is merged already; it cannot be merged twice"):
        model.reparameterize()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fold", [False, True])
def test_merged_networks_are_rebuilt_merged(name: str, fold: bool, tmp_path: Path) -> None:
    encoder: Any = trained(Backbone(create_timm(name, **{**SIZES, "layer_scale": 0.5})))
    encoder.model.reparameterize(fold)
    Codec(encoder).save_pretrained(tmp_path)
    with torch.no_grad():
        for a, b in zip(encoder(image()), Codec.from_pretrained(tmp_path).eval()(image()).prediction, strict=True):
            assert torch.equal(a, b)


def test_downsampling_merges_to_two_convolutions() -> None:
    down: Any = tiny().stages[1].downsample
    assert isinstance(down[0], ReparamConv)
    assert isinstance(down[1], NormConvSkip)
    x = image(9, 12, 8)
    with torch.no_grad():
        before = down(x)
        assert before.shape == (2, 16, 5, 6)
        for part in down:
            part.reparameterize()
        close(down(x), before)
    assert sum(1 for _ in down.parameters()) == 4


# ----------------------------------------------------------------------------------------------- published checkpoints


def official(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network of ours under the published names, written down a second time from the sheet."""
    renamed = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stem\.", "patch_embed.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"stages.\1.0.proj.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d)\.", lambda m: f"stages.{m[1]}.{int(m[2]) + (m[1] != '0')}.", key)
        key = re.sub(r"\.(conv|norm)\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r".#\1.\2", key)
        key = key.replace(".#conv.", ".c.").replace(".#norm.", ".bn.")
        key = key.replace(".se.", ".token_mixer.1.").replace(".token_mixer.main", ".token_mixer.0.main")
        key = key.replace(".token_mixer.gamma", ".token_mixer.0.layer_scale").replace(".gamma", ".layer_scale")
        key = key.replace("token_mixer.0.main.query", "token_mixer.0.main.fc")
        key = key.replace("token_mixer.0.main.key", "token_mixer.0.main.conv1")
        key = key.replace("token_mixer.0.main.value", "token_mixer.0.main.conv2")
        key = key.replace("channel_mixer.main.query.main", "channel_mixer.main.conv.conv")
        key = key.replace("channel_mixer.main.query", "channel_mixer.main.conv")
        key = key.replace("channel_mixer.main.key", "channel_mixer.main.fc1")
        key = key.replace("channel_mixer.main.value", "channel_mixer.main.fc2")
        key = re.sub(r"\.(conv1|conv2|proj\.0)\.main\.", r".\1.conv.", key).replace("branches.0", "conv1")
        key = re.sub(r"(token_mixer\.0\.main\.conv[12])\.c\.", r"\1.", key)  # 3x3 operators are plain convolutions
        key = re.sub(r"\.proj\.1\.(c|bn)\.", r".proj.1.conv.\1.", key)
        key = re.sub(r"^head\.fc\.", "head.", re.sub(r"^norms\.", "norm", key))
        renamed[key] = value[:, None, None] if key.endswith("layer_scale") else value
    return renamed


@pytest.mark.parametrize("level", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_checkpoints_load(level: str | None, prefix: str) -> None:
    model, again = tiny(squeeze_excite=True), tiny(squeeze_excite=True, layer_scale=1.0)
    state: dict[str, Any] = {prefix + key: value for key, value in official(model).items()}
    assert f"{prefix}stages.2.2.token_mixer.0.main.conv1.conv1.c.weight" in state
    assert f"{prefix}stages.0.0.token_mixer.0.main.conv1.weight" in state
    again.load_state_dict(metamixer.checkpoint_filter_fn({level: state} if level else state, again))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_merged_checkpoint_asks_for_a_merged_model() -> None:
    model, merged = tiny(), tiny()
    merged.reparameterize()
    state = metamixer.checkpoint_filter_fn(merged.state_dict(), merged)
    tiny(deploy=True).load_state_dict(state)
    with pytest.raises(ValueError, match="the checkpoint is merged and the model is not; create it with deploy=True"):
        metamixer.checkpoint_filter_fn(state, model)
    with pytest.raises(ValueError, match="the checkpoint is not merged and the model is; leave deploy out"):
        metamixer.checkpoint_filter_fn(model.state_dict(), merged)


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [
        ("metamixer_ffnet_1", 256, "2.98"),  # the paper's 2.9 is cut off
        ("metamixer_ffnet_2", 256, "6.0"),
        ("metamixer_ffnet_3", 256, "10.1"),
        ("metamixer_ffnet_3", 384, "22.8"),
        ("metamixer_ffnet_4", 384, "43.1"),
    ],
)
def test_published_flops(name: str, size: int, billions: str) -> None:
    """Multiply-adds in 1e9 of the merged networks."""
    with torch.device("meta"):
        model = timm.create_model(name, deploy=True)
    assert agrees(multiply_adds(model, size), billions)


# ---------------------------------------------------------------------------------------------------------- any mixer


def test_any_mixer_stands_in_the_pyramid() -> None:
    asked = []

    def attention(dim: int, stage: int) -> nn.Module:
        asked.append((dim, stage))
        return self_attention(dim, 2)

    model: Any = MixerNet(attention, num_classes=5)
    assert asked == [(24, 0), (48, 1), (64, 2), (64, 2), (96, 3)]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]
    assert model(image(32, 40)).shape == (2, 5)
    other: Any = trained(MixerNet(lambda dim, _: ffnified_attention(dim, 7), (1, 1), (8, 12), num_classes=5))
    with torch.no_grad():
        before = other(image())
        copied = copy.deepcopy(other)
        copied.reparameterize()
        close(copied(image()), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FFNet(dims=(80, 160, 240, 640)), "240 is no multiple of 160"),
        (lambda: FFNet(depths=(1, 1, 1)), "depths (1, 1, 1), dims (80, 160, 320, 640)"),
        (lambda: FFNet(kernels=(4, 3, 3, 3)), "must be odd"),
        (lambda: FFNet(key_kernels=(3, 3, 6, 7)), "must be odd"),
        (lambda: FFNet(activations="selu"), "activations ['selu']: choose from gelu, relu"),
        (lambda: FFNet(tail_norm="group"), "tail_norm 'group': it is 'batch' or 'layer'"),
        (lambda: FFNetSeg(dims=(8, 16)), "one of each a stage"),
        (lambda: FFNetSeg(**{**SIZES, "value_kernels": (3, 3, 8, 9)}), "must be odd"),
        (lambda: MixerNet(lambda d, _: nn.Identity(), (1,), (8, 8)), "one of each a stage"),
        (lambda: MixerNet(lambda d, _: nn.Identity(), stem_stride=0), "stem_stride 0"),
        (lambda: tiny()(image(channels=4)), "(2, 4, 64, 64); this network takes (B, 3, H, W)"),
        (lambda: tiny().forward_intermediates(image(), output_fmt="NLC"), "'NLC'"),
        (lambda: tiny("metamixer_ffnet_seg").reset_classifier(3, "catavgmax"), "'catavgmax' does not give the 1024"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
