"""TransNeXt as timm users meet it, and what makes it that paper: one softmax, many sizes, no copies of windows."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from isthmus.codec import UserError
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.aggregated_attention import AggregatedAttention, PlainAttention, unit
from isthmus.encoders.images.transnext import ConvGLU, TransNeXt, convert_official
from isthmus.engine.optim import param_groups
from isthmus.layers.sparse_conv.check import check_leaks
from tests.encoders.flops import multiply_adds

TINY: dict[str, Any] = {
    "embed_dims": (8, 12, 16, 24),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 3),
    "mlp_ratios": (3, 2, 2, 2),
    "pretrain_size": 64,
    "num_classes": 5,
}


def tiny(**kwargs: Any) -> Any:
    """Every parameter away from its initial value, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("transnext_micro", **{**TINY, **kwargs})
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height + width))


def attention(**kwargs: Any) -> AggregatedAttention:
    torch.manual_seed(0)
    module = AggregatedAttention(8, 2, **kwargs)
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def grid(height: int, width: int, window: int = 3) -> Any:
    """The grid of a stage that pools by 2."""
    model = TransNeXt((8,), (0,), (1,), (1,), (2,), window, patch_size=1, pretrain_size=(height, width))
    return model.grids(height, width)[0]


@pytest.mark.parametrize("mode", ["extrapolate", "interpolate"])
@pytest.mark.parametrize("size", [(64, 96), (75, 50), (138, 66)], ids=str)
def test_any_size_gives_the_described_levels(mode: str, size: tuple[int, int]) -> None:
    model = tiny(bias_mode=mode)
    with torch.no_grad():
        last, levels = model.forward_intermediates(image(*size))
        torch.testing.assert_close(model.forward_head(model.forward_features(image(*size))), model(image(*size)))
    assert len(levels) == 4
    for level, info in zip(levels, model.feature_info, strict=True):
        assert level.shape[1] == info["num_chs"]
        assert tuple(level.shape[2:]) == tuple(-(-side // info["reduction"]) for side in size)
    assert torch.equal(last, levels[-1])


def test_both_modes_agree_at_the_size_that_the_bias_is_made_for_and_nowhere_else() -> None:
    for img_size, side, same in ((96, 96, True), (64, 96, False)):
        modes = [tiny(bias_mode=mode, img_size=img_size) for mode in ("extrapolate", "interpolate")]
        with torch.no_grad():
            a, b = (model(image(side, side)) for model in modes)
        assert torch.allclose(a, b, atol=1e-5) == same


def test_coordinates_are_relative_to_the_size_of_pretraining() -> None:
    with torch.no_grad():
        a, b = (tiny(pretrain_size=side)(image()) for side in (64, 128))
    assert not torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{"sr_ratios": (16, 8, 4, 2)}, {"fixed_pool_size": 1, "sr_ratios": (8, 4, 2, 2)}])
def test_aggregated_attention_in_all_stages_serves_dense_prediction(kwargs: dict[str, Any]) -> None:
    model = tiny(**kwargs)
    assert not any(isinstance(m, PlainAttention) for m in model.modules())
    with torch.no_grad():
        levels = model.forward_intermediates(image(64, 90), intermediates_only=True)
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 23), (8, 12), (4, 6), (2, 3)]


def test_fixed_pool_keeps_the_number_of_coarse_keys() -> None:
    model = tiny(fixed_pool_size=3, sr_ratios=(8, 4, 2, 1))
    assert [g.keys for g in model.grids(128, 192)[:3]] == [(3, 3)] * 3
    assert [g.keys for g in tiny().grids(128, 192)] == [(4, 6), (4, 6), (4, 6), (4, 6)]


def test_a_place_sees_as_many_keys_as_the_scale_says() -> None:
    counts = attention().count(grid(4, 6))
    pooled = 2 * 3
    assert counts[0, 0] == 4 + pooled
    assert counts[0, 1] == 6 + pooled
    assert counts[1, 1] == 9 + pooled


def test_one_softmax_over_window_and_pooled_view() -> None:
    """With constant values the softmax part passes them on whatever the queries; tokens alone add to it."""
    module, x = attention(), torch.randn(1, 4, 6, 8)
    with torch.no_grad():
        module.kv.weight[8:].zero_()
        module.kv.bias[8:] = torch.arange(8.0)
        module.learnable_tokens.zero_()
        module.learnable_bias.zero_()
        want = module.proj(torch.arange(8.0)).expand(1, 4, 6, 8)
        torch.testing.assert_close(module(x, grid(4, 6)), want)
        module.learnable_bias.fill_(1)  # adds every visible value of the window once
        added = grid(4, 6).visible.sum(0)[..., None] * torch.arange(8.0)
        torch.testing.assert_close(module(x, grid(4, 6)), module.proj(torch.arange(8.0) + added)[None])


def test_one_block_sees_the_whole_map_and_its_window_most_sharply() -> None:
    module, view = attention().double(), grid(16, 16)
    x = torch.randn(1, 16, 16, 8, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(module(x, view)[0, 8, 8].sum(), x)[0].abs().sum(-1)[0]
    assert (gradient > 0).all()
    strongest = gradient.flatten().topk(3).indices
    assert all(abs(int(i) // 16 - 8) <= 1 and abs(int(i) % 16 - 8) <= 1 for i in strongest)


def test_window_of_a_map_smaller_than_it() -> None:
    with torch.no_grad():
        assert torch.isfinite(attention(window=7)(torch.randn(1, 2, 3, 8), grid(2, 3, 7))).all()


def test_keys_have_unit_length_and_zero_stays_zero() -> None:
    x = torch.randn(2, 3, 4, 5)
    x[:, :, :, 0] = 0
    lengths = unit(x, 2).norm(dim=2)
    torch.testing.assert_close(lengths[..., 1:], torch.ones(2, 3, 4))
    assert not lengths[..., 0].any()
    large = torch.full((1, 1, 8, 1), 6e4, dtype=torch.float16)
    torch.testing.assert_close(unit(large, 2).float(), torch.full((1, 1, 8, 1), 8**-0.5), atol=1e-3, rtol=0)


def test_gate_is_the_first_half() -> None:
    unit_ = ConvGLU(4, 3)
    assert unit_.fc1.out_features == 2 * 8
    with torch.no_grad():
        unit_.fc1.bias[:8] = -100  # GELU of a very negative gate is zero
        unit_.fc1.weight[:8].zero_()
        unit_.dwconv.weight.fill_(1)
        torch.testing.assert_close(unit_(torch.randn(1, 5, 5, 4)), unit_.fc2.bias.expand(1, 5, 5, 4))


def test_norms_have_three_places_and_two_epsilons() -> None:
    """1e-6 in blocks and behind stages; 1e-5 behind patches and in the pooled view."""
    for stage in tiny().stages:
        block = stage.blocks[0]
        assert stage.embed.norm.eps == 1e-5
        assert block.norm1.eps == block.norm2.eps == stage.norm.eps == 1e-6
        assert isinstance(block.attn, PlainAttention) or block.attn.norm.eps == 1e-5


def test_initial_weights() -> None:
    """Convolutions by their fan-out, depthwise ones too; linear layers and tokens 0.02, the window's bias 0.0004."""
    torch.manual_seed(0)
    model: Any = timm.create_model("transnext_micro", depths=(1, 1, 1, 1))
    block = model.stages[2].blocks[0]
    for weight, std in (
        (model.stages[0].embed.proj.weight, math.sqrt(2 / (7 * 7 * 48))),
        (block.mlp.dwconv.weight, math.sqrt(2 / 9)),
        (block.attn.sr.weight, math.sqrt(2 / 192)),
        (block.attn.kv.weight, 0.02),
        (block.attn.learnable_tokens, 0.02),
        (block.attn.query_embedding, 0.02),
        (block.attn.local_bias, 0.0004),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.15)
    assert not block.attn.learnable_bias.any()
    assert not block.attn.kv.bias.any()


def test_initial_temperature() -> None:
    module = AggregatedAttention(8, 2)
    torch.testing.assert_close(nn.functional.softplus(module.temperature), torch.full((2, 1, 1), 1 / 0.24))


def test_side_of_one_in_pretraining_divides_by_nothing() -> None:
    model = tiny(pretrain_size=32)
    with torch.no_grad():
        assert torch.isfinite(model(image(32, 32))).all()


def test_stages_that_are_not_asked_for_need_no_room() -> None:
    model = tiny(sr_ratios=(2, 2, 2, 4))
    assert model.forward_intermediates(image(), [0, 1], stop_early=True, intermediates_only=True)[1].shape[1] == 12
    with pytest.raises(ValueError, match="stage 4 has a map of 2x2 cells, too small to be pooled by 4"):
        model(image())


def test_half_precision_and_autocast_are_finite() -> None:
    model, x = tiny(), image()
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), want, atol=0.1 * float(want.abs().max()), rtol=0)
            assert torch.isfinite(model(100 * x)).all()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        assert torch.isfinite(tiny().half()(100 * x.half())).all()
        assert torch.isfinite(tiny(bias_mode="interpolate", img_size=96).half()(x.half())).all()


def test_exported_network_computes_the_same() -> None:
    model, x = tiny(depths=(1, 0, 0, 1)), image()
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))


def test_dropout_and_drop_path_act_in_training_only() -> None:
    model = tiny(attn_drop_rate=0.5, drop_path_rate=0.5)
    with torch.no_grad():
        assert torch.equal(model(image()), model(image()))
        model.train()
        assert not torch.equal(model(image()), model(image()))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.5 * i / 4 for i in range(5)])


def test_attention_is_refused_by_the_leak_check() -> None:
    """Pooled keys and the bias of every place read hidden pixels: SparK pre-trains convolutions only."""
    with pytest.raises(UserError, match=r"\(AggregatedAttention\) has no sparse form"):
        check_leaks(Backbone(tiny()), 64, 32)


def test_layers_are_grouped_and_some_parameters_are_not_shrunk() -> None:
    model = tiny()
    for coarse in (False, True):
        assert len(group_parameters(model, model.group_matcher(coarse))) > 3
    free = model.no_weight_decay()
    assert any("query_embedding" in name for name in free)
    assert any("cpb.fc1.weight" in name for name in free)
    assert not any(name.endswith("q.weight") for name in free)
    decayed = {id(p) for group in param_groups(model, 0.05) if group["weight_decay"] for p in group["params"]}
    assert not any(id(p) in decayed for name, p in model.named_parameters() if name in free)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (1, 2, 3, 3)}, "3 heads do not divide a width of 16"),
        ({"num_heads": (1, 2, 2, 5)}, "5 heads do not divide a width of 24"),
        ({"window_size": 4}, "window 4"),
        ({"depths": (1, 1, 1)}, "one entry a stage; they have 4, 3, 4"),
        ({"bias_mode": "guess"}, "bias_mode is one of extrapolate, interpolate, got 'guess'"),
        ({"sr_ratios": (8, 4, 0, 1)}, "at least 1"),
        ({"embed_dims": (8, 0, 16, 24)}, "embed_dims is at least 1, got 0"),
        ({"patch_size": 0}, "patch_size is at least 1, got 0"),
        ({"pretrain_size": (64, -1)}, "pretrain_size"),
        ({"drop_path_rate": 1.5}, "drop_path_rate is from 0 to 1, got 1.5"),
        ({"attn_drop_rate": float("nan")}, "attn_drop_rate is a finite number, got nan"),
    ],
)
def test_impossible_networks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_images_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="stage 1 has a map of 4x16 cells, too small to be pooled by 8"):
        tiny()(image(16, 64))
    with pytest.raises(ValueError, match="fixed_pool_size 4 must be smaller than its sides"):
        tiny(fixed_pool_size=4)(image())


def test_published_flops() -> None:
    """Every published figure to its last digit, counted as its author counts: by fvcore, which takes five operations
    for a value of a LayerNorm and one for a value that is pooled, windows included. Without these two TransNeXt-Micro
    has 2.65 and TransNeXt-Base 18.30 instead of 2.7 and 18.4."""
    published = {"micro": "2.7", "tiny": "5.7", "small": "10.3", "base": "18.4", "micro_aaaa": "3.3"}
    finetuned = {"small": "32.1", "base": "56.3"}  # at 384 pixels; the bias stays relative to 224
    for name, billions, larger in [(*p, 0) for p in published.items()] + [(*p, 384) for p in finetuned.items()]:
        with torch.device("meta"):
            model: Any = timm.create_model(f"transnext_{name}")
        side = larger or model.pretrain_size[0]
        values = sum(
            math.prod(grid.size) * info["num_chs"] * len(stage.blocks)
            for stage, grid, info in zip(model.stages, model.grids(side, side), model.feature_info, strict=True)
            if isinstance(stage.blocks[0].attn, AggregatedAttention)
        )
        windows, pooled = 2 * 9 * values, values  # scores and sums; what is pooled is as large as the map
        counted = multiply_adds(model, side, {nn.LayerNorm: 5}) + (windows + pooled) / 1e9
        assert f"{counted:.1f}" == billions, name


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names → the published ones, from the sheet's list of keys."""
    found = {}
    for key, value in state.items():
        if m := re.match(r"stages\.(\d)\.(embed|blocks|norm)\.(.*)", key):
            place = {"embed": "patch_embed", "blocks": "block", "norm": "norm"}[m[2]]
            key = f"{place}{int(m[1]) + 1}.{m[3]}"
        key = key.replace(".cpb.fc", ".cpb_fc").replace(".local_bias", ".relative_pos_bias_local")
        found[key.replace(".dwconv.", ".dwconv.dwconv.").replace("head.fc.", "head.")] = value
    return found


@pytest.mark.parametrize("layout", ["bare", "model", "detector"])
def test_timm_loads_a_published_checkpoint(layout: str, tmp_path: Path) -> None:
    trained, x = tiny(num_classes=1000), image()
    state = official(trained.state_dict())
    assert "block3.1.attn.relative_pos_bias_local" in state
    assert "block1.0.mlp.dwconv.dwconv.weight" in state
    if layout == "detector":
        whole = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("head")}
        torch.save({"state_dict": {**whole, "neck.weight": torch.zeros(1)}}, tmp_path / "published.pth")
        loaded = tiny(num_classes=0)
        loaded.load_state_dict(convert_official(torch.load(tmp_path / "published.pth", weights_only=True)))
        with torch.no_grad():
            assert torch.equal(loaded.forward_features(x), trained.forward_features(x))
        return
    torch.save({"model": state} if layout == "model" else state, tmp_path / "published.pth")
    arguments = {**TINY, "num_classes": 1000, "pretrained": True}
    overlay = {"file": str(tmp_path / "published.pth")}
    loaded = timm.create_model("transnext_micro", pretrained_cfg_overlay=overlay, **arguments).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), trained(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(
            "transnext_micro", pretrained_cfg_overlay=overlay, **{**arguments, "embed_dims": (16, 12, 16, 24)}
        )
