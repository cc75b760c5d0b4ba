"""``textures``: oriented noise in eight classes, four directions and two frequencies, for questions of scale and shift.

A picture is band-passed noise along the direction of its class, hidden in smooth and in white noise; any crop of it
shows the class as well as any other. Fourier transforms in double precision are rounded to whole grey levels: machines
that round the former differently would disagree about one pixel in 10^10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.dataset import Dataset, pick_needs
from isthmus.data.hashing import normal, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("image", "label")
_DIRECTIONS, _FREQUENCIES = (0.0, 45.0, 90.0, 135.0), (0.10, 0.17)  # degrees; cycles a pixel
_CLASSES = [f"{direction:g}° {name}" for name in ("coarse", "fine") for direction in _DIRECTIONS]
_BAND, _SMOOTH = 0.02, 0.03  # widths of the band and of the smooth noise, cycles a pixel
_WEIGHTS = (0.22, 0.60, 0.75)  # of the oriented, the smooth and the white noise, each of unit deviation
_GREY, _CONTRAST = 0.5, 0.16
_MOST_BYTES = 64 * 2**20


class Textures(Dataset):
    """Picture i is a function of (seed, split, i); classes take turns."""

    def __init__(self, name: str, wanted: Sequence[str], size: int, count: int, seed: int) -> None:
        super().__init__(name, _COLUMNS, _CLASSES, (size, size))
        self.wanted, self.size, self.count, self.seed = tuple(wanted), size, count, seed
        self._made: dict[int, torch.Tensor] = {}  # grey pictures, while they are few

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, Any]:
        label = index % len(_CLASSES)
        sample: dict[str, Any] = {"label": torch.tensor(label)}
        if "image" in self.wanted:
            grey = self._made.get(index)
            if grey is None:
                grey = torch.from_numpy(self._image(index, label))[None]
                if (len(self._made) + 1) * grey.numel() <= _MOST_BYTES:
                    self._made[index] = grey
            sample["image"] = grey.repeat(3, 1, 1)
        return {column: sample[column] for column in self.wanted}

    def _image(self, index: int, label: int) -> np.ndarray:
        size = self.size
        numbers = normal(words(self.seed, [index], 4 * size * size + 4)[0], centred=True)
        turn, stretch, noise = numbers[0], numbers[1], numbers[2 : 2 + 2 * size * size].reshape(2, size, size)
        angle = np.deg2rad(_DIRECTIONS[label % 4]) + 0.12 * turn
        frequency = _FREQUENCIES[label // 4] * (1 + 0.06 * stretch)
        v, u = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
        spectrum = np.fft.rfft2(noise)
        band = _bump(u, v, frequency * exact.cos(angle), frequency * exact.sin(angle), _BAND)
        parts = (_back(spectrum[0] * band, size), _back(spectrum[1] * _bump(u, v, 0, 0, _SMOOTH), size))
        white = normal(words(derive_seed(self.seed, "white"), [index], 2 * size * size)[0], centred=True).reshape(
            size, size
        )
        mixed = sum(w * part for w, part in zip(_WEIGHTS, (*parts, white), strict=True))
        return np.clip(np.round(255 * (_GREY + _CONTRAST * mixed)), 0, 255).astype(np.uint8)


def _bump(u: np.ndarray, v: np.ndarray, x: float, y: float, width: float) -> np.ndarray:
    """A Gaussian round ±(x, y) in the frequency plane."""
    here, there = (exact.exp(-((u - s * x) ** 2 + (v - s * y) ** 2) / (2 * width**2)) for s in (1, -1))
    return here + there


def _back(spectrum: np.ndarray, size: int) -> np.ndarray:
    picture = np.fft.irfft2(spectrum, (size, size))
    return (picture - picture.mean()) / max(picture.std(), 1e-9)


def load(
    split: str, needs: Sequence[str], seed: int, *, size: int = 98, count: int = 0, name: str = "textures"
) -> Textures:
    """Pictures of ``size`` pixels a side; ``count`` of them, 1,500 for training and 500 in the other splits otherwise.

    Columns: ``image`` (grey in three channels), ``label`` 0 to 7: direction and frequency.
    """
    if size < 8:
        raise UserError(f"{name}: size must be at least 8, got {size}.")
    if count < 0:
        raise UserError(f"{name}: count must be positive, got {count}.")
    part = "+".join(check_split(name, split))
    many = count or (1500 if "train" in part or part == "all" else 500)
    return Textures(name, pick_needs(name, needs, _COLUMNS), size, many, derive_seed("textures", part, seed))
