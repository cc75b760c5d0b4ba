"""ConViT as timm users meet it: gated positional attention, any size, locality, taking over timm's networks."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor

from isthmus.codec import Codec, UserError, create_timm
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.convit import GPSA, ConViT, checkpoint_filter_fn, locality, nonlocality, relative_offsets
from isthmus.layers.sparse_conv.check import check_leaks
from tests.encoders.flops import agrees, multiply_adds

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "embed_dim": 36,
    "depth": 3,
    "num_heads": 9,
    "local_up_to_layer": 2,
}


def randomised(model: Any) -> Any:
    """Every parameter off its initial value, gates and positions too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomised(ConViT(**{**TINY, **kwargs}))


def theirs(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomised(timm.create_model("convit_tiny", **{**TINY, "embed_dim": 4, **kwargs}))


def image(height: int = 32, width: int = 32, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height + width))


# ------------------------------------------------------------------------------------------ gated positional attention


@pytest.mark.parametrize(("heads", "grid"), [(9, (9, 12)), (4, (8, 8)), (16, (11, 9)), (1, (5, 5))])
def test_head_looks_at_its_offset_at_the_start(heads: int, grid: tuple[int, int]) -> None:
    """The sheet's second check: with the gate at 1 attention peaks at the predicted offset, for every inner query."""
    layer = GPSA(heads * 4, heads, locality_strength=2.0)
    layer.gating_param.data.fill_(50.0)
    x = torch.randn(1, grid[0] * grid[1], heads * 4, generator=torch.Generator().manual_seed(0))
    attention = layer.attention(x, grid)[0].detach()
    side = int(heads**0.5)
    offset = torch.arange(side) - (side - 1) / 2
    for head in range(heads):
        right, down = float(offset[head // side]), float(offset[head % side])
        for y in range(2, grid[0] - 2):
            for x_ in range(2, grid[1] - 2):
                looked = attention[head, y * grid[1] + x_].view(grid)
                peaks = (looked > looked.max() * 0.999).nonzero().float().mean(0) - torch.tensor([y, x_])
                assert peaks.tolist() == pytest.approx([down, right])


def test_layer_with_closed_content_is_a_convolution_at_the_start() -> None:
    """Sharp heads, gate 1: the layer is Linear_o of the 3x3 neighbourhood, cut by heads (section 3.3)."""
    layer = GPSA(18, 9, locality_strength=50.0)
    layer.gating_param.data.fill_(50.0)
    x = torch.randn(1, 36, 18, generator=torch.Generator().manual_seed(0))
    maps = torch.nn.functional.unfold(x.transpose(1, 2).view(1, 18, 6, 6), 3).view(18, 9, 4, 4)
    heads = maps.view(9, 2, 9, 4, 4)  # head, its two channels, place in the window (row-major)
    wanted = torch.stack([heads[h, :, 3 * (h % 3) + h // 3] for h in range(9)]).view(18, 4, 4)
    got = layer(x).detach()
    torch.testing.assert_close(got.view(6, 6, 18)[1:5, 1:5], layer.proj(wanted.permute(1, 2, 0)).detach())


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7), (1, 1)], ids=str)
def test_output_is_that_of_the_attention_it_tells(grid: tuple[int, int]) -> None:
    """Neither way of computing forms the other's intermediate: both are the equations of section 3.2."""
    layer = randomised(GPSA(12, 4, qkv_bias=True))
    x = torch.randn(3, grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(1))
    attention = layer.attention(x, grid)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))
    score = layer.pos_proj(relative_offsets(grid)).permute(2, 0, 1).softmax(-1)
    torch.testing.assert_close(layer.positional(grid), score)
    values = layer.v(x).view(3, -1, 4, 3).transpose(1, 2)
    wanted = layer.proj((attention @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid), wanted)


def test_gradients_are_those_of_timm() -> None:
    a, b = tiny(), theirs()
    b.load_state_dict(a.state_dict())
    for model in (a, b):
        model(image()).square().sum().backward()
    grads = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        if "pos_proj.bias" in name:  # zero but for rounding
            continue
        bound = 1e-4 * float(grads[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, grads[name].grad, atol=bound, rtol=1e-3)


def test_attention_dropout_drops_in_training_only() -> None:
    layer = randomised(GPSA(12, 4, attn_drop=0.5))
    x = image(4, 12, 1, 2).view(2, 4, 12)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(1000)]).mean(0)
        assert float((mean - layer.eval()(x)).abs().max()) < 0.1


def test_a_whole_network_starts_local_too() -> None:
    """A global initialisation comes before the local one and never after it."""
    for model in (ConViT(**TINY), ConViT.from_timm(timm.create_model("convit_tiny", **{**TINY, "embed_dim": 4}))):  # type: ignore[arg-type]
        for block in model.blocks[:2]:
            assert torch.equal(block.attn.v.weight, torch.eye(36))
            assert block.attn.pos_proj.weight[0].tolist() == [-2.0, -2.0, -1.0]
            assert block.attn.pos_proj.weight[1].tolist() == [-2.0, 0.0, -1.0], "heads run over rows first"
            assert block.attn.gates.tolist() == pytest.approx([0.7310586] * 9)
        assert not torch.equal(model.blocks[2].attn.qkv.weight[-36:], torch.eye(36))


def test_non_square_number_of_heads_warns_and_inits_the_square_ones() -> None:
    with pytest.warns(UserWarning, match="6 heads are no square number: 2 of them"):
        layer = GPSA(12, 6, locality_strength=1.5)
    assert torch.equal(layer.pos_proj.weight[:4, 2], torch.full((4,), -1.5))
    assert float(layer.pos_proj.weight[4:].detach().abs().max()) < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "5 heads do not divide the width 36"),
        ({"locality_strength": 0.0}, "locality_strength is above 0, got 0.0"),
        ({"locality_strength": float("nan")}, "locality_strength is a finite number, got nan"),
        ({"local_up_to_layer": 3}, "would see no patch"),
        ({"local_up_to_layer": -1}, "local_up_to_layer is at least 0, got -1"),
        ({"depth": 0}, "depth is at least 1, got 0"),
        ({"embed_dim": 0}, "embed_dim is at least 1, got 0"),
        ({"patch_size": 0}, "patch_size is at least 1, got 0"),
        ({"img_size": 0}, "img_size is at least 1, got 0"),
        ({"img_size": (4, 32)}, r"img_size \(4, 32\) is smaller than a patch of 8 pixels"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is above 0, got -1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is from 0 to 1, got -0.1"),
    ],
)
def test_impossible_networks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConViT(**{**TINY, **change})
    if "num_heads" in change or "locality_strength" in change:
        with pytest.raises(ValueError, match=message):
            GPSA(36, **{"num_heads": 9, **change})


def test_tokens_that_are_no_such_grid_are_refused() -> None:
    layer = GPSA(12, 4)
    for tokens, grid, message in (
        (7, None, "7 tokens are not a square"),
        (8, (3, 3), "8 tokens are not a grid of 3x3"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(1, tokens, 12), grid)
    with pytest.raises(ValueError, match="8 wide; this layer is for 12"):
        layer(torch.zeros(1, 4, 8))


def test_very_sharp_heads_in_half_precision_are_finite() -> None:
    layer = GPSA(12, 4, locality_strength=1000.0).half().eval()
    with torch.no_grad():
        assert torch.isfinite(layer(torch.randn(1, 900, 12).half())).all()
        assert torch.isfinite(layer.positional((30, 30))).all()


# ------------------------------------------------------------------------------------------------- the whole network


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (27, 61), (5, 9)], ids=str)
def test_any_size_gives_the_described_levels(size: tuple[int, int]) -> None:
    model = tiny()
    with torch.no_grad():
        last, levels = model.forward_intermediates(image(*size))
        torch.testing.assert_close(model.forward_head(last), model(image(*size)))
        assert torch.equal(model.forward_features(image(*size)), last)
    assert [tuple(level.shape[2:]) for level in levels] == [(-(-size[0] // 8), -(-size[1] // 8))] * 3
    assert all(level.shape[1] == info["num_chs"] for level, info in zip(levels, model.feature_info, strict=True))


def test_padding_equals_padded_images() -> None:
    model, x = tiny(), image(27, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(torch.nn.functional.pad(x, (0, 2, 0, 5))))


def test_timm_network_is_taken_over_with_its_parameters() -> None:
    old = theirs(attn_drop_rate=0.1, drop_path_rate=0.1)
    ours = ConViT.from_timm(old)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), old(x))
        for a, b in zip(ours.forward_intermediates(x)[1], old.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(a, b)
        for norm in (False, True):
            got = ours.forward_intermediates(x, 1, norm, True, "NLC", True)[0]
            torch.testing.assert_close(got, old.forward_intermediates(x, 1, norm, True, "NLC", True)[0])
        assert ours(image(40, 56)).shape == (2, 5), "timm's network takes no other size"
    assert {id(p) for p in ours.parameters()} == {id(p) for p in old.parameters()}
    assert list(ours.state_dict()) == list(old.state_dict())
    assert ours.blocks[0].attn.attn_drop.p == 0.1
    with pytest.raises(AssertionError, match="Input height"):  # and the old one stays as it was
        old(image(40, 56))
    with pytest.raises(ValueError, match="is not timm's ConViT"):
        ConViT.from_timm(timm.create_model("vit_tiny_patch16_224", depth=1))  # type: ignore[arg-type]


def test_named_sizes_take_images_of_any_size_as_encoders(tmp_path: Path) -> None:
    arguments = {**TINY, "embed_dim": 4}
    encoder = Backbone("convit_tiny", **arguments).eval()
    assert type(encoder.model) is ConViT
    with torch.no_grad():
        (level,) = encoder(image(27, 61))
        assert level.shape == (2, 36, 4, 8)
        again: Any = copy.deepcopy(encoder)
        assert torch.equal(again(image(27, 61))[0], level)
        Codec(encoder).save_pretrained(tmp_path)
        saved: Any = Codec.from_pretrained(tmp_path).eval()
        assert torch.equal(saved.encoder(image(27, 61))[0], level)
    theirs_ = timm.create_model("convit_tiny", **arguments)
    theirs_.load_state_dict(encoder.model.state_dict())
    assert type(create_timm("vit_tiny_patch16_224", depth=1)).__module__.startswith("timm.")


def test_without_local_layers_it_is_a_vision_transformer() -> None:
    """timm's own, with its keys: the class token from the start, no gates."""
    model = tiny(local_up_to_layer=0, qkv_bias=True)
    sizes = {k: v for k, v in TINY.items() if k != "local_up_to_layer"}
    twin = timm.create_model("vit_tiny_patch16_224", **sizes)
    state = dict(model.state_dict())
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 36), state["pos_embed"]], 1)
    twin.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(image()), twin.eval()(image()))


def test_all_local_network_has_no_class_token() -> None:
    model = tiny(local_up_to_layer=3, global_pool="avg")
    assert model.cls_token is None
    with torch.no_grad():
        features = model.forward_features(image())
        torch.testing.assert_close(model(image()), model.head(features.mean(1)))


def test_head_is_replaced_and_left_out() -> None:
    model = tiny()
    model.reset_classifier(7, "avg")
    assert model(image()).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    assert tiny(num_classes=0)(image()).shape == (2, 36)
    assert tiny(in_chans=1)(image(channels=1, batch=1)).shape == (1, 5)


def test_set_input_size_keeps_what_the_network_computes() -> None:
    model, x = tiny(), image(48, 40)
    with torch.no_grad():
        before = model(x)
        model.set_input_size((48, 40))
        torch.testing.assert_close(model(x), before)
    assert model.pos_embed.shape == (1, 30, 36)


def test_checkpoint_of_another_size_is_resampled_or_refused(tmp_path: Path) -> None:
    small = tiny()
    torch.save({"model": small.state_dict()}, tmp_path / "small.pth")
    arguments = {
        **TINY,
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "small.pth"), "num_classes": 5},
    }
    large = timm.create_model("convit_tiny_plus", **{**arguments, "img_size": (48, 40)}).eval()
    small.set_input_size((48, 40))
    with torch.no_grad():
        torch.testing.assert_close(large(image(48, 40)), small(image(48, 40)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("convit_tiny_plus", **{**arguments, "embed_dim": 72})
    with pytest.raises(ValueError, match="30 positions, no square number, and the model 4x4"):
        checkpoint_filter_fn(small.state_dict(), tiny())


def test_no_decay_and_layers_for_layer_wise_learning_rates() -> None:
    model = tiny()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert len(group_parameters(model, model.group_matcher())) == 5


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 4, 32, 32); this network takes (B, 3, H, W)")):
        tiny()(image(channels=4))
    with pytest.raises(ValueError, match="neither 'NCHW' nor 'NLC'"):
        tiny().forward_intermediates(image(), output_fmt="NHWC")


def test_spark_is_refused_because_attention_mixes_all_places() -> None:
    with pytest.raises(UserError, match=r"(?i)attention|sparse"):
        check_leaks(Backbone(tiny()), 32, 8)


def test_published_sizes_and_flops() -> None:
    """Multiply-adds of linear layers and convolution, in 1e9: table 1 leaves the products between tokens out. The
    published layer projects the offset of every pair of tokens, ours those of an axis, so ours has fewer."""
    published = {
        "convit_tiny": (5_710_512, "1"),
        "convit_small": (27_777_322, "5.4"),
        "convit_base": (86_540_040, "17"),
    }
    linear = "mm addmm convolution"
    with torch.device("meta"):
        for name, (parameters, billions) in published.items():
            theirs: Any = timm.create_model(name)
            ours = ConViT.from_timm(theirs)
            assert sum(p.numel() for p in ours.parameters()) == parameters
            assert agrees(multiply_adds(theirs, 224, only=linear), billions), name
            assert multiply_adds(ours, 224, only=linear) < multiply_adds(theirs, 224, only=linear)
        for name, millions in (("convit_tiny_plus", 10), ("convit_small_plus", 48), ("convit_base_plus", 152)):
            counted = sum(p.numel() for p in timm.create_model(name).parameters())
            assert counted / 1e6 == pytest.approx(millions, abs=1.2)  # published as whole millions


# ----------------------------------------------------------------------------------------------------------- locality


def test_distance_of_uniform_and_of_own_attention() -> None:
    grid = (3, 4)
    distance = relative_offsets(grid)[..., 2].sqrt()
    assert nonlocality(torch.eye(12)[None], grid).tolist() == [0.0]
    assert float(nonlocality(torch.full((2, 1, 12, 12), 1 / 12), grid)) == pytest.approx(float(distance.mean()))
    assert distance[0, 11] == pytest.approx((2**2 + 3**2) ** 0.5)
    assert relative_offsets(grid)[0, 6].tolist() == [2.0, 1.0, 5.0]  # columns first, key minus query


def test_locality_tells_every_layer_and_starts_short() -> None:
    """Gated layers look less far than the plain ones behind them, and gates start at σ(1)."""
    torch.manual_seed(0)
    model = ConViT(**TINY).eval()
    found = locality(model, image(64, 48))
    assert [layer.gates is None for layer in found] == [False, False, True]
    for layer in found[:2]:
        assert layer.gates is not None
        assert layer.gates.tolist() == pytest.approx([0.7310586] * 9)
        assert float(layer.distance.max()) < float(found[2].distance.min())
    uniform = relative_offsets((8, 6))[..., 2].sqrt().mean()
    assert found[2].distance.tolist() == pytest.approx([float(uniform)] * 9, rel=0.05)
    old = theirs()
    for a, b in zip(locality(old, image()), locality(ConViT.from_timm(old), image()), strict=True):
        assert torch.equal(a.distance, b.distance)
