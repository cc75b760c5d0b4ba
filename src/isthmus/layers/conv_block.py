"""The residual block that a tokenizer's encoder and decoder share."""

from __future__ import annotations

import math

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Norm, activation and 3x3 convolution, twice, added to the input ``(B, C, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def half() -> list[nn.Module]:
            groups = math.gcd(channels, 8)
            return [nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]

        self.body = nn.Sequential(*half(), *half())

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return x + self.body(x)


def width_of(width: int, level: int) -> int:
    """Channels after so many halvings: twice as many every time, up to four times."""
    return width * min(2**level, 4)
