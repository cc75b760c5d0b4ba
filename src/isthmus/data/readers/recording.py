"""Trials of one recording, and what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError
from isthmus.data.splits import PARTS

EXTRAS = ("subject", "label", "latent", "stimulus", "image", "low", "split")
NUMBERED = ("subject", "label", "stimulus")


@dataclass(frozen=True)
class Recording:
    """Trials of one recording.

    Attributes:
        signal: float32 ``(N, C, T)``.
        times: ``(T,)`` seconds from the onset.
        positions: ``(C, 2)`` in [0, 1]; (-0.1, -0.1) where a sensor's place is unknown.
        columns: what is known of every trial: label, latent, stimulus, image, subject.
        classes: names of the labels.
        words: what the numbers of a column stand for, where it held words.
        continuous: the whole is one stretch of time and not trials.
    """

    signal: Tensor
    times: Tensor
    positions: Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continuous: bool = False

    @property
    def rate(self) -> float:
        """Samples a second."""
        return (len(self.times) - 1) / float(self.times[-1] - self.times[0])

    def at(self, times: Tensor) -> Recording:
        """The same trials sampled at other times, low-passed before where those are further apart.

        Raises:
            UserError: the recording does not reach that far.
        """
        if len(times) == len(self.times) and torch.allclose(times, self.times, atol=1e-4):
            return replace(self, times=times)
        step = float(times[1] - times[0])
        if float(times[0]) < float(self.times[0]) - step or float(times[-1]) > float(self.times[-1]) + step:
            raise UserError(
                f"the recording covers {self.times[0]:.3f} to {self.times[-1]:.3f} s, and {times[0]:.3f} to "
                f"{times[-1]:.3f} s are needed; cut longer epochs."
            )
        from scipy.signal import resample_poly

        ratio = Fraction(1 / step / self.rate).limit_denominator(1000)
        signal, at = self.signal.numpy(), self.times.double().numpy()
        if ratio < 1:  # fewer samples: what lies above the new Nyquist frequency has to go first
            ends = signal[..., :1]  # the filter takes what is outside for zero
            signal = resample_poly(signal - ends, ratio.numerator, ratio.denominator, axis=-1, padtype="line") + ends
            at = at[0] + np.arange(signal.shape[-1]) / (self.rate * float(ratio))
        place = np.interp(times.double().numpy(), at, np.arange(len(at)))
        low = np.clip(place.astype(int), 0, len(at) - 2)
        share = (place - low).astype(np.float32)
        mixed = signal[..., low] * (1 - share) + signal[..., low + 1] * share
        return replace(self, signal=torch.from_numpy(np.ascontiguousarray(mixed, np.float32)), times=times)


def read_columns(given: Mapping[str, Any], count: int, where: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Numbers as tensors, words as lists, each with an entry for every trial; and the words that became numbers."""
    columns: dict[str, Any] = {}
    words: dict[str, tuple[str, ...]] = {}
    for name, values in given.items():
        array = np.asarray(values)
        if array.ndim == 0:
            array = np.full(count, array)
        if len(array) != count:
            raise UserError(f"{where}: there are {count} trials, and {name} has {len(array)} entries.")
        if array.dtype.kind in "US":
            columns[name] = [str(word) for word in array]
        elif array.dtype.kind == "O":
            columns[name] = torch.as_tensor(np.stack([np.asarray(row, np.float32) for row in array]))
        else:
            columns[name] = torch.as_tensor(array)
    for name in NUMBERED:
        if isinstance(columns.get(name), list):
            words[name] = tuple(sorted(set(columns[name])))
            place = {word: number for number, word in enumerate(words[name])}
            columns[name] = torch.tensor([place[word] for word in columns[name]])
        elif name in columns:
            columns[name] = columns[name].long()
    if unknown := set(columns.get("split", ())) - set(PARTS):
        raise UserError(f"{where}: split says {sorted(map(str, unknown))[0]!r}; it may say {', '.join(PARTS)}.")
    return columns, words
