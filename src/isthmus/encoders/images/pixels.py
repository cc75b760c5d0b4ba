"""The identity as an encoder: pixel-to-pixel networks are decoders behind it."""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import FeatureInfo, part
from isthmus.encoders.images.pyramid import check_images


@part
@checked
class Pixels(nn.Module):
    """An image as a pyramid of one level, with reduction 1: ``Codec(Pixels(), decoder=MetaMixerSR(2))``.

    Args:
        channels: of the image.

    Shapes: ``(B, channels, H, W)`` → ``[(B, channels, H, W)]``.

    Raises:
        ValueError: an input of another form.
    """

    def __init__(self, channels: Count = 3) -> None:
        super().__init__()
        self.channels = channels
        self.feature_info = [FeatureInfo(channels, 1)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, channels, H, W)`` → ``[x]``."""
        check_images(x, self.channels)
        return [x]
