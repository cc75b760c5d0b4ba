"""A small patch-wise classifier that aliases, and its anti-aliased twin: what one-pixel shifts are tried on."""

from __future__ import annotations

from timm.layers import BlurPool2d
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import part


@part
@checked
class PatchNet(nn.Module):
    """Patches of 8×8 pixels, two more convolutions, the mean over places: aliases as badly as any of its kind.

    Args:
        num_classes: outputs.
        antialiased: take patches at every fourth pixel and reach the same stride through a blur (Zhang 2019, arXiv
            1904.11486): as many parameters, about twice the work.
    """

    def __init__(self, num_classes: Count, antialiased: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, stride=4 if antialiased else 8, padding=2 if antialiased else 0)
        self.blur = nn.Sequential(nn.ReLU(), *([BlurPool2d(48)] if antialiased else []))
        self.body = nn.Sequential(nn.Conv2d(48, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, num_classes)``."""
        return self.head(self.body(self.blur(self.patches(x))).mean((2, 3)))
