"""Data of tasks of several modalities: what to train and to measure on, as tensors of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isthmus.codec import UserError
from isthmus.data import Dataset, Memory, load
from isthmus.data.inputs import Inputs
from isthmus.data.readers.local import local
from isthmus.data.readers.sounds import Sounds
from isthmus.data.subsets import class_names
from isthmus.data.transforms import Transform
from isthmus.data.transforms.augmentation import Augmentation, training_transform
from isthmus.tasks.modalities.settings import COLUMNS

_MOST_IN_MEMORY = 4096  # samples of drawn sources, which are then drawn once


def sources(config: Any, name: str, seed: int) -> tuple[Dataset, Dataset]:
    """What to train and to measure a task on."""
    task: Any = getattr(config, name)
    if name == "forecast":
        address = task.data
        if address == "auto":
            here = local("ett/ETTh1.csv")
            address = f"series:{here}" if here else "series"
        length = task.length + task.horizon
        both = zip((config.train_split, config.eval_split), task.windows, strict=True)
        train, held_out = (load(address, part, ("signal",), seed, length=length, count=count) for part, count in both)
        return train, held_out
    columns = (COLUMNS[name], "label")
    train, held_out = (load(task.data, part, columns, seed) for part in (config.train_split, config.eval_split))
    if config.test_samples and config.test_samples < len(held_out):
        held_out = held_out.select(range(config.test_samples))  # type: ignore[arg-type]
    if name == "audio" and isinstance(train[0]["audio"], bytes):
        length = int(task.rate * task.window) + (task.frames - 1) * int(task.rate * task.hop)
        return Sounds(train, task.rate, length), Sounds(held_out, task.rate, length)
    return train, held_out


def prepared(dataset: Dataset, name: str) -> Dataset:
    """Drawn samples are drawn once, where they fit."""
    if dataset.in_memory or name == "image" or len(dataset) > _MOST_IN_MEMORY:
        return dataset
    batch = dataset.fetch(range(len(dataset)), replace=False)  # type: ignore[arg-type]
    if not isinstance(batch[COLUMNS[name]], Tensor):
        raise UserError(
            f"{dataset.name}: {COLUMNS[name]} of different lengths or in files; arrays of one size are needed."
        )
    data = {column: batch[column] for column in (COLUMNS[name], "label") if column in batch}
    return Memory(dataset.name, data, dataset.columns, dataset.classes)


def shape_of(dataset: Dataset, name: str) -> list[int]:
    return list(dataset[0][COLUMNS[name]].shape)


def classes_of(name: str, train: Any, held_out: Dataset) -> list[str]:
    """Names of the classes, or of the series that are forecast."""
    if name == "forecast":
        return list(train.channels)
    return class_names(train, held_out)


def input_of(name: str, batch: Mapping[str, Any], config: Any) -> Tensor:
    x = batch[COLUMNS[name]]
    return x[..., : config.forecast.length] if name == "forecast" else x


def transforms_of(name: str, task: Any, num_classes: int) -> tuple[Transform | None, Transform | None]:
    """Of samples for training and for measuring; only pictures are changed."""
    if name != "image":
        return None, None
    size = (task.size, task.size)
    inputs = Inputs.of(None, size, crop_pct=1.0)
    train = training_transform(size, inputs.resized, num_classes, Augmentation(), inputs.mean, inputs.std)
    return train, inputs.transform()
