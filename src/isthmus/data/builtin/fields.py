"""``fields``: noise fields with a target made of products, for the question which interactions a layer can express.

A field has 16 channels of independent normal noise. With a, b, c, d four of them, each read at an offset of its own,
the target is a + ab + abc + abcd: every degree carries a quarter of its variance, and nothing below that degree tells
anything about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data.dataset import Drawn, pick_needs
from isthmus.data.hashing import normal, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("signal", "target", "terms", "mask")
#: Channel i enters the product at this place, (rows, columns) away.
OFFSETS = ((0, 0), (0, 2), (2, 0), (-2, 1))
#: Distance from the border within which places are not scored; no offset reaches further.
MARGIN = 3


class Fields(Drawn):
    """Field i is a function of (seed, split, i)."""

    def __init__(
        self, name: str, wanted: Sequence[str], channels: int, size: int, degrees: Sequence[int], count: int, seed: int
    ) -> None:
        super().__init__(name, _COLUMNS, wanted, count, seed, in_memory=True)
        self.channels, self.size, self.degrees = channels, size, tuple(degrees)

    def draw(self, indices: Sequence[int]) -> dict[str, Any]:
        shape = (len(indices), self.channels, self.size, self.size)
        noise = normal(words(self.seed, np.asarray(indices), 2 * int(np.prod(shape[1:]))), centred=True).reshape(shape)
        signal = torch.from_numpy(noise.astype(np.float32))
        factors = [signal[:, i].roll((-dy, -dx), (1, 2)) for i, (dy, dx) in enumerate(OFFSETS)]
        terms = torch.stack(factors, 1).cumprod(1)
        mask = torch.zeros(self.size, self.size, dtype=torch.int64)
        mask[MARGIN:-MARGIN, MARGIN:-MARGIN] = 1
        columns = {
            "signal": signal,
            "target": terms[:, [degree - 1 for degree in self.degrees]].sum(1),
            "terms": terms,
            "mask": mask.expand(len(indices), -1, -1),
        }
        return {name: columns[name] for name in self.wanted}


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    size: int = 12,
    channels: int = 16,
    degrees: str = "1234",
    count: int = 0,
    name: str = "fields",
) -> Fields:
    """Fields of ``size`` places a side; 6,400 for training and 64 in the other splits where ``count`` is 0.

    Columns: ``signal`` float32 ``(channels, size, size)``; ``target`` float32 ``(size, size)``, the sum of the terms of
    the ``degrees`` named; ``terms`` float32 ``(4, size, size)``: a, ab, abc, abcd; ``mask`` int64 ``(size, size)``, 1
    where a place is scored, 3 and more away from the border, because offsets wrap around it.
    """
    if size <= 2 * MARGIN:
        raise UserError(f"{name}: size {size} leaves no place {MARGIN} away from the border; give at least 7.")
    if channels < len(OFFSETS):
        raise UserError(f"{name}: the target reads {len(OFFSETS)} channels; {channels} are too few.")
    if not degrees or len(set(degrees)) < len(degrees) or set(degrees) - set("1234"):
        raise UserError(f"{name}: degrees {degrees!r}: write some of the digits 1 to 4, each once, such as 1234 or 3.")
    if count < 0:
        raise UserError(f"{name}: count must be positive, got {count}.")
    part = "+".join(check_split(name, split))
    many = count or (6400 if "train" in part or part == "all" else 64)
    chosen = [int(degree) for degree in degrees]
    wanted = pick_needs(name, needs, _COLUMNS)
    return Fields(name, wanted, channels, size, chosen, many, derive_seed("fields", part, seed))
