"""What is looked at: latents of categories and exemplars, low-level features, and a picture of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUPER = 6
"""Kinds above the categories (animals, tools …)."""
LOW = 5
"""Low-level features: place across and down, size, contrast, orientation."""


class Stimuli(NamedTuple):
    """A pool of N stimuli.

    Attributes:
        latent: ``(N, F)``, of length sqrt(F): what an image model would say.
        low: ``(N, 5)``, independent of the latent, standard normal.
        category: int64 ``(N,)``.
    """

    latent: Tensor
    low: Tensor
    category: Tensor

    def take(self, numbers: Tensor) -> Stimuli:
        """Some of them."""
        return Stimuli(*(column[numbers] for column in self))


def draw(categories: int, exemplars: int, features: int, generator: torch.Generator, spread: float = 0.8) -> Stimuli:
    """Latents ``normalise(super + 0.9 category + spread · exemplar) · sqrt(F)`` of ``exemplars`` a category.

    Args:
        categories: K, dealt out to six super-categories in turn.
        exemplars: M of each.
        features: F.
        generator: of all that is random.
        spread: how far exemplars of a category differ.
    """
    above = torch.randn(SUPER, features, generator=generator)
    own = torch.randn(categories, features, generator=generator)
    category = torch.arange(categories).repeat_interleave(exemplars)
    single = torch.randn(len(category), features, generator=generator)
    latent = above[category % SUPER] + 0.9 * own[category] + spread * single
    latent = latent / latent.norm(dim=1, keepdim=True) * features**0.5
    return Stimuli(latent, torch.randn(len(category), LOW, generator=generator), category)


def pictures(stimuli: Stimuli, size: int = 24) -> Tensor:
    """A picture of every stimulus: a flower whose colours and petals follow the latent, and its place the low level.

    The same latent and features give the same picture at any size, on other machines up to one grey level.

    Returns:
        uint8 ``(N, 3, size, size)``.
    """
    count, features = stimuli.latent.shape
    drawn = torch.Generator().manual_seed(20231)  # the painter's hand is the same everywhere
    hand = torch.randn(features, 12, generator=drawn) / features**0.5
    traits = stimuli.latent @ hand
    place = stimuli.low
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    dx = x - 0.25 * place[:, 0].tanh()[:, None, None]
    dy = y - 0.25 * place[:, 1].tanh()[:, None, None]
    radius, angle = torch.hypot(dx, dy), torch.atan2(dy, dx) - place[:, 4, None, None]
    petals = sum(
        0.3 * traits[:, 6 + n].tanh()[:, None, None] * torch.cos((n + 2) * angle + traits[:, 9 + n, None, None])
        for n in range(3)
    )
    edge = (0.5 + 0.15 * place[:, 2].tanh())[:, None, None] * (1 + petals)
    inside = torch.sigmoid((edge - radius) * 12)[:, None]
    contrast = (0.75 + 0.25 * place[:, 3].tanh())[:, None]
    front = 0.5 + contrast * (torch.sigmoid(2 * traits[:, :3]) - 0.5)
    back = 0.5 + contrast * (torch.sigmoid(2 * traits[:, 3:6]) - 0.5)
    painted = inside * front[:, :, None, None] + (1 - inside) * back[:, :, None, None]
    return (painted * 255).round().to(torch.uint8).view(count, 3, size, size)
