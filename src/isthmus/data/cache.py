"""Small images are decoded once, when a source is loaded, and kept as uint8; large ones are decoded when asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any

import torch
from torch import Tensor

from isthmus.data.dataset import Dataset, Memory, Unreadable

_MOST_PIXELS = 96 * 96  # above this decoding in workers keeps up with training, and memory would fill
_MOST_BYTES = 1024 * 2**20


def keep_small(dataset: Dataset) -> Dataset:
    """``dataset``, or the same samples held in memory where images are few and small and all of one size.

    An unreadable sample keeps its number, so that both forms give the same sample for the same number. Loading fails
    here, and not in the middle of a run, where nothing can be read.

    Raises:
        UserError: not one sample is readable.
    """
    first = dataset[0]
    image = first.get("image")
    if not isinstance(image, Tensor) or image[0].numel() > _MOST_PIXELS or len(dataset) * image.numel() > _MOST_BYTES:
        return dataset
    threads = ThreadPoolExecutor(min(8, cpu_count() or 1))
    step = 1024
    columns: dict[str, list[Any]] = {key: [] for key in first if key != "index"}
    store = torch.zeros((len(dataset), *image.shape), dtype=torch.uint8)
    bad: dict[int, tuple[str, str]] = {}

    def read_chunk(start: int) -> list[dict[str, Any] | Unreadable]:
        return [_read(dataset, i) for i in range(start, min(start + step, len(dataset)))]

    with threads:
        for start, chunk in zip(
            range(0, len(dataset), step), threads.map(read_chunk, range(0, len(dataset), step)), strict=True
        ):
            for number, sample in enumerate(chunk, start):
                if isinstance(sample, Unreadable):
                    bad[number] = (dataset.identify(number), str(sample))
                    sample = {key: torch.zeros_like(v) if isinstance(v, Tensor) else v for key, v in first.items()}
                if sample["image"].shape != image.shape:
                    threads.shutdown(cancel_futures=True)
                    return dataset
                store[number] = sample["image"]
                for key, values in columns.items():
                    values.append(sample[key])
    data: dict[str, Any] = {key: _stacked(values) for key, values in columns.items() if key != "image"}
    data["image"] = store
    return Memory(dataset.name, {key: data[key] for key in columns}, dataset.columns, dataset.classes, bad)


def _read(dataset: Dataset, index: int) -> dict[str, Any] | Unreadable:
    try:
        return dataset.read(index)
    except Unreadable as error:
        return error


def _stacked(values: list[Any]) -> Tensor | list[Any]:
    same = all(isinstance(value, Tensor) for value in values) and len({value.shape for value in values}) == 1
    return torch.stack(values) if same else values
