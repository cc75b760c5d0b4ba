"""The mirror of ``encoders/conv_tokenizer.py``: from a map of code vectors back to an image."""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.bounds import Count, Natural, checked
from isthmus.codec import part
from isthmus.layers.conv_block import ResidualBlock, width_of


@part
@checked
class ConvDetokenizer(nn.Module):
    """One map to an image; every doubling repeats pixels and convolves, which leaves no checkerboard.

    Args:
        dim: channels of the map.
        reduction: pixels a side of a place, a power of two.
        width: channels at full size.
        depth: residual blocks at every size.
        channels: of the image.

    Shapes: ``[(B, dim, h, w)]`` → ``(B, channels, h · reduction, w · reduction)``, unbounded.

    Raises:
        ValueError: a reduction that is no power of two, or a pyramid of another form.
    """

    def __init__(
        self, dim: Count = 16, reduction: Count = 2, width: Count = 32, depth: Natural = 1, channels: Count = 3
    ) -> None:
        super().__init__()
        if reduction & (reduction - 1):
            raise ValueError(f"reduction must be a power of two, got {reduction}.")
        self.dim = dim
        last = reduction.bit_length() - 1
        now = width_of(width, last)
        layers: list[nn.Module] = [nn.Conv2d(dim, now, 3, padding=1)]
        for level in range(last, -1, -1):
            layers += [ResidualBlock(now) for _ in range(depth)]
            if level:
                after = width_of(width, level - 1)
                layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(now, after, 3, padding=1)]
                now = after
        self.body = nn.Sequential(*layers, nn.GroupNorm(1, now), nn.SiLU(), nn.Conv2d(now, channels, 3, padding=1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """The last level to an image."""
        if len(features) != 1 or features[0].ndim != 4 or features[0].shape[1] != self.dim:
            told = ", ".join(str(tuple(level.shape)) for level in features)
            raise ValueError(f"this decoder takes one map (B, {self.dim}, h, w), got {told}.")
        return self.body(features[0])
