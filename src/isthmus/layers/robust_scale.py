"""The last step before a recording is decoded: every channel of every recording on a common, robust scale."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, NonNegative, Positive, checked
from isthmus.codec import part


def baseline(signal: Tensor, times: Tensor, start: float = -torch.inf, stop: float = 0.0) -> Tensor:
    """Take each channel's mean over ``start ≤ t < stop`` seconds away: ``(…, T)`` with times ``(T,)``.

    Raises:
        ValueError: no sample lies in that part.
    """
    part = (times >= start) & (times < stop)
    if not bool(part.any()):
        raise ValueError(f"the window has no sample between {start} and {stop} s to take as its baseline.")
    return signal - signal[..., part].mean(-1, keepdim=True)


@part
@checked
class RobustScale(nn.Module):
    """``clip((x - median) / interquartile range)``, fitted for each channel of each recording.

    Args:
        channels: C.
        recordings: how many, such as one for every subject; one serves all where it is 1.
        clip: largest magnitude that is let through.
        floor: interquartile ranges below this share of the recording's median one are raised to it, so that flat
            channels stay flat.
    """

    centre: Tensor
    scale: Tensor

    def __init__(
        self, channels: Count, recordings: Count = 1, clip: NonNegative = 20.0, floor: Positive = 1e-3
    ) -> None:
        super().__init__()
        self.clip, self.floor, self.fitted = clip, floor, False
        self.register_buffer("centre", torch.zeros(recordings, channels))
        self.register_buffer("scale", torch.ones(recordings, channels))

    @torch.no_grad()
    def fit(self, signal: Tensor, recording: Tensor | None = None) -> Self:
        """Learn from trials ``(N, C, T)`` of recordings ``(N,)``; a recording without trials keeps its scale.

        Raises:
            ValueError: another number of channels, or values that are not finite.
        """
        if signal.ndim != 3 or signal.shape[1] != self.centre.shape[1]:
            raise ValueError(f"the scale has {self.centre.shape[1]} channels, got a signal {tuple(signal.shape)}.")
        if not bool(torch.isfinite(signal).all()):
            raise ValueError("the signal has NaN or infinite samples; leave those trials out or interpolate them.")
        which = self._which(signal, recording)
        for one in which.unique().tolist():
            values = signal[which == one].transpose(0, 1).flatten(1).sort(1).values
            quarter, middle, three = (values[:, round(q * (values.shape[1] - 1))] for q in (0.25, 0.5, 0.75))
            spread = three - quarter
            usual = spread[spread > 0].median() if bool((spread > 0).any()) else torch.ones(())
            self.centre[one], self.scale[one] = middle, spread.clamp_min(float(self.floor * usual))
        self.fitted = True
        return self

    def forward(self, signal: Tensor, recording: Tensor | None = None) -> Tensor:
        """``(N, C, T)`` scaled and clipped. A recording numbered -1, of somebody unknown, gets the mean scale."""
        which = self._which(signal, recording)
        centre = torch.cat([self.centre, self.centre.mean(0, keepdim=True)])[which, :, None]
        scale = torch.cat([self.scale, self.scale.mean(0, keepdim=True)])[which, :, None]
        return ((signal - centre.to(signal)) / scale.to(signal)).clamp(-self.clip, self.clip)

    def _which(self, signal: Tensor, recording: Tensor | None) -> Tensor:
        count = len(self.centre)
        if recording is None or count == 1:
            return torch.zeros(len(signal), dtype=torch.int64, device=self.centre.device)
        if int(recording.min()) < -1 or int(recording.max()) >= count:
            raise ValueError(f"there are scales of {count} recordings, got number {int(recording.max())}.")
        return recording.to(self.centre.device)
