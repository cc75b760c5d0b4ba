"""Discs: every combination once, told by its factors."""

from __future__ import annotations

import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load


def test_every_combination_comes_once_whatever_the_seed() -> None:
    discs = load("discs", "all", ("image", "factors", "label"))
    batch = discs.fetch(range(len(discs)))
    assert len(batch["factors"].unique(dim=0)) == len(batch["image"].unique(dim=0)) == len(discs) == 720
    assert batch["image"].shape == (720, 3, 16, 16)
    assert torch.equal(batch["image"], load("discs", "all", seed=5).fetch(range(720))["image"])
    parts = [load("discs", split, ("factors",)).fetch(range(20))["factors"] for split in ("train", "test")]
    assert len(torch.cat(parts).unique(dim=0)) == 40


def test_a_disc_is_where_and_as_large_as_its_factors_say() -> None:
    discs = load("discs:64", "all", ("image", "factors"))
    batch = discs.fetch(range(720))
    light = batch["image"].float().amax(1)
    grid = torch.arange(64) + 0.5
    x = (light.sum(1) * grid).sum(1) / light.sum((1, 2)) / 4
    expected = torch.tensor((4.0, 5.6, 7.2, 8.8, 10.4, 12.0))[batch["factors"][:, 3]]
    small = batch["factors"][:, 1] == 0  # the larger ones reach over the edge
    torch.testing.assert_close(x[small], expected[small], atol=0.05, rtol=0)
    area = (light > 127 * light.amax((1, 2), keepdim=True) / 255).sum((1, 2)).float() / 16
    torch.testing.assert_close(area[small], torch.full_like(area[small], torch.pi * 1.5**2), atol=1.0, rtol=0)


def test_refuses_impossible_sizes_and_unknown_columns() -> None:
    with pytest.raises(UserError, match="at least 8"):
        load("discs:4")
    with pytest.raises(UserError, match="depth"):
        load("discs", "all", ("depth",))
