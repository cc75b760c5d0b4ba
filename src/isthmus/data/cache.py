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
_CHUNK = 1024


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
    store = torch.empty((len(dataset), *image.shape), dtype=torch.uint8)
    columns: dict[str, list[Any]] = {key: [] for key in first if key not in ("index", "image")}
    bad: dict[int, tuple[str, str]] = {}
    blank = {key: torch.zeros_like(value) if isinstance(value, Tensor) else value for key, value in first.items()}

    def read(start: int) -> list[dict[str, Any] | Unreadable] | None:
        """Read a chunk and store its images; ``None`` where one has another size."""
        chunk = dataset.read_many(range(start, min(start + _CHUNK, len(dataset))))
        images = [blank["image"] if isinstance(sample, Unreadable) else sample["image"] for sample in chunk]
        if any(each.shape != image.shape for each in images):
            return None
        store[start : start + len(chunk)] = torch.stack(images)
        return [s if isinstance(s, Unreadable) else {key: s[key] for key in columns} for s in chunk]

    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as threads:
        for start, chunk in enumerate(threads.map(read, range(0, len(dataset), _CHUNK))):
            if chunk is None:
                threads.shutdown(cancel_futures=True)
                return dataset
            for number, sample in enumerate(chunk, start * _CHUNK):
                if isinstance(sample, Unreadable):
                    bad[number] = (dataset.identify(number), str(sample))
                    sample = blank
                for key, values in columns.items():
                    values.append(sample[key])
    data: dict[str, Any] = {"image": store, **{key: _stacked(values) for key, values in columns.items()}}
    ordered = {key: data[key] for key in first if key in data}
    return Memory(dataset.name, ordered, dataset.columns, dataset.classes, bad).like(dataset)


def _stacked(values: list[Any]) -> Tensor | list[Any]:
    same = all(isinstance(value, Tensor) for value in values) and len({value.shape for value in values}) == 1
    return torch.stack(values) if same else values
