"""Responses of a cortex as sensors record them: evoked and induced activity, background, rhythm, noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.data.builtin.brain.cortex import NAMES, NETWORKS, Cortex, around, scattered
from isthmus.data.builtin.brain.sensors import Helmet, helmet

_CHUNK = 512  # trials whose source activity is in memory at once
_BACKGROUND, _RHYTHM = 40, 8


@dataclass(frozen=True)
class MEGSettings:
    """How a window around the onset of a stimulus is recorded.

    Attributes:
        sensors: how many of the 274.
        rate: samples a second.
        start, stop: of the window, seconds from the onset; the part before 0 is the baseline.
        duration: of the stimulus; its end is answered as well, 0.4 times as strong.
        jitter: sd of each trial's delay, seconds.
        widen: factor on the widths of the responses.
        evoked, induced: a response is multiplied by ``evoked + induced · cos(2π f t + phase)``, where the phase differs
            from trial to trial: the second part has no mean that a linear read-out could use.
        signal, background, rhythm, noise: sizes of the responses, of 1/f activity, of the 10 Hz rhythm at the back of
            the head, and of each sensor's own noise.
        gain: sd of the logarithm of each trial's strength.
        geometry: see :func:`isthmus.data.builtin.brain.sensors.helmet`.
    """

    sensors: int = 46
    rate: float = 40.0
    start: float = -0.1
    stop: float = 0.7
    duration: float = 0.5
    jitter: float = 0.03
    widen: float = 1.6
    evoked: float = 0.35
    induced: float = 1.5
    signal: float = 0.2
    background: float = 0.8
    rhythm: float = 0.3
    noise: float = 1.5
    gain: float = 0.2
    geometry: str = "auto"

    @property
    def times(self) -> Tensor:
        """Seconds from the onset, both ends included: ``(T,)``."""
        return self.start + torch.arange(round((self.stop - self.start) * self.rate) + 1) / self.rate


class Recorder:
    """The sensors around every subject of a cortex.

    Attributes:
        helmet: geometry and layout.
        leadfields: ``(S, C, J)``, each subject's of sd 1.
        frequency: ``(networks,)`` of the induced oscillation, 9 to 12.6 Hz.
    """

    def __init__(self, cortex: Cortex, settings: MEGSettings, generator: torch.Generator) -> None:
        self.cortex, self.settings = cortex, settings
        self.helmet: Helmet = helmet(settings.geometry, settings.sensors)
        fields = [
            self.helmet.leadfield(place, turn) for place, turn in zip(cortex.position, cortex.orientation, strict=True)
        ]
        self.leadfields = torch.stack([field / field.std() for field in fields])
        noise = [self.helmet.leadfield(*scattered(_BACKGROUND, generator))]
        noise += [self.helmet.leadfield(*around(_RHYTHM, NETWORKS["V1"].place, generator))]
        self._background, self._rhythm = (field / field.std() for field in noise)
        self.frequency = 9 + 3.6 * torch.rand(len(NAMES), generator=generator)

    def record(self, rates: Tensor, subject: int, generator: torch.Generator) -> Tensor:
        """Trials in which sources answer with rates ``(N, J)`` → ``(N, C, T)``, baseline corrected."""
        trials = [self._chunk(part, subject, generator) for part in rates.split(_CHUNK)]
        return torch.cat(trials) if trials else rates.new_zeros(0, self.settings.sensors, len(self.settings.times))

    def _chunk(self, rates: Tensor, subject: int, generator: torch.Generator) -> Tensor:
        s, cortex, times = self.settings, self.cortex, self.settings.times
        count, heard = len(rates), cortex.gain > 0
        delay = s.jitter * torch.randn(count, 1, 1, generator=generator)
        strength = (s.gain * torch.randn(count, 1, generator=generator)).exp()
        phase = 2 * math.pi * torch.rand(count, len(NAMES), 1, generator=generator)
        since = times - cortex.latency[heard, None] - delay  # (N, J, T)
        width = s.widen * cortex.width[heard, None]
        bump = (-0.5 * (since / width).square()).exp() + 0.4 * (-0.5 * ((since - s.duration) / width).square()).exp()
        carrier = s.evoked + s.induced * torch.cos(2 * math.pi * self.frequency[:, None] * times + phase)
        active = (rates * strength)[:, heard, None] * bump * carrier[:, cortex.network[heard]]
        signal = s.signal * (self.leadfields[subject][:, heard] @ active)
        signal = signal + s.background / _BACKGROUND**0.5 * (self._background @ self._pink(count, generator))
        signal = signal + s.rhythm / _RHYTHM**0.5 * (self._rhythm @ self._alpha(count, generator))
        signal = signal + s.noise * torch.randn(signal.shape, generator=generator)
        before = times < 0
        return signal - signal[..., before].mean(-1, keepdim=True) if bool(before.any()) else signal

    def _pink(self, count: int, generator: torch.Generator) -> Tensor:
        """Activity whose power falls as 1/f, of sd 1, cut out of twice its length so that its ends do not meet."""
        length = len(self.settings.times)
        white = torch.randn(count, _BACKGROUND, 2 * length, generator=generator)
        spectrum = torch.fft.rfft(white)
        shape = torch.arange(spectrum.shape[-1]).clamp_min(1).rsqrt()
        pink = torch.fft.irfft(spectrum * shape, n=2 * length)[..., :length]
        return pink / shape[1:].square().mean().sqrt()

    def _alpha(self, count: int, generator: torch.Generator) -> Tensor:
        """The resting rhythm: 10 Hz with a phase and an amplitude of its own in every trial and source."""
        draws = torch.rand(2, count, _RHYTHM, 1, generator=generator)
        return 2 * draws[0] * torch.cos(2 * math.pi * (10 * self.settings.times + draws[1]))
