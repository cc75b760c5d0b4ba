"""Where it is seen: six networks of sources, each with weights on the latent and on low-level features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Network(NamedTuple):
    """A part of the brain: how many sources, when they answer, to what, and where they lie.

    Attributes:
        sources: how many.
        latency, width: centre and sd of the response, seconds after the stimulus came.
        semantic, low: weight of the latent and of low-level features.
        gain: of the whole response.
        place: direction from the centre of the head, x right, y front, z up; x is mirrored at random.
    """

    sources: int
    latency: float
    width: float
    semantic: float
    low: float
    gain: float
    place: tuple[float, float, float]


NETWORKS = {
    "V1": Network(40, 0.10, 0.035, 0.0, 1.0, 1.0, (0.15, -1.0, 0.1)),
    "V4": Network(30, 0.14, 0.040, 0.7, 0.7, 1.0, (0.5, -0.8, -0.25)),
    "LO": Network(30, 0.19, 0.045, 1.0, 0.0, 1.0, (0.8, -0.6, 0.0)),
    "FFA": Network(20, 0.24, 0.050, 1.0, 0.0, 1.0, (0.65, -0.4, -0.4)),
    "DMN": Network(30, 0.40, 0.100, 1.0, 0.0, 0.6, (0.25, -0.6, 0.8)),
    "AUD": Network(30, 0.15, 0.040, 0.0, 0.0, 0.0, (1.0, 0.0, 0.1)),
}
"""The auditory network hears nothing: a negative control."""
NAMES = tuple(NETWORKS)


@dataclass(frozen=True)
class Cortex:
    """The sources of S subjects.

    Attributes:
        weights: ``(S, J, F)`` on the latent; ``low_weights`` ``(S, J, L)``. Energy units have a second pair.
        second, second_low: of energy units, which answer ``sqrt(u1² + u2²)``.
        energy: bool ``(J,)``, which are.
        network: int64 ``(J,)``, index into :data:`NAMES`.
        latency, width, gain: ``(J,)``.
        position, orientation: ``(S, J, 3)``, metres from the centre of the head, and unit vectors tangential to it.
    """

    weights: Tensor
    low_weights: Tensor
    second: Tensor
    second_low: Tensor
    energy: Tensor
    network: Tensor
    latency: Tensor
    width: Tensor
    gain: Tensor
    position: Tensor
    orientation: Tensor

    def rates(self, latent: Tensor, low: Tensor, subject: int) -> Tensor:
        """How strongly every source answers: latents ``(N, F)`` and features ``(N, L)`` → ``(N, J)``, 0 or more."""
        first = latent @ self.weights[subject].mT + low @ self.low_weights[subject].mT
        second = latent @ self.second[subject].mT + low @ self.second_low[subject].mT
        answer = torch.where(self.energy, torch.hypot(first, second), F.softplus(first))
        return answer * self.gain


def grow(
    subjects: int,
    features: int,
    low: int,
    energy: float,
    generator: torch.Generator,
    spread: float = 0.2,
    rank: int | None = None,
) -> Cortex:
    """Draw the sources of every subject.

    Args:
        subjects: S.
        features: F of the latent.
        low: L of the low-level features.
        energy: share of sources in every network that answer to energy, 0 to 0.5.
        generator: of all that is random.
        spread: how far subjects differ from each other, in sds of the weights.
        rank: the brain sees a subspace of the latent of so many dimensions.
    """
    kinds = list(NETWORKS.values())
    network = torch.cat([torch.full((kind.sources,), i) for i, kind in enumerate(kinds)])
    total = len(network)

    def of(name: str) -> Tensor:
        return torch.tensor([getattr(kind, name) for kind in kinds])[network]

    def weights(width: int, share: Tensor, within: Tensor | None) -> Tensor:
        common = torch.randn(total, width, generator=generator)
        own = torch.randn(subjects, total, width, generator=generator)
        drawn = common + spread * own
        if within is not None:
            drawn = drawn @ within @ within.mT * (width / within.shape[1]) ** 0.5
        return drawn * share[:, None] / width**0.5

    seen = None
    if rank is not None and rank < features:
        seen = torch.linalg.qr(torch.randn(features, rank, generator=generator)).Q
    semantic, basic = of("semantic"), of("low")
    first, first_low, second, second_low = (
        weights(width, share, within) for width, share, within in ((features, semantic, seen), (low, basic, None)) * 2
    )
    within_network = torch.cat([torch.arange(kind.sources) / kind.sources for kind in kinds])
    position, orientation = _places(subjects, of("place"), generator)
    return Cortex(
        first, first_low, second, second_low, within_network < energy, network,
        of("latency"), of("width"), of("gain"), position, orientation,
    )  # fmt: skip


def _places(subjects: int, place: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions 55 to 67 mm from the centre around each network's direction, moved by 2 mm for each subject."""
    side = torch.where(torch.rand(len(place), 1, generator=generator) < 0.5, -1.0, 1.0)
    direction = place * torch.cat([side, torch.ones(len(place), 2)], 1)
    direction = F.normalize(direction, dim=1) + 0.2 * torch.randn(len(place), 3, generator=generator)
    radius = 0.055 + 0.012 * torch.rand(len(place), 1, generator=generator)
    common = F.normalize(direction, dim=1) * radius
    position = common + 0.002 * torch.randn(subjects, len(place), 3, generator=generator)
    return position, tangents(position, torch.randn(len(place), 3, generator=generator))


def tangents(position: Tensor, any_vector: Tensor) -> Tensor:
    """Unit vectors tangential to the sphere at ``position`` ``(…, 3)``; radial ones would not be measured at all."""
    outward = F.normalize(position, dim=-1)
    return F.normalize(torch.linalg.cross(outward, any_vector.expand_as(outward)), dim=-1)


def scattered(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions and tangents ``(count, 3)`` all over the upper sphere, for activity that has nothing to do with it."""
    direction = torch.randn(count, 3, generator=generator)
    direction[:, 2] = direction[:, 2].abs() - 0.3
    position = F.normalize(direction, dim=1) * 0.06
    return position, tangents(position, torch.randn(count, 3, generator=generator))


def around(count: int, place: tuple[float, float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions and tangents ``(count, 3)`` about one direction and its mirror image."""
    position, orientation = _places(1, torch.tensor(place).expand(count, 3), generator)
    return position[0], orientation[0]


def mean_latency(names: tuple[str, ...]) -> float:
    """Mean latency of networks, by their numbers of sources, in seconds."""
    kinds = [NETWORKS[name] for name in names]
    return math.fsum(k.sources * k.latency for k in kinds) / sum(k.sources for k in kinds)
