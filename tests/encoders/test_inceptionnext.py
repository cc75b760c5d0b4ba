"""InceptionNeXt's mixers, the pyramid around them, merging, and the sizes that timm lacks."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import inception_next
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.inceptionnext import InceptionDWConv2d, PartialConv2d, accelerate, mixer
from isthmus.encoders.images.metanext import MetaNeXt, reparameterize
from isthmus.layers.sparse_conv.check import check_leaks
from tests.encoders.flops import agrees, multiply_adds
from tests.layers.test_reparam import trained

SIZES: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


def tiny(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return trained(MetaNeXt(**{**SIZES, "mixer": mixer, "num_classes": 5, "layer_scale": 0.5, **kwargs}))


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height + width))


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=bound * float(b.detach().abs().max()), rtol=0)


# ------------------------------------------------------------------------------------------------------------- mixers


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mixer_has_the_numbers_and_gradients_of_timm(layout: torch.memory_format) -> None:
    ours, theirs = InceptionDWConv2d(33, 5, 7, 0.2), inception_next.InceptionDWConv2d(33, 5, 7, 0.2)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for part in (ours, theirs):
        x = image(7, 13, 33).contiguous(memory_format=layout).requires_grad_()
        y = part(x)
        (y * y.detach().roll(1, 1)).sum().backward()
        found.append((y, x.grad, *(p.grad for p in part.parameters())))
    for a, b in zip(*found, strict=True):
        close(a, b)
    assert found[0][0].is_contiguous(memory_format=layout)


def test_first_channels_pass_and_the_last_see_a_column() -> None:
    """The order is identity, square, horizontal, vertical; truncation makes the identity grow."""
    part = InceptionDWConv2d(33, band_kernel_size=5, branch_ratio=0.2)
    assert part.split_indexes == [15, 6, 6, 6]
    x = torch.zeros(1, 33, 9, 9)
    x[:, :, 4, 4] = 1
    with torch.no_grad():
        for conv in (part.dwconv_hw, part.dwconv_w, part.dwconv_h):
            conv.weight.fill_(1)
            conv.bias.fill_(0)  # type: ignore[union-attr]
        y = part(x)
    assert torch.equal(y[:, :15], x[:, :15])
    assert y[:, 15:21].sum((2, 3)).unique().tolist() == [9]
    assert torch.equal(y[0, 21, 4], torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 0, 0]))
    assert torch.equal(y[0, 27, :, 4], torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 0, 0]))


def test_dense_kernel_computes_the_same() -> None:
    part, x = InceptionDWConv2d(24), image(6, 9, 24)
    weight, bias = part.dense_kernel()
    assert weight.shape == (24, 1, 11, 11)
    close(nn.functional.conv2d(x, weight, bias, padding=5, groups=24), part(x).detach())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InceptionDWConv2d(24, band_kernel_size=10), "odd kernel"),
        (lambda: InceptionDWConv2d(24, square_kernel_size=2), "odd kernel"),
        (lambda: InceptionDWConv2d(24, branch_ratio=0.34), "lies in (0, 1/3]"),
        (lambda: InceptionDWConv2d(24, branch_ratio=0.0), "lies in (0, 1/3]"),
        (lambda: InceptionDWConv2d(7), "7 channels with branch_ratio 0.125 leave no channel for a branch; it takes 8"),
        (lambda: InceptionDWConv2d(24)(image(8, 8, 16)), "the map has 16 channels; this mixer is for 24"),
        (lambda: PartialConv2d(16, 4), "odd kernel"),
        (lambda: PartialConv2d(16, 3, 0.05), "covers at least one channel"),
        (lambda: PartialConv2d(16, 3, 1.5), "it lies in (0, 1]"),
        (lambda: MetaNeXt((1, 1), (8, 8, 8), mixer, mlp_ratios=4), "one of each a stage"),
        (lambda: MetaNeXt((1, 1), (8, 8), mixer), "one of each a stage"),
        (lambda: MetaNeXt((1,), (8,), mixer, mlp_ratios=4, stem_stride=0), "at least 1"),
        (lambda: tiny(depths=(1, -1, 1, 1)), "depths (1, -1, 1, 1): it must be above 0"),
        (lambda: tiny(dims=(8, 0, 16, 24)), "dims (8, 0, 16, 24): it must be above 0"),
        (lambda: tiny(mlp_ratios=0), "mlp_ratios (0, 0, 0, 0): it must be above 0"),
        (lambda: tiny(drop_path_rate=1.0), "drop_path_rate 1.0: a share that is dropped"),
        (lambda: tiny(layer_scale=float("nan")), "layer_scale is a finite number, got nan"),
        (lambda: tiny()(image(channels=4)), "(2, 4, 64, 64); this network takes (B, 3, H, W)"),
        (lambda: tiny()(image(31, 64)), "31x64 pixels; the last stage of this network needs 32"),
        (lambda: tiny().forward_intermediates(image(), output_fmt="NLC"), "'NLC': the maps of a convnet"),
        (lambda: accelerate(nn.Conv2d(1, 1, 1)), "Conv2d has no mixer of timm's InceptionNeXt"),
        (lambda: reparameterize(nn.Conv2d(1, 1, 1).eval()), "Conv2d has no MetaNeXt block"),
        (lambda: reparameterize(tiny().train()), "call .eval()"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_smallest_legal_widths() -> None:
    assert InceptionDWConv2d(8).split_indexes == [5, 1, 1, 1]
    assert InceptionDWConv2d(3, branch_ratio=1 / 3)(image(5, 5, 3)).shape == (2, 3, 5, 5)


# ------------------------------------------------------------------------------------------------- timm's own network


def small_timm(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return trained(timm.create_model("inception_next_tiny", **{**SIZES, "num_classes": 5, **kwargs}))


def test_accelerated_network_is_the_same_network() -> None:
    model = small_timm(ls_init_value=0.5)
    ours = accelerate(copy.deepcopy(model))
    assert list(ours.state_dict()) == list(model.state_dict())
    assert not any(isinstance(m, inception_next.InceptionDWConv2d) for m in ours.modules())
    with torch.no_grad():
        close(ours(image(70, 83)), model(image(70, 83)))
    for network in (model.train(), ours.train()):
        network(image()).square().sum().backward()
    grads = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, atol=1e-4, rtol=1e-3)


def test_dilated_mixers_stay_timms() -> None:
    model = small_timm(output_stride=8)
    with torch.no_grad():
        before = model(image())
        close(accelerate(model)(image()), before)
    assert any(isinstance(m, inception_next.InceptionDWConv2d) for m in model.modules())


@pytest.mark.parametrize("make", [small_timm, tiny])
def test_merged_network_gives_the_same_outputs(make: Any) -> None:
    model, x = make(), image(70, 83)
    with torch.no_grad():
        logits = model(x)
        levels = model.forward_intermediates(x, intermediates_only=True)
        reparameterize(model)
        close(model(x), logits)
        for a, b in zip(model.forward_intermediates(x, intermediates_only=True), levels, strict=True):
            close(a, b)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(name.endswith("gamma") for name, _ in model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    reparameterize(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_timm_merges_ours_and_other_norms_stay() -> None:
    model = tiny()
    with torch.no_grad():
        close(reparameterize_model(model)(image()), model(image()))
        normed = tiny(norm=LayerNorm2d)
        before = normed(image())
        normed.reparameterize()
        close(normed(image()), before)
    assert sum(isinstance(m, LayerNorm2d) for m in normed.modules()) == 1 + 3 + 5


# -------------------------------------------------------------------------------------------------------- the pyramid


def test_any_size_gives_the_described_levels_rounded_down() -> None:
    model = tiny()
    for size in ((64, 96), (70, 83), (32, 32)):
        with torch.no_grad():
            _, levels = model.forward_intermediates(image(*size))
            close(model.forward_head(model.forward_features(image(*size))), model(image(*size)))
        for level, info in zip(levels, model.feature_info, strict=True):
            assert level.shape[1:] == (info["num_chs"], *(side // info["reduction"] for side in size))


def test_norm_stands_behind_the_mixer_and_scale_can_be_left_out() -> None:
    """y = x + γ·MLP(BN(mixer(x))), one norm a block; without γ the rest is as it was."""
    scaled, plain = tiny(), tiny(layer_scale=0)
    assert all(block.gamma is None for stage in plain.stages for block in stage.blocks)
    block, x = scaled.stages[1].blocks[0], image(8, 8, 16)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in block.modules()) == 1
    with torch.no_grad():
        close(block(x), x + block.gamma.view(-1, 1, 1) * block.mlp(block.norm(block.token_mixer(x))))
        bare = plain.stages[1].blocks[0]
        close(bare(x), x + bare.mlp(bare.norm(bare.token_mixer(x))))


def test_mixers_know_their_stage_and_stems_their_stride() -> None:
    asked = []

    def record(dim: int, stage: int) -> nn.Module:
        asked.append((dim, stage))
        return nn.Identity()

    model = MetaNeXt(**SIZES, mixer=record, stem_stride=2, num_classes=5)
    assert asked == [(8, 0), (16, 1), (24, 2), (24, 2), (32, 3)]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]
    assert Backbone(model.eval(), reductions=(4, 16))(image(32, 48))[1].shape == (2, 32, 2, 3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.mlp.fc1.out_channels / block.mlp.fc1.in_channels for block in blocks] == [4, 4, 4, 4, 3]


@pytest.mark.parametrize("mlp_head", [True, False])
def test_head_is_replaced_and_left_out(mlp_head: bool) -> None:
    model = tiny(mlp_head=mlp_head)
    model.reset_classifier(7)
    assert model(image()).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0, "max")
    width = 96 if mlp_head else 32
    assert model.head_hidden_size == width
    assert model(image()).shape == (2, width)
    assert model.forward_head(model.forward_features(image()), pre_logits=True).shape == (2, width)
    assert tiny(mlp_head=mlp_head, in_chans=1, num_classes=0)(image(channels=1, batch=1)).shape == (1, width)


def test_nothing_leaks_from_hidden_pixels() -> None:
    """SparK pre-trains ours, timm's, and timm's with our mixers, unchanged."""
    for model in (tiny(), small_timm(), accelerate(small_timm())):
        assert check_leaks(Backbone(model), 64, 32) == []


# --------------------------------------------------------------------------------------------------------------- sizes


def test_ablations_are_convnext_with_other_kernels() -> None:
    arguments = {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32), "num_classes": 5}
    model: Any = trained(timm.create_model("convnext_tiny_k3_par1_4", **arguments))
    assert isinstance(model.stages[2].blocks[0].conv_dw, PartialConv2d)
    assert model.stages[2].blocks[0].conv_dw.split_indexes == [18, 6]
    assert model(image()).shape == (2, 5)
    features = timm.create_model("convnext_tiny_k5", features_only=True, out_indices=(1, 3), **arguments)
    assert [f.shape[1:] for f in features(image())] == [(16, 8, 8), (32, 2, 2)]
    assert check_leaks(Backbone(model), 64, 32) == []


def test_published_convnext_checkpoints_load() -> None:
    """Official keys of ConvNeXt, with the convolution of a partial mixer one level deeper."""
    model: Any = trained(timm.create_model("convnext_tiny_k3_par1_4", depths=(1, 1, 1, 1), dims=(16, 16, 24, 32)))
    official = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.fc", "head")
        official[key.replace("head.norm", "norm")] = value
    assert "stages.1.0.dwconv.conv.weight" in official
    found = timm.models.convnext.checkpoint_filter_fn({"model": official}, model)
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_published_flops() -> None:
    """Products and convolutions alone are within one percent of the paper's tables, but for Atto; counting a norm, an
    activation and a bias for every value too, as ptflops does, all sizes at 224 pixels have the published digits."""
    published = {
        "inception_next_atto": (224, "0.51"),
        "inception_next_tiny": (224, "4.2"),
        "inception_next_small": (224, "8.4"),
        "inception_next_base": (224, "14.9"),
        "convnext_tiny": (224, "4.5"),
        "inceptionnext_isotropic_small": (224, "4.2"),
        "inceptionnext_isotropic_base": (224, "16.8"),
    }
    small = {nn.BatchNorm2d: 2, nn.GELU: 1, nn.Conv2d: 1}
    for name, (size, billions) in published.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert name == "inception_next_atto" or agrees(multiply_adds(model, size), billions), name
        if name.startswith("inception_next"):
            assert f"{multiply_adds(model, size, small):.{len(billions.partition('.')[2])}f}" == billions, name
    with torch.device("meta"):
        assert agrees(multiply_adds(timm.create_model("inception_next_base"), 384), "43.6")


def test_isotropic_network_keeps_one_resolution() -> None:
    model = timm.create_model("inceptionnext_isotropic_small", depths=(2,), dims=(16,), num_classes=5).eval()
    (level,) = Backbone(model)(image(64, 80))
    assert level.shape == (2, 16, 4, 5)
    assert model(image()).shape == (2, 5)
    bands = partial(InceptionDWConv2d, band_kernel_size=9, branch_ratio=0.25)
    other = timm.create_model("inceptionnext_isotropic_small", depths=(1,), dims=(16,), mixer=lambda dim, _: bands(dim))
    assert other.stages[0].blocks[0].token_mixer.dwconv_w.kernel_size == (1, 9)  # type: ignore[index, union-attr]
