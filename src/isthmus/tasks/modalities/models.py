"""The networks of tasks of several modalities: an adapter each, one convnet, and what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from isthmus.codec import UserError, create_timm
from isthmus.encoders.images.as_image import AudioImage, PointImage
from isthmus.encoders.images.perception import MapForecaster, Perception, SeriesRows, VideoFrames
from isthmus.encoders.images.unireplknet import UniRepLKNet
from isthmus.objectives.classification import Classification
from isthmus.objectives.forecasting import Forecasting
from isthmus.tasks.modalities.settings import COLUMNS


def make_adapter(name: str, task: Any, shape: Sequence[int]) -> tuple[nn.Module | None, int, int]:
    """From samples of ``shape`` to pictures; the pictures' channels, and how many a sample gives."""
    if name == "image":
        return None, 3, 1
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


def make_model(config: Any, name: str, shape: Sequence[int], outputs: int, kernel: int) -> Any:
    """A task's adapter, the convnet and what answers.

    Args:
        config: of the recipe.
        name: of the task.
        shape: of a sample.
        outputs: classes, or series that are forecast.
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
        return MapForecaster(adapter, network, outputs, config.forecast.horizon)  # type: ignore[arg-type]
    return Perception(adapter, network, views, outputs)


def make_objective(config: Any, name: str, model: Any) -> nn.Module:
    """What trains the model of a task."""
    if name == "forecast":
        return Forecasting(model, config.forecast.length)
    task: Any = getattr(config, name)
    binary = name == "audio" and task.binary
    return Classification(model, smoothing=task.smoothing, binary=binary, key=COLUMNS[name])
