"""``random:SIZE``: noise of a given shape with every column, to try a job before the real data is there.

``random:224`` gives 3×224×224, ``random:3x32x48`` channels, height and width. Nothing can be learnt from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data.dataset import Dataset, pick_needs
from isthmus.data.hashing import below, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("image", "label", "mask", "boxes", "labels", "caption", "subject")
_MOST_BOXES = 4


class Noise(Dataset):
    """Uniform random pixels, labels, masks, boxes, captions and subjects, each a function of seed and number."""

    def __init__(
        self, name: str, wanted: Sequence[str], shape: tuple[int, int, int], classes: int, count: int, seed: int
    ) -> None:
        super().__init__(name, _COLUMNS, [str(i) for i in range(classes)], shape[1:])
        self.wanted, self.shape, self.count, self.seed = tuple(wanted), shape, count, seed

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, Any]:
        return {column: getattr(self, f"_{column}")(index) for column in self.wanted}

    def _words(self, index: int, column: str, count: int) -> np.ndarray:
        return words(derive_seed(self.seed, column), [index], count)[0]

    def _number(self, index: int, column: str, bound: int) -> torch.Tensor:
        return torch.tensor(int(below(self._words(index, column, 1), bound)[0]))

    def _image(self, index: int) -> torch.Tensor:
        size = int(np.prod(self.shape))
        noise = self._words(index, "image", -(-size // 8)).astype("<u8").view(np.uint8)[:size]
        return torch.from_numpy(noise.reshape(self.shape).copy())

    def _label(self, index: int) -> torch.Tensor:
        return self._number(index, "label", len(self.classes or ()))

    def _subject(self, index: int) -> torch.Tensor:
        return self._number(index, "subject", 4)

    def _mask(self, index: int) -> torch.Tensor:
        height, width = self.shape[1:]
        draws = self._words(index, "mask", height * width)
        return torch.from_numpy(below(draws, len(self.classes or ())).reshape(height, width))

    def _boxes(self, index: int) -> torch.Tensor:
        draws = self._words(index, "boxes", 4 * _MOST_BOXES).reshape(_MOST_BOXES, 4)[: len(self._labels(index))]
        ends = np.array([self.shape[2], self.shape[1]] * 2)
        first, second = np.split(below(draws, ends), 2, axis=1)
        corners = np.concatenate([np.minimum(first, second), np.maximum(first, second) + 1], axis=1)
        return torch.from_numpy(corners.astype(np.float32))

    def _labels(self, index: int) -> torch.Tensor:
        draws = self._words(index, "labels", 1 + _MOST_BOXES)
        many = 1 + int(below(draws[:1], _MOST_BOXES)[0])
        return torch.from_numpy(below(draws[1 : 1 + many], len(self.classes or ())))

    def _caption(self, index: int) -> str:
        return f"noise number {int(self._number(index, 'caption', 10000))}"


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    size: str = "32",
    classes: int = 10,
    count: int = 10000,
    name: str = "random",
) -> Noise:
    """Noise of shape ``size`` (``H``, ``HxW`` or ``CxHxW``), ``count`` samples a split, labels below ``classes``."""
    try:
        numbers = [int(number) for number in str(size).lower().split("x")]
        shape = {1: (3, *numbers * 2), 2: (3, *numbers), 3: tuple(numbers)}[len(numbers)]
    except (ValueError, KeyError):
        shape = (0,)
    if min(shape) < 1:
        raise UserError(f"{name}: {size!r} is no shape; write random:224, random:32x48 or random:1x28x28.")
    if classes < 1 or count < 1:
        raise UserError(f"{name}: classes and count must be at least 1, got {classes} and {count}.")
    part = "+".join(check_split(name, split))
    return Noise(name, pick_needs(name, needs, _COLUMNS), shape, classes, count, derive_seed("random", part, seed))  # type: ignore[arg-type]
