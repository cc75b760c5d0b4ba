"""Hiding parts of a picture: random and block-wise masks, and pictures as rows of patches.

A mask is a boolean grid ``(B, h, w)``; True is visible. How many cells stay is an integer, because papers round
differently.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from isthmus.layers.random import rows


def random_mask(batch: int, grid: tuple[int, int], keep: int, generator: torch.Generator) -> Tensor:
    """Masks with exactly ``keep`` visible cells each, all choices equally likely.

    Uniform noise, argsort, the ``keep`` smallest stay: the way of MAE (arXiv 2111.06377) and SparK (arXiv 2301.03580),
    so the same noise gives the published mask.

    Args:
        batch: masks wanted by this process.
        grid: rows and columns of cells.
        keep: visible cells of every mask.
        generator: a CPU generator; a ``ShardedGenerator`` draws for the global batch and returns this process's share.

    Returns:
        Boolean ``(batch, h, w)`` on the CPU, True is visible.

    Raises:
        ValueError: everything or nothing would be hidden.
    """
    cells = math.prod(grid)
    _check_count(keep, cells)
    noise = rows(lambda n: torch.rand(n, cells, generator=generator), batch, generator)
    return visible_from_noise(noise, keep).unflatten(1, grid)


def visible_from_noise(noise: Tensor, keep: int) -> Tensor:
    """``(B, N)`` noise to a boolean ``(B, N)``: the ``keep`` smallest of every row are True."""
    chosen = noise.argsort(dim=1)[:, :keep]
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(1, chosen, True)


def block_mask(
    batch: int,
    grid: tuple[int, int],
    keep: int,
    generator: torch.Generator,
    min_cells: int = 16,
    min_aspect: float = 0.3,
) -> Tensor:
    """Masks whose hidden cells lie in random rectangles (BEiT, arXiv 2106.08254, Algorithm 1).

    Every sample has a random stream of its own, drawn from ``generator``; see :func:`hide_blocks`.

    Args:
        batch: masks wanted by this process.
        grid: rows and columns of cells.
        keep: visible cells of every mask.
        generator: a CPU generator; a ``ShardedGenerator`` draws for the global batch and returns this process's share.
        min_cells: smallest area of a rectangle, in cells.
        min_aspect: rectangles have a height over width between this and its inverse, uniform in the logarithm.

    Returns:
        Boolean ``(batch, h, w)`` on the CPU, True is visible.

    Raises:
        ValueError: everything or nothing would be hidden.
    """
    cells = math.prod(grid)
    _check_count(keep, cells)
    seeds = rows(lambda n: torch.randint(2**62, (n,), generator=generator), batch, generator)
    hidden = [hide_blocks(random.Random(seed), grid, cells - keep, min_cells, min_aspect) for seed in seeds.tolist()]
    return ~torch.stack(hidden) if hidden else torch.zeros(0, *grid, dtype=torch.bool)


def hide_blocks(
    stream: random.Random, grid: tuple[int, int], hide: int, min_cells: int = 16, min_aspect: float = 0.3
) -> Tensor:
    """One grid ``(h, w)`` with exactly ``hide`` True cells in rectangles drawn from ``stream``.

    A try counts if its rectangle is smaller than the grid both ways and adds at least one and at most the missing
    number of cells. After a thousand tries in a row without success (published code would go on for ever) the last
    cells are drawn one by one.
    """
    height, width = grid
    hidden = torch.zeros(height, width, dtype=torch.bool)
    log_aspect = (math.log(min_aspect), math.log(1 / min_aspect))
    missing, failed = hide, 0
    while missing and failed < 1000:
        area = stream.uniform(min_cells, missing)
        aspect = math.exp(stream.uniform(*log_aspect))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failed += 1
        if tall < height and wide < width:
            top, left = stream.randint(0, height - tall), stream.randint(0, width - wide)
            block = hidden[top : top + tall, left : left + wide]
            added = block.numel() - int(block.sum())
            if 0 < added <= missing:
                block.fill_(True)
                missing, failed = missing - added, 0
    if missing:
        free = (~hidden).flatten().nonzero().flatten().tolist()
        hidden.view(-1)[torch.tensor(stream.sample(free, missing))] = True
    return hidden


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images ``(B, C, H, W)`` to rows of patches ``(B, N, patch·patch·C)``, inside a patch row, column, channel.

    Raises:
        ValueError: the sides are no multiples of ``patch``.
    """
    _, _, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"an image of {height}x{width} pixels has no whole number of {patch}-pixel patches.")
    cells = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, p, w, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`: ``(B, N, patch·patch·C)`` on a grid of ``h x w`` to ``(B, C, h·p, w·p)``.

    Raises:
        ValueError: the number of patches is not ``h·w``, or their length no multiple of ``patch·patch``.
    """
    if patches.shape[1] != math.prod(grid) or patches.shape[2] % patch**2:
        raise ValueError(
            f"{patches.shape[1]} patches of {patches.shape[2]} values do not make a grid of {grid[0]}x{grid[1]} "
            f"patches of {patch}x{patch} pixels."
        )
    cells = patches.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalise_patches(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Patches with zero mean and unit variance, each over all its values jointly (MAE; SparK's regression target).

    The variance is the unbiased one. A constant patch becomes zeros.

    Args:
        patches: ``(…, L)``.
        eps: added to the variance.

    Returns:
        The normalised patches ``(…, L)``, and the ``mean`` and ``std = sqrt(variance + eps)``, both ``(…, 1)``, that
        undo it: ``normalised * std + mean``.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    std = (variance + eps).sqrt()
    return (patches - mean) / std, mean, std


def _check_count(keep: int, cells: int) -> None:
    if not 0 < keep < cells:
        raise ValueError(
            f"{keep} of {cells} cells would stay visible; at least one must be visible and at least one hidden: "
            "change the mask ratio, or use larger images."
        )


def grey_hidden(image: Tensor, visible: Tensor, patch: int) -> Tensor:
    """A picture ``(B, C, H, W)`` in [0, 1] with its hidden cells in grey, for looking at."""
    pixels = visible.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return torch.where(pixels, image, torch.full_like(image, 0.5))
