"""Three small convolutional networks with many kinds of units, for lenses to look into."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import part


@part
@checked
class PooledCNN(nn.Module):
    """Three 3×3 convolutions with ReLU, max pooling after the second, the mean over places, a linear layer."""

    def __init__(self, num_classes: Count, width: Count, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=bias)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=bias)
        self.fc = nn.Linear(2 * width, num_classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, num_classes)``."""
        x = F.max_pool2d(self.conv2(self.conv1(x).relu()).relu(), 2)
        return self.fc(self.conv3(x).relu().mean((2, 3)))


@part
@checked
class UpscalingCNN(nn.Module):
    """Three convolutions and a pixel shuffle, LeakyReLU and SiLU, with a skip: twice as many pixels a side."""

    def __init__(self, width: Count) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, 3, 2 H, 2 W)``."""
        first = F.leaky_relu(self.conv1(x), 0.1)
        return F.pixel_shuffle(self.conv3(first + F.silu(self.conv2(first))), 2)


@part
@checked
class SmoothAutoencoder(nn.Module):
    """Instance norm, a strided convolution with sigmoid, a transposed one with tanh."""

    def __init__(self, width: Count) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.InstanceNorm2d(width, affine=True)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.up = nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → the same, even H and W."""
        return torch.tanh(self.up(torch.sigmoid(self.conv2(self.norm(self.conv1(x)).relu()))))
