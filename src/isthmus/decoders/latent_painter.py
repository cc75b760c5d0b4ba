"""A small conditional decoder: a picture from a latent, for showing what a predicted latent stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import part


@part
@checked
class LatentPainter(nn.Module):
    """Latents ``(B, F)`` → pictures ``(B, 3, size, size)`` in [0, 1]: a linear map to a coarse grid, then upsampling.

    Args:
        features: F.
        size: pixels a side, divisible by 8.
        width: channels of the coarsest grid.

    Raises:
        ValueError: a size that 8 does not divide.
    """

    def __init__(self, features: Count, size: Count = 24, width: Count = 48) -> None:
        super().__init__()
        if size % 8 or size < 8:
            raise ValueError(f"size must be a multiple of 8, got {size}.")
        self.grid = size // 8
        self.enter = nn.Linear(features, width * self.grid**2)
        layers: list[nn.Module] = []
        for channels in (width, width // 2, width // 4):
            layers += [
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.Conv2d(channels, channels // 2, 3, padding=1),
                nn.GELU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width // 8, 3, 3, padding=1))

    def forward(self, latent: Tensor | list[Tensor]) -> Tensor:
        """``(B, F)``, or a pyramid whose last level is that."""
        latent = latent if isinstance(latent, Tensor) else latent[-1]
        x = self.enter(latent).view(len(latent), -1, self.grid, self.grid)
        return torch.sigmoid(self.layers(x))
