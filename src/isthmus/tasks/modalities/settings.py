"""Tasks of several modalities as settings: data, training, and the picture that a sample becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from isthmus.bounds import Range
from isthmus.engine import Training


@dataclass(frozen=True)
class Task:
    """One modality: its data, how long to learn it, and the picture that it becomes."""

    data: str
    """A source; see `isthmus show` for the built-in ones."""
    training: Training
    """Training of every network."""
    smoothing: Annotated[float, Range(0, 1, most_open=True)] = 0.0
    """Label smoothing."""


@dataclass(frozen=True)
class ImageTask(Task):
    """Pictures as they are."""

    size: int = 32
    """Pixels a side."""


@dataclass(frozen=True)
class AudioTask(Task):
    """Sound as a log-mel spectrogram, frequency upwards, time rightwards; WAV files of tables may differ in length."""

    rate: int = 8000
    """Samples a second."""
    bands: int = 16
    """Mel bands: the height."""
    frames: int = 128
    """Moments: the width."""
    window: float = 0.025
    """Seconds that one moment covers."""
    hop: float = 0.0078
    """Seconds from one moment to the next."""
    mean: float = -3.8
    """Mean of the spectrogram, for standardising."""
    std: float = 2.5
    """Its standard deviation."""
    binary: bool = False
    """One binary decision a class, as published, in place of one decision among all."""


@dataclass(frozen=True)
class VideoTask(Task):
    """A square number of frames in one picture."""

    layout: Literal["tile", "raw"] = "tile"
    """Frames side by side, or, as the published code has it, each a band of interleaved rows."""


@dataclass(frozen=True)
class PointsTask(Task):
    """Points seen from several sides."""

    views: int = 2
    """Sides."""
    size: int = 32
    """Pixels a side."""
    neighbours: int = 8
    """Points near a point that its features are made from, itself included."""
    width: int = 8
    """Features of a point before that."""
    channels: int = 8
    """And after."""


@dataclass(frozen=True)
class SeriesTask(Task):
    """A series folded into a square: every time step is a stretch of ``dim`` values, row after row."""

    dim: int = 24
    """Values that a time step becomes; length times dim must be a square."""


@dataclass(frozen=True)
class ForecastTask(Task):
    """The future of several series from their past, folded likewise."""

    dim: int = 24
    """Values that a time step becomes; length times dim must be a square."""
    length: int = 96
    """Time steps seen."""
    horizon: int = 24
    """Time steps forecast."""
    windows: tuple[int, ...] = (800, 400)
    """Windows to train and to measure on, at equal distances; 0 is every one."""


#: Task → the batch column that it reads.
COLUMNS = {
    "image": "image",
    "audio": "audio",
    "video": "video",
    "points": "points",
    "series": "signal",
    "forecast": "signal",
}
