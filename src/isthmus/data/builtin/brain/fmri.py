"""Responses of a cortex as functional MRI shows them: an amplitude a voxel, or a slow signal of every network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Gamma

from isthmus.data.builtin.brain.cortex import NAMES, Cortex

_SHARED = 8
"""Components of noise that all voxels have in common."""


@dataclass(frozen=True)
class FMRISettings:
    """How voxels are measured.

    Attributes:
        voxels: of every subject; one number, or one for each.
        ceiling: mean share of a voxel's variance that the stimulus explains in one trial; 0 in the auditory network.
        repeats: presentations that an amplitude is averaged over.
        tr: seconds a volume.
        gap: seconds from one stimulus to the next.
        drift, persistence: size of slow drifts, and the AR(1) coefficient of noise in time.
    """

    voxels: int | tuple[int, ...] = 300
    ceiling: float = 0.25
    repeats: int = 1
    tr: float = 2.0
    gap: float = 4.0
    drift: float = 0.5
    persistence: float = 0.4


class Scanner:
    """The voxels of every subject: each mixes five sources of one network.

    Attributes:
        mix: for every subject ``(V, J)``; ``network`` ``(V,)``; ``ceiling`` ``(V,)``, explained share of variance.
    """

    def __init__(self, cortex: Cortex, settings: FMRISettings, generator: torch.Generator) -> None:
        self.cortex, self.settings = cortex, settings
        subjects, sources = cortex.position.shape[:2]
        counts = [settings.voxels] * subjects if isinstance(settings.voxels, int) else list(settings.voxels)
        if len(counts) != subjects or min(counts) < 1:
            raise ValueError(f"voxels must be one number, or one for each of {subjects} subjects, got {counts}.")
        self.mix: list[Tensor] = []
        self.network: list[Tensor] = []
        self.ceiling: list[Tensor] = []
        self.delay: list[Tensor] = []
        for voxels in counts:
            home = torch.randint(sources, (voxels,), generator=generator)
            network = cortex.network[home]
            near = (cortex.network == network[:, None]).float()
            chosen = torch.multinomial(near, 5, generator=generator)
            weight = torch.rand(voxels, 5, generator=generator)
            self.mix.append(torch.zeros(voxels, sources).scatter_(1, chosen, weight / weight.sum(1, keepdim=True)))
            share = _beta(settings.ceiling, voxels, generator)
            self.ceiling.append(share.masked_fill(cortex.gain[home] == 0, 0.0))
            self.network.append(network)
            self.delay.append(0.5 * torch.randn(voxels, generator=generator))

    def beta(self, rates: Tensor, subject: int, generator: torch.Generator) -> Tensor:
        """Amplitudes of trials with rates ``(N, J)``: ``(N, V)``, standardised signal plus noise, over the repeats."""
        clean = self.clean(rates, subject)
        share = self.ceiling[subject].clamp(1e-3, 1 - 1e-3)
        sd = ((1 - share) / share).sqrt().where(self.ceiling[subject] > 0, torch.ones_like(share))
        noise = torch.zeros_like(clean)
        for _ in range(self.settings.repeats):
            own = torch.randn(clean.shape, generator=generator)
            common = torch.randn(len(clean), _SHARED, generator=generator)
            spread = torch.randn(_SHARED, clean.shape[1], generator=generator) / _SHARED**0.5
            noise += 0.9 * own + 0.436 * common @ spread  # variances .81 and .19
        return clean + sd * noise / self.settings.repeats

    def clean(self, rates: Tensor, subject: int) -> Tensor:
        """Amplitudes without noise ``(N, V)``, standardised by what stimuli in general evoke; 0 where none is."""
        mean, sd = self._scale(subject)
        mixed = (rates @ self.mix[subject].mT - mean) / sd
        return mixed.masked_fill(self.ceiling[subject] == 0, 0.0)

    def _scale(self, subject: int) -> tuple[Tensor, Tensor]:
        """Mean and sd of every voxel over a fixed set of latents, so that one trial is scaled as a thousand are."""
        drawn = torch.Generator().manual_seed(14)
        latent = torch.randn(1000, self.cortex.weights.shape[2], generator=drawn)
        latent = F.normalize(latent, dim=1) * latent.shape[1] ** 0.5
        low = torch.randn(1000, self.cortex.low_weights.shape[2], generator=drawn)
        mixed = self.cortex.rates(latent, low, subject) @ self.mix[subject].mT
        return mixed.mean(0), mixed.std(0).clamp_min(1e-6)

    def volumes(self, events: int) -> int:
        """Volumes of a run with so many events, 20 s of rest at its end."""
        return int((events * self.settings.gap + 20) / self.settings.tr)

    def bold(self, rates: Tensor, subject: int, generator: torch.Generator) -> Tensor:
        """The signal of one run in which events ``(E, J)`` follow each other every ``gap`` s: ``(T, V)``."""
        clean = self.clean(rates, subject) @ torch.eye(self.mix[subject].shape[0])
        design = self.design(len(rates), self.delay[subject])
        signal = torch.einsum("vte,ev->tv", design, clean)
        share = self.ceiling[subject].clamp(1e-3, 1 - 1e-3)
        sd = ((1 - share) / share).sqrt() * design[0].norm(dim=0).mean()
        shocks = torch.randn(signal.shape, generator=generator)
        keep, noise = self.settings.persistence, torch.empty_like(signal)
        noise[0] = shocks[0]
        for t in range(1, len(noise)):  # each volume remembers the one before
            noise[t] = keep * noise[t - 1] + (1 - keep**2) ** 0.5 * shocks[t]
        slow = _cosines(len(signal), 3) @ torch.randn(3, signal.shape[1], generator=generator)
        return signal + sd * (noise + self.settings.drift * slow)

    def estimate(self, bold: Tensor, events: int) -> Tensor:
        """Amplitudes of events by a general linear model with drifts and a constant: ``(T, V)`` → ``(E, V)``."""
        shape = self.design(events, torch.zeros(1))[0]
        model = torch.cat([shape, _cosines(len(bold), 3), torch.ones(len(bold), 1)], 1)
        return torch.linalg.lstsq(model.double(), bold.double()).solution[:events].to(bold.dtype)

    def parcels(self, bold: Tensor, subject: int) -> Tensor:
        """Means of the voxels of every network: ``(T, V)`` → ``(T, networks)``; 0 where a network has no voxel."""
        belongs = F.one_hot(self.network[subject], len(NAMES)).to(bold.dtype)
        return bold @ belongs / belongs.sum(0).clamp_min(1)

    def design(self, events: int, delay: Tensor) -> Tensor:
        """Expected courses ``(V, T, E)`` of events, for voxels that answer later by ``delay`` ``(V,)`` seconds."""
        times = torch.arange(self.volumes(events)) * self.settings.tr
        since = times[:, None] - torch.arange(events) * self.settings.gap
        return haemodynamic(since - delay[:, None, None])


def haemodynamic(seconds: Tensor) -> Tensor:
    """The double gamma: a peak 5 s after the event and an undershoot of a sixth at 15 s; 0 before the event."""
    late = seconds.clamp_min(1e-6)
    up, down = (Gamma(torch.tensor(a), torch.tensor(1.0)).log_prob(late).exp() for a in (6.0, 16.0))
    return (up - down / 6).masked_fill(seconds <= 0, 0.0) / 0.1755  # the peak is 1


def _cosines(length: int, count: int) -> Tensor:
    """Slow drifts ``(length, count)``: half a period, one, one and a half over the run."""
    line = (torch.arange(length) + 0.5) / length * torch.pi
    return torch.cos(line[:, None] * torch.arange(1, count + 1))


def _beta(mean: float, count: int, generator: torch.Generator) -> Tensor:
    """Draws of Beta(4·mean, 4·(1 − mean)), from sums of exponentials so that a generator decides."""
    if not 0 < mean < 1:
        raise ValueError(f"the mean ceiling of voxels must lie between 0 and 1, got {mean}.")
    ones = torch.ones(count)
    first, second = (torch._standard_gamma(4 * share * ones, generator=generator) for share in (mean, 1 - mean))
    return first / (first + second).clamp_min(1e-12)
