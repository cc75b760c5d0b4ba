"""Necks: what comes out of them, where they agree, published files, and what they refuse."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.codec import FeatureInfo, Neck
from isthmus.decoders.necks import FPN, HorFPN, convert_official
from isthmus.encoders.backbone import Backbone
from isthmus.layers.gnconv import GlobalLocalFilter, GnConv

INFO = [FeatureInfo(4, 4), FeatureInfo(6, 8), FeatureInfo(8, 16)]


def maps(*sides: tuple[int, int], batch: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, i.channels, *s, generator=g) for i, s in zip(INFO, sides, strict=True)]


@pytest.mark.parametrize("make", [FPN, HorFPN])
def test_levels_have_one_width_and_further_ones_half_the_side(make: Any) -> None:
    neck = make(INFO, width=8, levels=5)
    assert isinstance(neck, Neck)
    assert [tuple(i) for i in neck.feature_info] == [(8, r, "NCHW") for r in (4, 8, 16, 32, 64)]
    # Sides that do not double, and odd ones.
    out = neck(maps((13, 11), (7, 6), (3, 3)))
    assert [level.shape for level in out] == [(2, 8, *s) for s in ((13, 11), (7, 6), (3, 3), (2, 2), (1, 1))]
    assert torch.equal(out[3], out[2][:, :, ::2, ::2])


def test_each_level_gets_the_nearest_cells_of_the_coarser_ones() -> None:
    """With the output layers left out, what comes out is the sum of the laterals."""
    neck = HorFPN(INFO, width=8)
    neck.pyramid.layer_blocks = nn.ModuleList(nn.Identity() for _ in INFO)
    features = maps((8, 8), (4, 4), (2, 2))
    lateral = [block(level) for block, level in zip(neck.pyramid.inner_blocks, features, strict=True)]
    wanted = lateral[0] + lateral[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = wanted + lateral[2].repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(neck(features)[0], wanted)


def test_output_layers_are_recursive_gated_convolutions_of_scale_one() -> None:
    neck = HorFPN(INFO, width=8, order=3, ratio=2)
    assert all(isinstance(b, GnConv) and b.scale == 1 and b.widths == [4, 8, 16] for b in neck.pyramid.layer_blocks)
    assert neck(maps((8, 8), (4, 4), (2, 2)))[0].shape == (2, 8, 8, 8)
    filtered = HorFPN(INFO, width=8, filter=(32, 17), project_out=False)
    assert sum(isinstance(m, GlobalLocalFilter) for m in filtered.modules()) == 3
    filtered(maps((9, 8), (4, 4), (2, 2)))[0].square().mean().backward()
    assert all(p.grad is not None for b in filtered.pyramid.layer_blocks[:1] for p in b.parameters())


def test_it_follows_any_backbone() -> None:
    encoder = Backbone("hornet_tiny_7x7", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    neck = HorFPN(encoder.feature_info, width=16, levels=5).eval()
    assert [level.shape[-1] for level in neck(encoder.eval()(torch.rand(1, 3, 96, 96)))] == [24, 12, 6, 3, 2]


def test_published_names_load() -> None:
    for make, inside in ((FPN, "conv."), (HorFPN, "")):
        neck = make(INFO, width=8)
        official = {}
        for key, value in neck.state_dict().items():
            key = re.sub(r"^pyramid\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv.", key)
            key = re.sub(r"^pyramid\.layer_blocks\.(\d)\.(?:0\.)?", rf"neck.fpn_convs.\1.{inside}", key)
            official[key] = value
        official["backbone.norm0.weight"] = torch.ones(4)
        assert {"neck.lateral_convs.2.conv.bias", f"neck.fpn_convs.0.{inside or 'proj_in.'}weight"} <= official.keys()
        other = copy.deepcopy(neck)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        other.load_state_dict(convert_official(official))
        features = maps((8, 8), (4, 4), (2, 2))
        assert torch.equal(other(features)[0], neck(features)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FPN([]), "the encoder has no levels"),
        (lambda: FPN(INFO[::-1]), "reductions [16, 8, 4] have to ascend"),
        (lambda: FPN([FeatureInfo(8, 16, "NTC")]), "this encoder gives tokens"),
        (lambda: FPN(INFO, levels=2), "2 levels"),
        (lambda: FPN(INFO, width=0), "width is at least 1, got 0"),
        (lambda: HorFPN(INFO, width=9), "width 9 does not divide by 2, as order 2 needs"),
        (
            lambda: FPN(INFO)(maps((8, 8), (4, 4), (2, 2))[:2]),
            "this neck takes maps (B, C, H, W) of [4, 6, 8] channels",
        ),
        (lambda: FPN(INFO)(maps((8, 8), (4, 4), (2, 2))[::-1]), "this neck takes maps"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
