"""One network for several modalities: settings, data, networks, measures, and use on a person's files."""

from isthmus.tasks.modalities.data import classes_of, input_of, prepared, shape_of, sources, transforms_of
from isthmus.tasks.modalities.measures import check_networks, measured, merge_gap
from isthmus.tasks.modalities.models import make_model, make_objective
from isthmus.tasks.modalities.pictures import draw_inputs
from isthmus.tasks.modalities.settings import (
    COLUMNS,
    AudioTask,
    ForecastTask,
    ImageTask,
    PointsTask,
    SeriesTask,
    VideoTask,
)
from isthmus.tasks.modalities.using import apply, keep

__all__ = [
    "COLUMNS",
    "AudioTask",
    "ForecastTask",
    "ImageTask",
    "PointsTask",
    "SeriesTask",
    "VideoTask",
    "apply",
    "check_networks",
    "classes_of",
    "draw_inputs",
    "input_of",
    "keep",
    "make_model",
    "make_objective",
    "measured",
    "merge_gap",
    "prepared",
    "shape_of",
    "sources",
    "transforms_of",
]
