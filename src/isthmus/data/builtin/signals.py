"""``signals``: drawn series whose class lies in their timing, near or far.

``signals`` are two bumps in white noise whose distance is the class; ``signals:sinusoids`` sums of sinusoids in noise
whose slowest common period is the class, under drifts and other tones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.dataset import Drawn, pick_needs
from isthmus.data.hashing import normal, unit, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("signal", "label")
DISTANCES = (100, 250, 450, 700)  # of 1024: between the two bumps
PERIODS = (24, 29, 35, 42)  # of 128: of the sum of sinusoids
_LENGTHS = {"bumps": 1024, "sinusoids": 128}
_NOISE = 1.0  # deviation of the noise of sinusoids


class Signals(Drawn):
    """Series i is a function of (seed, split, i): ``signal`` float32 ``(1, L)``, ``label``; classes take turns."""

    def __init__(self, name: str, wanted: Sequence[str], kind: str, length: int, count: int, seed: int) -> None:
        values = DISTANCES if kind == "bumps" else PERIODS
        super().__init__(name, _COLUMNS, wanted, count, seed, [str(round(v * length / _LENGTHS[kind])) for v in values])
        self.kind, self.length = kind, length

    def draw(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        label = np.asarray(indices, dtype=np.int64) % 4
        data: dict[str, torch.Tensor] = {"label": torch.from_numpy(label)}
        if "signal" in self.wanted:
            draw = _bumps if self.kind == "bumps" else _sinusoids
            series = draw(self.seed, indices, label, self.length)
            data["signal"] = torch.from_numpy((np.round(series * 4096) / 4096).astype(np.float32))[:, None]
        return {column: data[column] for column in self.wanted}


def _bumps(seed: int, indices: Sequence[int], label: np.ndarray, length: int) -> np.ndarray:
    """``(N, L)``: unit white noise and two Gaussian bumps, of width 12 and height 1.5 where the length is 1024."""
    scale = length / _LENGTHS["bumps"]
    width, apart = 12 * scale, np.asarray(DISTANCES)[label] * scale
    room = length - apart - 4 * width
    first = 2 * width + unit(words(derive_seed(seed, "offset"), indices, 1))[:, 0] * room
    t = np.arange(length)
    series = normal(words(derive_seed(seed, "noise"), indices, 2 * length))
    for centre in (first, first + apart):
        series += 1.5 * exact.exp(-0.5 * ((t - centre[:, None]) / width) ** 2)
    return series


def _sinusoids(seed: int, indices: Sequence[int], label: np.ndarray, length: int) -> np.ndarray:
    """``(N, L)``: a fundamental and two harmonics of random weights and phases, a drift, and white noise."""
    drawn = unit(words(derive_seed(seed, "sinusoids"), indices, 9))
    period = np.asarray(PERIODS)[label] * (length / _LENGTHS["sinusoids"]) * (0.97 + 0.06 * drawn[:, 0])
    t = np.arange(length) / length
    series = np.zeros((len(label), length))
    for harmonic in (1, 2, 3):
        weight, phase = (0.5 + drawn[:, 2 * harmonic - 1]) / harmonic, 2 * np.pi * drawn[:, 2 * harmonic]
        turns = harmonic * length / period
        series += weight[:, None] * exact.sin(2 * np.pi * turns[:, None] * t + phase[:, None])
    drift = 2 * (drawn[:, 7:8] - 0.5) * t + drawn[:, 8:9] * exact.sin(np.pi * t)
    return series + drift + _NOISE * normal(words(derive_seed(seed, "noise"), indices, 2 * length))


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    kind: str = "bumps",
    length: int = 0,
    count: int = 0,
    name: str = "signals",
) -> Signals:
    """Series of ``length`` samples (bumps 1024, sinusoids 128); ``count`` of them, 600 a split otherwise."""
    if kind not in _LENGTHS:
        raise UserError(f"{name}: kind {kind!r} is none of {', '.join(_LENGTHS)}.")
    if count < 0 or (length and length < 64):
        raise UserError(f"{name}: length must be at least 64 and count at least 0, got {length} and {count}.")
    part = "+".join(check_split(name, split))
    wanted = pick_needs(name, needs, _COLUMNS)
    return Signals(name, wanted, kind, length or _LENGTHS[kind], count or 600, derive_seed("signals", kind, part, seed))
