"""``discs``: one soft disc on black, every combination of five colours, four radii and six by six places once.

The world in which the recipe of latent quantisation is tried: 720 pictures whose causes are known and independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.dataset import Memory, pick_needs
from isthmus.data.splits import divide, row_fractions

COLOURS = ((1.0, 0.2, 0.2), (0.2, 1.0, 0.2), (0.2, 0.3, 1.0), (1.0, 1.0, 0.2), (0.9, 0.3, 0.9))
RADII = (1.5, 2.3, 3.1, 3.9)  # in sixteenths of a side, like the places and the edge
PLACES = (4.0, 5.6, 7.2, 8.8, 10.4, 12.0)
EDGE = 0.5
FACTORS = ("colour", "radius", "y", "x")


class Discs(Memory):
    """``image`` uint8 ``(3, size, size)``, ``label`` the colour, ``factors`` int64 ``(4,)``: positions in the lists."""

    factor_names = FACTORS


def load(split: str, needs: Sequence[str], seed: int, *, size: int = 16, name: str = "discs") -> Discs:
    """All discs, or the part of them that a split holds (80, 10 and 10 %); nothing is drawn at random.

    Args:
        split: ``train``, ``val``, ``test``, joined by ``+``, or ``all``.
        needs: columns, see :class:`Discs`.
        seed: changes nothing.
        size: pixels of a side.
        name: for messages.

    Raises:
        UserError: an unknown column, or a size below 8.
    """
    if size < 8:
        raise UserError(f"{name}: size must be at least 8, got {size}.")
    columns = ("image", "label", "factors")
    wanted = pick_needs(name, needs, columns)
    every = torch.cartesian_prod(*(torch.arange(len(each)) for each in (COLOURS, RADII, PLACES, PLACES)))
    factors = every[torch.from_numpy(divide([None] * len(every), split, row_fractions("discs", len(every))))]
    data = {"label": factors[:, 0], "factors": factors}
    if "image" in wanted:
        data["image"] = draw(factors, size)
    return Discs(name, {column: data[column] for column in wanted}, columns, [str(i) for i in range(len(COLOURS))])


def draw(factors: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures ``(N, 3, size, size)``, uint8, of factors ``(N, 4)``."""
    colour, radius, row, column = factors.numpy().T
    places, grid = np.array(PLACES), (np.arange(size) + 0.5) * 16 / size
    down = grid[None, :, None] - places[row][:, None, None]
    right = grid[None, None, :] - places[column][:, None, None]
    inside = np.array(RADII)[radius][:, None, None] - np.sqrt(down * down + right * right)
    shade = exact.sigmoid(inside / EDGE)[:, None] * np.array(COLOURS)[colour][:, :, None, None]
    return torch.from_numpy(np.round(shade * 255).astype(np.uint8))
