"""The convolutional encoder of QLAE (Hsu et al., arXiv 2305.18378): a picture to a few latents.

    encoder = QLAEEncoder(latents=12)                 # "image", for 64 × 64; QLAEEncoder(12, **SMALL) is the small one
    z = encoder(images)[0]                            # (B, 1, 12)

Blocks of convolution, instance norm and leaky ReLU; the map laid out flat; dense layers; a linear head without any
squashing. Its decoder is ``decoders/style_decoder.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import FeatureInfo, part
from isthmus.encoders.images.pyramid import check_images

#: The published "image" encoder and its small version.
IMAGE: dict[str, Any] = {
    "widths": (32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256, 256),
    "kernels": (3, 3, 4) * 4,
    "strides": (1, 1, 2) * 4,
    "dense": (256, 256),
}
SMALL: dict[str, Any] = {"widths": (64, 128, 256, 512), "kernels": (4,) * 4, "strides": (2,) * 4, "dense": (512,)}


@part
@checked
class QLAEEncoder(nn.Module):
    """Pictures to one token of latents.

    Args:
        latents: numbers that come out, L.
        size: pixels a side.
        channels: of the picture.
        widths, kernels, strides: of the convolutions, one each; all have padding 1 and no bias.
        dense: widths of the dense layers.

    Shapes: ``(B, channels, size, size)`` → ``[(B, 1, L)]``.

    Raises:
        ValueError: lists of different lengths, a size that nothing is left of, or a picture of another size.
    """

    def __init__(
        self,
        latents: Count,
        size: Count = 64,
        channels: Count = 3,
        widths: Sequence[Count] = IMAGE["widths"],
        kernels: Sequence[Count] = IMAGE["kernels"],
        strides: Sequence[Count] = IMAGE["strides"],
        dense: Sequence[Count] = IMAGE["dense"],
    ) -> None:
        super().__init__()
        if not len(widths) == len(kernels) == len(strides) > 0:
            raise ValueError(
                f"give as many kernels and strides as widths, got {len(widths)}, {len(kernels)}, {len(strides)}."
            )
        self.size, self.channels, self.latents = size, channels, latents
        self.feature_info = [FeatureInfo(latents, size, "NTC")]
        self.side = final_side(size, kernels, strides)
        blocks, now = [], channels
        for width, kernel, stride in zip(widths, kernels, strides, strict=True):
            conv = nn.Conv2d(now, width, kernel, stride, 1, bias=False)
            blocks.append(
                nn.Sequential(conv, nn.InstanceNorm2d(width, eps=1e-6, affine=True), nn.LeakyReLU(0.2, inplace=True))
            )
            now = width
        self.conv = nn.Sequential(*blocks)
        layers, now = [], now * self.side**2
        for width in dense:
            layers.append(nn.Sequential(nn.Linear(now, width), nn.ReLU()))
            now = width
        self.dense = nn.Sequential(*layers)
        self.num_features = now
        self.head = nn.Linear(now, latents)

    def features(self, x: Tensor) -> Tensor:
        """What the head, and a critic beside it, read: ``(B, num_features)``."""
        check_images(x, self.channels)
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(f"this encoder is for {self.size} × {self.size} pixels, got {tuple(x.shape)}.")
        return self.dense(self.conv(x).flatten(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Latents, before any quantisation."""
        return [self.head(self.features(x))[:, None]]


@part
@checked
class DenseEncoder(nn.Module):
    """Pixels laid out flat, dense layers with ReLU, a linear head: for pictures of a few pixels.

    Args:
        latents: numbers that come out, L.
        size: pixels a side.
        channels: of the picture.
        widths: of the hidden layers.

    Shapes: ``(B, channels, size, size)`` → ``[(B, 1, L)]``.

    Raises:
        ValueError: a picture of another size.
    """

    def __init__(
        self, latents: Count, size: Count = 16, channels: Count = 3, widths: Sequence[Count] = (256, 256)
    ) -> None:
        super().__init__()
        self.size, self.channels, self.latents = size, channels, latents
        self.feature_info = [FeatureInfo(latents, size, "NTC")]
        layers, now = [], channels * size**2
        for width in widths:
            layers += [nn.Linear(now, width), nn.ReLU()]
            now = width
        self.dense = nn.Sequential(*layers)
        self.num_features = now
        self.head = nn.Linear(now, latents)

    def features(self, x: Tensor) -> Tensor:
        """What the head, and a critic beside it, read: ``(B, num_features)``."""
        check_images(x, self.channels)
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(f"this encoder is for {self.size} × {self.size} pixels, got {tuple(x.shape)}.")
        return self.dense(x.flatten(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Latents, before any quantisation."""
        return [self.head(self.features(x))[:, None]]


def final_side(size: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Side of the map after convolutions with padding 1.

    Raises:
        ValueError: nothing is left of it.
    """
    side = size
    for kernel, stride in zip(kernels, strides, strict=True):
        side = (side + 2 - kernel) // stride + 1
    if side < 1:
        raise ValueError(f"nothing is left of {size} pixels after these strides; give larger pictures or fewer layers.")
    return side


def from_official(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published encoder's parameters under our names; convolutions are stored as torch stores them.

    Lists of layers have ``layers.`` in every name there, and the infogan's encoder stands below ``base.``.
    """
    return {name.removeprefix("base.").replace("layers.", ""): torch.as_tensor(x) for name, x in params.items()}
