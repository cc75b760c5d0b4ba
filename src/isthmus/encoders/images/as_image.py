"""Sound, video, point clouds and time series as images for one unchanged convnet (UniRepLKNet, arXiv 2311.15599).

Every adapter is a small module from its modality to ``(B', C, H, W)``; :class:`AsImage` puts it before an image
encoder and returns tokens. An adapter that makes several images of one sample says how many in ``views``.

    AsImage(AudioImage(), Backbone("unireplknet_a", in_chans=1))(waveforms)  ->  [tokens (B, N, C)]
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from isthmus.bounds import Count, Natural, Positive, checked
from isthmus.codec import Condition, FeatureInfo, call_part, conditions_of, part
from isthmus.layers.spectral import log_mel


@part
@checked
class AsImage(nn.Module):
    """An adapter, then an image encoder; the cells of its last map are the tokens.

    Args:
        adapter: a sample of any modality → images ``(B · views, C, H, W)``.
        encoder: images → a pyramid of maps, such as ``Backbone("unireplknet_a", in_chans=1)``.

    Shapes: what the adapter takes → ``[tokens (B, views · h · w, C)]``, view after view, row after row.
    """

    def __init__(self, adapter: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.adapter, self.encoder = adapter, encoder
        last = cast(Any, encoder).feature_info[-1]
        self.feature_info = [FeatureInfo(last.channels, last.reduction, "NTC")]

    @property
    def conditions(self) -> frozenset[str]:
        """The extra inputs of the adapter."""
        return conditions_of(self.adapter)

    def forward(self, x: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """A batch of the adapter's modality → ``[tokens (B, N, C)]``."""
        last = self.encoder(call_part(self.adapter, x, condition))[-1]
        return [last.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, last.shape[1])]


@part
@checked
class AudioImage(nn.Module):
    """Waveform → Kaldi log-mel picture of fixed width, standardised; defaults are those of Speech Commands.

    The waveform loses its mean; missing frames are zeros (before standardisation), extra ones are cut off; then
    (x - mean) / (2 · std).

    Args:
        rate: samples a second.
        bands: mel bands, the height of the picture.
        frames: its width, a hop each; 1024 for AudioSet, 512 for ESC-50.
        mean: of the data set's log-mel values.
        std: of the same.
        window: length of a frame in seconds.
        hop: distance of frames in seconds.

    Shapes: ``(B, L)`` → ``(B, 1, bands, frames)``.

    Raises:
        ValueError: a size or length that is not positive; in ``forward``, an input of another shape or shorter than a
            frame.
    """

    def __init__(
        self,
        rate: Count = 16000,
        bands: Count = 128,
        frames: Count = 128,
        mean: float = -6.845978,
        std: Positive = 5.5654526,
        window: Positive = 0.025,
        hop: Positive = 0.010,
    ) -> None:
        super().__init__()
        if min(rate * window, rate * hop) < 1:
            raise ValueError(f"window {window} s and hop {hop} s must be at least one sample, at rate {rate}.")
        self.rate, self.bands, self.frames, self.mean, self.std = rate, bands, frames, mean, std
        self.window, self.hop = window, hop

    def spectrogram(self, wave: Tensor) -> Tensor:
        """The filter bank alone: ``(B, L)`` → ``(B, T, bands)``."""
        wave = wave - wave.mean(1, keepdim=True)
        return log_mel(wave, self.rate, self.bands, kaldi=True, window=self.window, hop=self.hop)

    def forward(self, wave: Tensor) -> Tensor:
        """``(B, L)`` → ``(B, 1, bands, frames)``."""
        if wave.ndim != 2:
            raise ValueError(f"waveforms are (B, L), not {tuple(wave.shape)}.")
        picture = self.spectrogram(wave)[:, : self.frames]
        picture = F.pad(picture, (0, 0, 0, self.frames - picture.shape[1]))
        return ((picture - self.mean) / (2 * self.std)).transpose(1, 2).unsqueeze(1)


def augment_spectrogram(
    picture: Tensor, generator: torch.Generator, bands: int = 48, frames: int = 48, noise: float = 0.1, roll: int = 10
) -> Tensor:
    """Training noise of the audio models: one masked band and span a sample, uniform noise, a roll in time.

    Args:
        picture: ``(B, 1, bands, frames)``, standardised, so that the masks' zeros are the mean.
        generator: of the random numbers, on the CPU.
        bands: largest number of masked rows.
        frames: largest number of masked columns.
        noise: largest amplitude of the noise.
        roll: largest shift in time, both ways, in frames.

    Returns:
        ``(B, 1, bands, frames)``.
    """
    batch, _, height, width = picture.shape
    draw = torch.rand(6, batch, generator=generator)
    hiss = torch.rand(picture.shape, generator=generator) * (noise * draw[0]).view(-1, 1, 1, 1)
    shift = (draw[1] * (2 * roll + 1)).long() - roll
    columns = (torch.arange(width) - shift.unsqueeze(1)) % width  # (B, width)
    picture = picture + hiss.to(picture)
    picture = picture.gather(3, columns.to(picture.device).view(batch, 1, 1, width).expand_as(picture))
    keep = torch.ones(batch, 1, height, width, dtype=torch.bool)
    for axis, size, most, a, b in ((2, height, bands, draw[2], draw[3]), (3, width, frames, draw[4], draw[5])):
        span = (a * (min(most, size) + 1)).long()
        start = (b * (size - span + 1)).long()
        place = torch.arange(size)
        hidden = (place >= start.unsqueeze(1)) & (place < (start + span).unsqueeze(1))
        keep &= ~hidden.view(batch, 1, *((size, 1) if axis == 2 else (1, size)))
    return picture * keep.to(picture)


@part
@checked
class VideoImage(nn.Module):
    """A clip of a square number of frames → one picture.

    ``"raw"`` is the published code: memory is looked at as a larger picture, so every frame becomes a band of rows in
    which consecutive image rows stand side by side. ``"tile"`` is what the paper's text says: frames side by side in a
    square mosaic.

    Shapes: ``(B, C, T, H, W)`` → ``(B, C, √T·H, √T·W)``.

    Raises:
        ValueError: T is not a square.
    """

    def __init__(self, layout: Literal["raw", "tile"] = "raw") -> None:
        super().__init__()
        self.layout = layout

    def forward(self, clip: Tensor) -> Tensor:
        """``(B, C, T, H, W)`` → ``(B, C, √T·H, √T·W)``."""
        if clip.ndim != 5:
            raise ValueError(f"a clip is (B, C, T, H, W), not {tuple(clip.shape)}.")
        batch, channels, time, height, width = clip.shape
        side = math.isqrt(time)
        if side * side != time:
            raise ValueError(f"{time} frames make no square; take {side * side} or {(side + 1) ** 2}.")
        if self.layout == "tile":
            clip = clip.unflatten(2, (side, side)).transpose(3, 4)  # B, C, row, H, column, W
        return clip.reshape(batch, channels, side * height, side * width)


@part
@checked
class SeriesImage(nn.Module):
    """Multivariate series of a group of stations → one square picture a group (the ETT, weather-station model).

    Values go through a circular convolution over time, calendar features and standardised station coordinates through
    linear layers; the sum ``(B, L, dim)`` is looked at as a square.

    Args:
        channels: values a time step.
        length: L, time steps.
        dim: width of the embedding; L · dim must be a square number.
        calendar: calendar features a step (hour, weekday, …); 0 for none.
        coordinates: coordinates of a group of stations together; 0 for none.

    Shapes: ``(B, L, channels)``, with the conditions ``calendar`` ``(B, L, calendar)`` and ``stations``
    ``(B · s, coordinates / s)`` → ``(B, 1, √(L·dim), √(L·dim))``.

    Raises:
        ValueError: L · dim is not a square, or an input has another size or is missing.
    """

    def __init__(
        self, channels: Count, length: Count, dim: Count, calendar: Natural = 0, coordinates: Natural = 0
    ) -> None:
        super().__init__()
        self.side = math.isqrt(length * dim)
        if self.side**2 != length * dim:
            fits = next(d for d in itertools.count(dim) if math.isqrt(length * d) ** 2 == length * d)
            raise ValueError(f"{length} steps of width {dim} make no square picture; dim={fits} would.")
        self.channels, self.length = channels, length
        self.value = nn.Conv1d(channels, dim, 3, padding=1, padding_mode="circular", bias=False)
        self.calendar = nn.Linear(calendar, dim, bias=False) if calendar else None
        self.location = nn.Linear(coordinates, dim) if coordinates else None
        nn.init.kaiming_normal_(self.value.weight, mode="fan_in", nonlinearity="leaky_relu")

    @property
    def conditions(self) -> frozenset[str]:
        """``calendar`` and ``stations`` where the layer was made for them."""
        names = {"calendar": self.calendar, "stations": self.location}
        return frozenset(name for name, layer in names.items() if layer is not None)

    def embed(self, series: Tensor, condition: Condition | None = None) -> Tensor:
        """``(B, L, channels)`` → ``(B, L, dim)``, before folding."""
        if series.shape[1:] != (self.length, self.channels):
            raise ValueError(f"a series {tuple(series.shape)} is not (B, {self.length}, {self.channels}).")
        given = dict(condition or {})
        if missing := self.conditions - given.keys():
            raise ValueError(f"the series comes without its {', '.join(sorted(missing))}.")
        y = self.value(series.transpose(1, 2)).transpose(1, 2)
        if self.calendar is not None:
            y = y + self.calendar(given["calendar"])
        if self.location is not None:
            stations = given["stations"]
            # Over all stations of the batch, so that places are told apart wherever on earth they are.
            spread = stations.std(0, correction=0, keepdim=True).clamp_min(1e-12)
            stations = (stations - stations.mean(0, keepdim=True)) / spread
            y = y + self.location(stations.reshape(series.shape[0], 1, -1))
        return y

    def forward(self, series: Tensor, condition: Condition | None = None) -> Tensor:
        """``(B, L, channels)`` → ``(B, 1, √(L·dim), √(L·dim))``."""
        return self.embed(series, condition).reshape(series.shape[0], 1, self.side, self.side)


#: Euler angles (x, y, z) of the ten published views: four around, four diagonal, below and above.
VIEWS = tuple(
    (turn * math.pi / 4, tilt * math.pi / 4, math.pi / 2)
    for turn, tilt in ((0, 0), (2, 0), (4, 0), (6, 0), (5, -1), (5, 1), (7, -1), (7, 1), (0, -2), (0, 2))
)
_DISTANCE = 1.4


def rotate_points(points: Tensor, views: int) -> Tensor:
    """Points ``(B, N, 3)`` seen from the first ``views`` of :data:`VIEWS`, 1.4 away → ``(B · views, N, 3)``."""
    x, y, z = points.new_tensor(VIEWS[:views]).unbind(1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, 1).reshape(-1, 3, 3)

    around_x = matrix(one, zero, zero, zero, x.cos(), -x.sin(), zero, x.sin(), x.cos())
    around_y = matrix(y.cos(), zero, y.sin(), zero, one, zero, -y.sin(), zero, y.cos())
    around_z = matrix(z.cos(), -z.sin(), zero, z.sin(), z.cos(), zero, zero, zero, one)
    turned = points.unsqueeze(1) @ (around_x @ around_y @ around_z).transpose(1, 2)
    return turned.flatten(0, 1) + points.new_tensor([0, 0, _DISTANCE])


def splat_points(points: Tensor, features: Tensor, size: int, extent: int | None = None) -> Tensor:
    """Add every point's features to the 3x3 cells around its place on the x-y plane, the whole in the picture's middle.

    Args:
        points: ``(B, N, 3)``.
        features: ``(B, C, N)``.
        size: side of the picture in cells.
        extent: cells that the longer side of the object takes; the size by default.

    Returns:
        ``(B, C, size, size)``, x downwards and y to the right. A cloud without extent lands in one 3x3 spot.
    """
    flat = points[..., :2]
    least = flat.amin(1, keepdim=True)
    longest = (flat.amax(1, keepdim=True) - least).amax(2, keepdim=True)
    step = longest.clamp_min(torch.finfo(points.dtype).tiny) / ((extent or size) - 3)
    cell = ((flat - least) / step).floor()
    shifts = torch.cartesian_prod(*(torch.arange(3, device=points.device),) * 2)
    cells = (cell.unsqueeze(2) + shifts).flatten(1, 2).long()  # (B, 9N, 2), from 0
    middle = (cells.amax(1, keepdim=True) + cells.amin(1, keepdim=True)) // 2
    cells = (cells - middle + (size - 1) // 2).clamp(0, size - 1)
    place = (cells[..., 0] * size + cells[..., 1]).unsqueeze(1).expand(-1, features.shape[1], -1)
    spread = features.repeat_interleave(9, dim=2)
    return (
        features.new_zeros(*features.shape[:2], size * size).scatter_add_(2, place, spread).unflatten(2, (size, size))
    )


@part
@checked
class PointImage(nn.Module):
    """A point cloud → pictures from several sides (after P2P): learned point features, splatted and coloured.

    A point's features come from its nearest neighbours, before any rotation: Linear 3 → ``width``, edges
    (neighbour - centre, centre) → ``channels`` with group norm and leaky ReLU, maximum over neighbours, linear.

    Args:
        views: pictures a cloud, at most 10.
        size: side of the pictures in pixels.
        extent: pixels that the object's longer side takes; the size by default.
        neighbours: k of the nearest-neighbour graph, the point itself included; fewer where the cloud is smaller.
        width: point features before the graph.
        channels: after it.

    Shapes: ``(B, N, 3)`` → ``(B · views, 3, size, size)``, normalised like ImageNet; the views of a cloud together.

    Raises:
        ValueError: more views than there are, an extent below 4 pixels or beyond the picture, no neighbours; points
            that are not ``(B, N, 3)``.
    """

    def __init__(
        self,
        views: Count = 4,
        size: Count = 224,
        extent: Count | None = None,
        neighbours: Count = 32,
        width: Count = 8,
        channels: Count = 64,
    ) -> None:
        super().__init__()
        if not 1 <= views <= len(VIEWS):
            raise ValueError(f"{views} views: between 1 and {len(VIEWS)} are known.")
        if not 4 <= (extent or size) <= size or neighbours < 1:
            raise ValueError(
                f"size {size}, extent {extent} and {neighbours} neighbours: the object takes from 4 pixels to the "
                "whole picture, and a point has at least one neighbour, itself."
            )
        self.views, self.size, self.extent, self.neighbours = views, size, extent or size, neighbours
        self.lift = nn.Conv1d(3, width, 1)
        self.edge = nn.Sequential(
            nn.Conv2d(2 * width, channels, 1, bias=False), nn.GroupNorm(4, channels), nn.LeakyReLU(0.2)
        )
        self.mix = nn.Conv1d(channels, channels, 1)
        self.refine = nn.Sequential(BasicBlock(channels, channels), nn.Conv2d(channels, channels, 1))
        self.colour = nn.Conv2d(channels, 3, 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(-1, 1, 1), persistent=False)

    def point_features(self, points: Tensor) -> Tensor:
        """``(B, N, 3)`` → ``(B, channels, N)``."""
        near = torch.cdist(points, points).topk(min(self.neighbours, points.shape[1]), largest=False).indices
        f = self.lift(points.transpose(1, 2))  # B, width, N
        sent = f.unsqueeze(2).expand(-1, -1, points.shape[1], -1)
        others = sent.gather(3, near.unsqueeze(1).expand(-1, f.shape[1], -1, -1))  # B, width, N, k
        centre = f.unsqueeze(3).expand_as(others)
        return self.mix(self.edge(torch.cat([others - centre, centre], 1)).amax(3))

    def splat(self, points: Tensor) -> Tensor:
        """``(B, N, 3)`` → ``(B · views, channels, size, size)``, the raw pictures."""
        features = self.point_features(points).repeat_interleave(self.views, 0)
        return splat_points(rotate_points(points, self.views), features, self.size, self.extent)

    def forward(self, points: Tensor) -> Tensor:
        """``(B, N, 3)`` → ``(B · views, 3, size, size)``."""
        if points.ndim != 3 or points.shape[2] != 3:
            raise ValueError(f"points are (B, N, 3), not {tuple(points.shape)}.")
        picture = self.colour(self.refine(self.splat(points))).sigmoid()
        return (picture - cast(Tensor, self.mean)) / cast(Tensor, self.std)


_POINT_NAMES = [
    (r"^input_trans\.", "lift."),
    (r"^graph_layer\.", "edge."),
    (r"^proj_layer\.", "mix."),
    (r"^img_block\.", "refine."),
    (r"^img_layer\.", "colour."),
]
_SERIES_NAMES = [
    (r"^value_embedding\.tokenConv\.", "value."),
    (r"^temporal_embedding\.embed\.", "calendar."),
    (r"^national_embedding\.location_embedding\.", "location."),
]


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published names of a point-cloud or series adapter (AILab-CVC/UniRepLKNet) in ours."""
    converted = {}
    for name, tensor in state.items():
        for pattern, ours in (*_POINT_NAMES, *_SERIES_NAMES):
            name = re.sub(pattern, ours, name)
        converted[name] = tensor
    return converted
