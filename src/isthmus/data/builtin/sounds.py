"""``sounds``: a second of drawn sound. Events of eight kinds, or two clicks whose distance in time is the class.

``sounds`` holds three to five short events of one kind in light noise, each at a time and a pitch of its own;
``sounds:clicks`` two clicks or chirps in noise, at one of four distances and anywhere in the clip. What tells the first
apart are the spectra of moments, what tells the second apart lies far away in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.dataset import Drawn, pick_needs
from isthmus.data.hashing import below, normal, unit, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("audio", "label")
EVENTS = (
    *("steady tone", "rising chirp", "falling chirp", "noise burst"),
    *("harmonic stack", "amplitude modulation", "frequency modulation", "click train"),
)
DISTANCES = (0.12, 0.24, 0.36, 0.48)  # seconds between the two clicks
_MOST = 5  # events a clip


class Sounds(Drawn):
    """Clip i is a function of (seed, split, i): ``audio`` float32 ``(L,)`` in [-1, 1], rounded to 16 bits; ``label``.

    Attributes:
        rate: samples a second.
    """

    def __init__(self, name: str, wanted: Sequence[str], kind: str, rate: int, count: int, seed: int) -> None:
        classes = EVENTS if kind == "events" else [f"{1000 * distance:.0f} ms" for distance in DISTANCES]
        super().__init__(name, _COLUMNS, wanted, count, seed, classes)
        self.kind, self.rate = kind, rate

    def draw(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        label = np.asarray(indices, dtype=np.int64) % len(self.classes or ())
        data: dict[str, torch.Tensor] = {"label": torch.from_numpy(label)}
        if "audio" in self.wanted:
            draw = _events if self.kind == "events" else _clicks
            wave = draw(self.seed, indices, label, self.rate)
            peak = np.abs(wave).max(1, keepdims=True)
            wave = np.round(wave / np.maximum(peak, 1.0) * 32767)
            data["audio"] = torch.from_numpy((wave / 32768).astype(np.float32))
        return {column: data[column] for column in self.wanted}


def _noise(seed: int, name: str, indices: Sequence[int], length: int) -> np.ndarray:
    return normal(words(derive_seed(seed, name), indices, 2 * length))


def _events(seed: int, indices: Sequence[int], label: np.ndarray, rate: int) -> np.ndarray:
    """``(N, rate)``: three to five events of 60 to 120 ms, with a fundamental of 200 to 400 Hz."""
    many = 3 + below(words(derive_seed(seed, "many"), indices, 1)[:, 0], _MOST - 2)
    drawn = unit(words(derive_seed(seed, "events"), indices, 5 * _MOST)).reshape(len(label), _MOST, 5)
    wave = 0.02 * _noise(seed, "hiss", indices, rate)
    burst = _noise(seed, "burst", indices, rate)
    for row, kind in enumerate(label):
        for start, length, pitch, loud, phase in drawn[row, : many[row]]:
            size = int(rate * (0.06 + 0.06 * length))
            first = int(start * (rate - size))
            t = np.arange(size) / rate
            sound = _KINDS[EVENTS[kind]](t, 200 * _octaves(pitch), 2 * np.pi * phase, burst[row, first : first + size])
            wave[row, first : first + size] += (0.15 + 0.25 * loud) * _window(size) * sound
    return wave


def _window(size: int) -> np.ndarray:
    """One arch of a cosine, from 0 to 0 (Hann)."""
    return 0.5 + 0.5 * exact.cos(np.pi * np.arange(1 - size, size, 2) / (size - 1))


def _octaves(number: float) -> float:
    return float(exact.exp(number * math.log(2)))


def _swept(t: np.ndarray, frequency: np.ndarray, phase: float) -> np.ndarray:
    """A tone whose frequency in Hz is given at every moment."""
    step = t[1] - t[0] if len(t) > 1 else 0.0
    return exact.sin(2 * np.pi * np.cumsum(frequency) * step + phase)


def _harmonics(t: np.ndarray, f: float, phase: float, noise: np.ndarray) -> np.ndarray:
    orders = np.arange(1, 7)[:, None]
    return (exact.sin(2 * np.pi * f * orders * t + phase * orders) / orders).sum(0) / 1.5


def _beats(t: np.ndarray, phase: float) -> np.ndarray:
    return exact.sin(2 * np.pi * 40 * t + phase)


#: Kind → samples at times t (seconds), for a fundamental f (Hz), a phase and noise of unit deviation.
_KINDS: dict[str, Callable[[np.ndarray, float, float, np.ndarray], np.ndarray]] = {
    "steady tone": lambda t, f, p, n: exact.sin(2 * np.pi * 3 * f * t + p),
    "rising chirp": lambda t, f, p, n: _swept(t, 3 * f * np.linspace(0.6, 1.6, len(t)), p),
    "falling chirp": lambda t, f, p, n: _swept(t, 3 * f * np.linspace(1.6, 0.6, len(t)), p),
    "noise burst": lambda t, f, p, n: 0.5 * n,
    "harmonic stack": _harmonics,
    "amplitude modulation": lambda t, f, p, n: exact.sin(2 * np.pi * 3 * f * t) * (0.5 + 0.5 * _beats(t, p)),
    "frequency modulation": lambda t, f, p, n: _swept(t, 3 * f * (1 + 0.3 * _beats(t, p)), 0.0),
    "click train": lambda t, f, p, n: np.where((t * f / 4 + p) % 1 < 0.05, 1.0, 0.0) * np.sign(n),
}


def _clicks(seed: int, indices: Sequence[int], label: np.ndarray, rate: int) -> np.ndarray:
    """``(N, rate)``: two bursts of 10 ms, each a click or a chirp, at the distance of the class ±2 %."""
    drawn = unit(words(derive_seed(seed, "clicks"), indices, 8))
    wave = 0.01 * _noise(seed, "hiss", indices, rate)
    size = rate // 100
    t = np.arange(size) / rate
    for row, kind in enumerate(label):
        apart = DISTANCES[kind] * (0.98 + 0.04 * drawn[row, 0])
        first = drawn[row, 1] * (1 - apart - 0.01)
        for moment, (chirped, pitch, loud) in zip((first, first + apart), drawn[row, 2:].reshape(2, 3), strict=True):
            frequency = rate / 8 * _octaves(pitch - 0.5)
            rise = 1.5 if chirped < 0.5 else 0.0
            burst = _swept(t, frequency * (1 + rise * np.linspace(-0.3, 0.6, size)), 0.0) * exact.exp(-t * 300)
            start = int(moment * rate)
            wave[row, start : start + size] += (0.4 + 0.3 * loud) * burst
    return wave


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    kind: str = "events",
    rate: int = 8000,
    count: int = 0,
    name: str = "sounds",
) -> Sounds:
    """Clips of a second, ``rate`` samples each; ``count`` of them, 600 for training and 300 in the other splits."""
    if kind not in ("events", "clicks"):
        raise UserError(f"{name}: kind {kind!r} is neither events nor clicks.")
    if rate < 2000 or count < 0:
        raise UserError(f"{name}: rate must be at least 2000 and count at least 0, got {rate} and {count}.")
    part = "+".join(check_split(name, split))
    many = count or (600 if "train" in part or part == "all" else 300)
    return Sounds(name, pick_needs(name, needs, _COLUMNS), kind, rate, many, derive_seed("sounds", kind, part, seed))
