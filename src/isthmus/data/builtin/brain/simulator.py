"""One simulated brain a subject, read out by MEG or by fMRI, with the truth at hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from isthmus.data.builtin.brain.cortex import NAMES, Cortex, grow
from isthmus.data.builtin.brain.fmri import FMRISettings, Scanner
from isthmus.data.builtin.brain.meg import MEGSettings, Recorder
from isthmus.data.builtin.brain.stimuli import LOW

MODES = ("beta", "bold", "parcel")


@dataclass(frozen=True)
class Truth:
    """What a decoder can never see.

    Attributes:
        cortex: weights, places, latencies of every source of every subject.
        networks: names of ``cortex.network``.
        recorder, scanner: lead fields, layout, voxels, and the noise ceiling of every voxel.
    """

    cortex: Cortex
    networks: tuple[str, ...]
    simulator: BrainSimulator

    @property
    def recorder(self) -> Recorder:
        return self.simulator.recorder

    @property
    def scanner(self) -> Scanner:
        return self.simulator.scanner


class BrainSimulator:
    """Subjects whose sources answer to latents and to low-level features.

    ``BrainSimulator(4, 16).meg(z)`` gives magnetic fields, ``.fmri(z)`` amplitudes of voxels. Two simulators made with
    generators of the same state are the same, and so are their recordings, made in the same order.

    Args:
        subjects: S.
        features: F, numbers of a latent.
        energy: share of sources, 0 to 0.5, that answer to ``sqrt(u1² + u2²)``, which no linear decoder inverts.
        generator: of all that is random; seed 0 where left out.
        low: L, low-level features.
        spread: how far subjects differ.
        rank: dimensions of the latent that the brain sees; all where left out.
        meg, fmri: how it is recorded.

    Attributes:
        truth: the :class:`Truth`.

    Raises:
        ValueError: impossible sizes.
    """

    def __init__(
        self,
        subjects: int = 1,
        features: int = 16,
        energy: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        low: int = LOW,
        spread: float = 0.2,
        rank: int | None = None,
        meg: MEGSettings | None = None,
        fmri: FMRISettings | None = None,
    ) -> None:
        if subjects < 1 or features < 1 or low < 1 or not 0 <= energy <= 0.5 or spread < 0:
            raise ValueError(
                "a simulator needs subjects, features and low of 1 or more, energy from 0 to 0.5 and spread of 0 or "
                f"more; got {subjects}, {features}, {low}, {energy}, {spread}."
            )
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.subjects, self.features, self.low = subjects, features, low
        self.cortex = grow(subjects, features, low, energy, self.generator, spread, rank)
        self.meg_settings, self.fmri_settings = meg or MEGSettings(), fmri or FMRISettings()
        # Seeds of the two instruments are drawn now, so that using one does not change the other.
        self._seeds = torch.randint(2**62, (2,), generator=self.generator).tolist()
        self.truth = Truth(self.cortex, NAMES, self)

    @cached_property
    def recorder(self) -> Recorder:
        """Sensors, made when they are first used."""
        return Recorder(self.cortex, self.meg_settings, torch.Generator().manual_seed(self._seeds[0]))

    @cached_property
    def scanner(self) -> Scanner:
        """Voxels, made when they are first used."""
        return Scanner(self.cortex, self.fmri_settings, torch.Generator().manual_seed(self._seeds[1]))

    def meg(
        self, z: Tensor, subject: int | Tensor = 0, low: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """One trial for every latent: ``(N, F)`` → ``(N, C, T)``.

        Args:
            z: latents.
            subject: who sees them, one number or ``(N,)``.
            low: low-level features ``(N, L)``; drawn where left out.
            generator: of the trials; the simulator's own where left out.
        """
        generator = self.generator if generator is None else generator
        low = self._low(z, low, generator)
        settings = self.meg_settings
        signal = torch.empty(len(z), settings.sensors, len(settings.times))
        for who, rows in self._shares(z, subject):
            signal[rows] = self.recorder.record(self.cortex.rates(z[rows], low[rows], who), who, generator)
        return signal

    def fmri(
        self,
        z: Tensor,
        mode: str = "beta",
        subject: int = 0,
        low: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Voxels of one subject.

        Args:
            z: latents ``(N, F)``; for ``"parcel"`` ``(N, E, F)``, N runs of E events.
            mode: ``"beta"`` gives amplitudes ``(N, V)``; ``"bold"`` simulates one run of N events volume by volume and
                gives the amplitudes that a general linear model finds in it, ``(N, V)``; ``"parcel"`` gives the means
                of the networks over the volumes of each run, ``(N, T, P)``.
            subject: who sees them.
            low: low-level features, shaped as ``z``; drawn where left out.
            generator: of the trials; the simulator's own where left out.

        Raises:
            ValueError: an unknown mode, or latents of another shape.
        """
        if mode not in MODES:
            raise ValueError(f"fmri mode is {', '.join(MODES)}, not {mode!r}.")
        if z.ndim != (3 if mode == "parcel" else 2):
            raise ValueError(
                f"fmri mode {mode} reads {'(N, E, F)' if mode == 'parcel' else '(N, F)'}, got {tuple(z.shape)}."
            )
        generator = self.generator if generator is None else generator
        if mode == "parcel":
            runs = [self._bold(run, subject, None if low is None else low[i], generator) for i, run in enumerate(z)]
            return torch.stack([self.scanner.parcels(run, subject) for run in runs])
        if mode == "bold":
            return self.scanner.estimate(self._bold(z, subject, low, generator), len(z))
        low = self._low(z, low, generator)
        self._shares(z, subject)
        return self.scanner.beta(self.cortex.rates(z, low, subject), subject, generator)

    def _bold(self, z: Tensor, subject: int, low: Tensor | None, generator: torch.Generator) -> Tensor:
        low = self._low(z, low, generator)
        self._shares(z, subject)
        return self.scanner.bold(self.cortex.rates(z, low, subject), subject, generator)

    def _low(self, z: Tensor, low: Tensor | None, generator: torch.Generator) -> Tensor:
        if z.shape[-1] != self.features:
            raise ValueError(f"latents must have {self.features} numbers, got {tuple(z.shape)}.")
        if low is None:
            return torch.randn(*z.shape[:-1], self.low, generator=generator)
        if low.shape != (*z.shape[:-1], self.low):
            raise ValueError(f"low must be {(*z.shape[:-1], self.low)}, got {tuple(low.shape)}.")
        return low

    def _shares(self, z: Tensor, subject: int | Tensor) -> list[tuple[int, Tensor]]:
        """Every subject with the rows that belong to them."""
        who = torch.full((len(z),), subject) if isinstance(subject, int) else subject
        if len(who) != len(z) or (len(who) and not 0 <= int(who.min()) <= int(who.max()) < self.subjects):
            raise ValueError(f"subject must be below {self.subjects}, one number or one for each of {len(z)} latents.")
        return [(int(one), (who == one).nonzero()[:, 0]) for one in who.unique()]
