"""Masks have the promised counts, depend on the seed only, and patches come back as the picture they were."""

from __future__ import annotations

import random

import pytest
import torch

from isthmus.layers.masking import block_mask, hide_blocks, normalise_patches, patchify, random_mask, unpatchify
from isthmus.layers.random import ShardedGenerator


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", [random_mask, block_mask])
def test_every_mask_keeps_exactly_the_wanted_cells(make) -> None:
    mask = make(16, (5, 7), 11, _seeded())
    assert mask.shape == (16, 5, 7)
    assert mask.dtype == torch.bool
    assert mask.flatten(1).sum(1).tolist() == [11] * 16
    assert torch.equal(mask, make(16, (5, 7), 11, _seeded()))
    assert not torch.equal(mask, make(16, (5, 7), 11, _seeded(1)))


@pytest.mark.parametrize("make", [random_mask, block_mask])
def test_masks_do_not_depend_on_the_number_of_devices(make) -> None:
    whole = make(8, (6, 6), 9, ShardedGenerator("mask", 3))
    parts = [make(4, (6, 6), 9, ShardedGenerator("mask", 3, rank=r, world=2)) for r in range(2)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("make", [random_mask, block_mask])
@pytest.mark.parametrize("keep", [-1, 0, 36, 40])
def test_hiding_all_or_nothing_is_refused(make, keep: int) -> None:
    with pytest.raises(ValueError, match="at least one must be visible and at least one hidden"):
        make(2, (6, 6), keep, _seeded())


def test_every_cell_is_as_likely_as_the_others() -> None:
    share = random_mask(20_000, (3, 4), 5, _seeded()).float().mean(0)
    assert (share - 5 / 12).abs().max() < 0.015


def test_blocks_hide_rectangles_not_single_cells() -> None:
    """Far more hidden neighbours than independent cells would have."""

    def together(visible: torch.Tensor) -> float:
        return float((~visible[:, 1:] & ~visible[:, :-1]).float().mean())

    assert together(block_mask(64, (14, 14), 98, _seeded())) > 1.4 * together(random_mask(64, (14, 14), 98, _seeded()))


def test_blocks_that_do_not_fit_are_completed_cell_by_cell() -> None:
    """Rectangles must be smaller than the grid both ways, so a two-row grid can never be filled by them alone."""
    hidden = hide_blocks(random.Random(0), (2, 8), 13)
    assert int(hidden.sum()) == 13


def test_patches_are_row_column_channel_and_come_back() -> None:
    image = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], image[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 2, (2, 3)), image)


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="30x32 pixels has no whole number of 16-pixel patches"):
        patchify(torch.zeros(1, 3, 30, 32), 16)
    with pytest.raises(ValueError, match="do not make a grid of 2x3"):
        unpatchify(torch.zeros(1, 5, 12), 2, (2, 3))


def test_normalised_patches_have_unit_unbiased_variance_over_all_values_jointly() -> None:
    patches = torch.randn(3, 5, 48, generator=_seeded()) * 4 + 2
    normal, mean, std = normalise_patches(patches)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(-1, unbiased=True), torch.ones(3, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal * std + mean, patches)


def test_a_constant_patch_becomes_zeros() -> None:
    normal, _, std = normalise_patches(torch.full((1, 1, 48), 0.25))
    assert torch.equal(normal, torch.zeros(1, 1, 48))
    assert float(std) == pytest.approx(1e-3)
