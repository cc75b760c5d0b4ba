"""One convnet for several modalities: samples become pictures, its features become classes or forecasts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import part
from isthmus.encoders.images.as_image import SeriesImage, VideoImage

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@part
@checked
class VideoFrames(nn.Module):
    """``(B, T, 3, H, W)``, bytes or in [0, 1] → one normalised picture a clip ``(B, 3, √T·H, √T·W)``."""

    def __init__(self, layout: Literal["tile", "raw"]) -> None:
        super().__init__()
        self.fold = VideoImage(layout)
        self.register_buffer("mean", torch.tensor(_IMAGENET[0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET[1]).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, clip: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` → ``(B, 3, √T·H, √T·W)``."""
        clip = clip / 255 if clip.dtype == torch.uint8 else clip
        return (self.fold(clip.transpose(1, 2)) - self.mean) / self.std


@part
@checked
class SeriesRows(nn.Module):
    """``(B, C, L)`` without the mean and deviation of every channel → one square picture a sample."""

    def __init__(self, channels: Count, length: Count, dim: Count) -> None:
        super().__init__()
        self.fold = SeriesImage(channels, length, dim)

    def forward(self, series: Tensor) -> Tensor:
        """``(B, C, L)`` → ``(B, 1, √(L·dim), √(L·dim))``."""
        return self.fold(standardised(series)[0].transpose(1, 2))


def standardised(series: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Instance normalisation over time of ``(B, C, L)``, with the mean and deviation to undo it, ``(B, C, 1)``."""
    mean, std = series.mean(2, keepdim=True), series.std(2, correction=0, keepdim=True).clamp_min(1e-5)
    return (series - mean) / std, mean, std


@part
@checked
class Perception(nn.Module):
    """An adapter, the convnet, and a linear head on the pooled features of a sample's pictures side by side.

    Args:
        adapter: a sample to pictures; ``None`` where samples are pictures.
        network: pictures to features, such as a timm model with ``num_classes=0``.
        views: pictures a sample.
        classes: number of logits.

    Shapes: what the adapter takes → logits ``(B, classes)``.
    """

    def __init__(self, adapter: nn.Module | None, network: nn.Module, views: Count, classes: Count) -> None:
        super().__init__()
        self.adapter = nn.Identity() if adapter is None else adapter
        self.network, self.views = network, views
        width = views * int(network.num_features)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width) if views > 1 else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """A batch of the modality → ``(B, classes)``."""
        features = self.network(self.adapter(x))
        return self.head(self.norm(features.reshape(len(x), -1)))

    def reparameterize(self) -> None:
        """Merge the branches of the convnet; a second call does nothing."""
        if hasattr(self.network, "reparameterize"):
            self.network.reparameterize()  # type: ignore[operator]


@part
@checked
class MapForecaster(nn.Module):
    """The cells of the convnet's last map → the next values of every series.

    The level and spread of what was seen are taken away before and given back after.

    Shapes: ``(B, C, length)`` → ``(B, C, horizon)``.
    """

    def __init__(self, adapter: SeriesRows, network: nn.Module, channels: Count, horizon: Count) -> None:
        super().__init__()
        self.adapter, self.network, self.channels, self.horizon = adapter, network, channels, horizon
        side = math.ceil(adapter.fold.side / 32)
        self.head = nn.Linear(int(network.num_features) * side**2, channels * horizon)  # type: ignore[arg-type]

    def forward(self, series: Tensor) -> Tensor:
        """``(B, C, length)`` → ``(B, C, horizon)``."""
        _, mean, std = standardised(series)
        cells = self.network.forward_features(self.adapter(series)).flatten(1)  # type: ignore[operator]
        return self.head(cells).unflatten(1, (self.channels, self.horizon)) * std + mean

    def reparameterize(self) -> None:
        """Merge the branches of the convnet; a second call does nothing."""
        if hasattr(self.network, "reparameterize"):
            self.network.reparameterize()  # type: ignore[operator]
