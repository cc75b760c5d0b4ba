"""The networks of UniRepLKNet's recipe: an adapter for every modality, one convnet, and what answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isthmus.codec import Loss, UserError, create_timm
from isthmus.data.transforms.augmentation import IMAGENET
from isthmus.encoders.images.as_image import AudioImage, PointImage, SeriesImage, VideoImage
from isthmus.encoders.images.unireplknet import UniRepLKNet
from isthmus.objectives.classification import Classification
from isthmus.recipes._unireplknet_tasks import COLUMNS


class VideoFrames(nn.Module):
    """``(B, T, 3, H, W)``, bytes or in [0, 1] → one normalised picture a clip ``(B, 3, √T·H, √T·W)``."""

    def __init__(self, layout: Literal["tile", "raw"]) -> None:
        super().__init__()
        self.fold = VideoImage(layout)
        self.register_buffer("mean", torch.tensor(IMAGENET[0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET[1]).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, clip: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` → ``(B, 3, √T·H, √T·W)``."""
        clip = clip / 255 if clip.dtype == torch.uint8 else clip
        return (self.fold(clip.transpose(1, 2)) - self.mean) / self.std


class SeriesRows(nn.Module):
    """``(B, C, L)`` without the mean and deviation of every channel → one square picture a sample."""

    def __init__(self, channels: int, length: int, dim: int) -> None:
        super().__init__()
        self.fold = SeriesImage(channels, length, dim)

    def forward(self, series: Tensor) -> Tensor:
        """``(B, C, L)`` → ``(B, 1, √(L·dim), √(L·dim))``."""
        return self.fold(standardised(series)[0].transpose(1, 2))


def standardised(series: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Instance normalisation over time of ``(B, C, L)``, with the mean and deviation to undo it, ``(B, C, 1)``."""
    mean, std = series.mean(2, keepdim=True), series.std(2, correction=0, keepdim=True).clamp_min(1e-5)
    return (series - mean) / std, mean, std


def make_adapter(name: str, task: Any, shape: Sequence[int]) -> tuple[nn.Module, int, int]:
    """From samples of ``shape`` to pictures; the pictures' channels, and how many a sample gives."""
    if name == "image":
        return nn.Identity(), 3, 1
    if name == "audio":
        adapter = AudioImage(task.rate, task.bands, task.frames, task.mean, task.std, task.window, task.hop)
        return adapter, 1, 1
    if name == "video":
        return VideoFrames(task.layout), 3, 1
    if name == "points":
        adapter = PointImage(task.views, task.size, None, task.neighbours, task.width, task.channels)
        return adapter, 3, task.views
    length = task.length if name == "forecast" else shape[1]
    return SeriesRows(shape[0], length, task.dim), 1, 1


class Perception(nn.Module):
    """An adapter, the convnet, and a linear head on the pooled features of a sample's pictures side by side.

    Shapes: what the adapter takes → logits ``(B, classes)``.
    """

    def __init__(self, adapter: nn.Module, network: nn.Module, views: int, classes: int) -> None:
        super().__init__()
        self.adapter, self.network, self.views = adapter, network, views
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


class Forecaster(nn.Module):
    """The cells of the convnet's last map → the next values of every series.

    The level and spread of what was seen are taken away before and given back after.

    Shapes: ``(B, C, length)`` → ``(B, C, horizon)``.
    """

    def __init__(self, adapter: SeriesRows, network: nn.Module, channels: int, horizon: int) -> None:
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


class Forecasting(nn.Module):
    """Mean squared error of the last ``horizon`` values of ``batch["signal"]`` ``(B, C, length + horizon)``."""

    def __init__(self, model: Forecaster) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, generator: torch.Generator, turn: str | None = None) -> Loss:
        """The batch to the loss."""
        past, future = batch["signal"].tensor_split((-self.model.horizon,), dim=2)
        told = self.model(past)
        error = (told - future).square().mean()
        return Loss(error, {"mse": error.detach()}, {"forecast": told})


def make_model(config: Any, name: str, shape: Sequence[int], outputs: int, kernel: int) -> Any:
    """A task's adapter, the convnet and what answers.

    Args:
        config: of the recipe.
        name: of the task.
        shape: of a sample.
        outputs: classes, or series whose future is told.
        kernel: side of the large kernels.

    Raises:
        UserError: samples that make no picture, or a convnet that the task cannot use.
    """
    try:
        adapter, channels, views = make_adapter(name, getattr(config, name), shape)
    except ValueError as error:
        raise UserError(f"the {name} task cannot be set up: {error}") from error
    if config.encoder:
        arguments: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        network = create_timm(
            config.encoder, in_chans=channels, num_classes=0, pretrained=config.pretrained, **arguments
        )
        if name == "forecast" and not isinstance(network, UniRepLKNet):
            raise UserError("the forecast task reads the last map of a UniRepLKNet; take one, or leave that task out.")
    else:
        sizes = [(3,) * depth if stage in (0, 3) else (kernel,) * depth for stage, depth in enumerate(config.depths)]
        network = UniRepLKNet(
            config.depths,
            config.dims,
            sizes,
            channels,
            num_classes=0,
            drop_path_rate=config.drop_path,
            layer_scale=config.layer_scale,
        )
    if name == "forecast":
        return Forecaster(adapter, network, outputs, config.forecast.horizon)  # type: ignore[arg-type]
    return Perception(adapter, network, views, outputs)


def make_objective(config: Any, name: str, model: Any) -> nn.Module:
    """What trains the model of a task."""
    if name == "forecast":
        return Forecasting(model)
    task: Any = getattr(config, name)
    binary = name == "audio" and task.binary
    return Classification(model, smoothing=task.smoothing, binary=binary, key=COLUMNS[name])
