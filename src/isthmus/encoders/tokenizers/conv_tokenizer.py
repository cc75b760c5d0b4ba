"""A small convolutional encoder for image tokens, after that of VQGAN (Esser et al., arXiv 2012.09841) without
attention: residual blocks, and a strided convolution for every halving. Its mirror is ``decoders/conv_tokenizer.py``.
"""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.bounds import Count, Natural, checked
from isthmus.codec import FeatureInfo, part
from isthmus.encoders.images.pyramid import check_images
from isthmus.layers.conv_block import ResidualBlock, width_of


@part
@checked
class ConvTokenizer(nn.Module):
    """Images to one map, ready for vector quantisation.

    Args:
        dim: channels of the map.
        reduction: pixels a side of a place, a power of two; 1 keeps the image's grid.
        width: channels at full size; they double with every halving, up to four times as many.
        depth: residual blocks at every size.
        channels: of the image.

    Shapes: ``(B, channels, H, W)`` → ``[(B, dim, H / reduction, W / reduction)]``.

    Raises:
        ValueError: a reduction that is no power of two, or an image that it does not divide.
    """

    def __init__(
        self, dim: Count = 16, reduction: Count = 2, width: Count = 32, depth: Natural = 1, channels: Count = 3
    ) -> None:
        super().__init__()
        if reduction & (reduction - 1):
            raise ValueError(f"reduction must be a power of two, got {reduction}.")
        self.channels, self.reduction = channels, reduction
        self.feature_info = [FeatureInfo(dim, reduction)]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        now = width
        for level in range(reduction.bit_length()):
            if level:
                after = width_of(width, level)
                layers.append(nn.Conv2d(now, after, 4, 2, 1))
                now = after
            layers += [ResidualBlock(now) for _ in range(depth)]
        self.body = nn.Sequential(*layers)
        self.out = nn.Conv2d(now, dim, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image in, one level out."""
        check_images(x, self.channels)
        height, width = x.shape[-2:]
        if height % self.reduction or width % self.reduction:
            raise ValueError(f"the sides of an image must be multiples of {self.reduction}, got {height} x {width}.")
        return [self.out(self.body(x))]
