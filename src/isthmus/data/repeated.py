"""Repeated augmentation: a batch holds several copies of an image, each augmented on its own (arXiv 1901.09335)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.codec import UserError
from isthmus.data.dataset import Dataset, Memory, Unreadable
from isthmus.data.hashing import permutation

#: Images whose copies stand together in an epoch: all first copies, all second ones, … Neighbours are never copies,
#: so that what pairs neighbours (:class:`isthmus.data.transforms.Mixup`) mixes different images.
GROUP = 64


class Repeated(Dataset):
    """A data set whose epoch is as long as before, but visits one image of ``times``, each so many times.

    Copy c of sample i has the number i + c · N, so that transforms of single samples, which draw by number, differ
    between copies; its ``index`` is that of the sample.

    Args:
        dataset: of N samples, with a length.
        times: copies of a sample that is visited; 3 in DeiT's recipe.

    Raises:
        UserError: less than one copy, or a stream, whose order is its own.
    """

    def __init__(self, dataset: Dataset, times: int = 3) -> None:
        if times < 1 or not isinstance(dataset, Dataset):
            raise UserError(
                f"{dataset.name} cannot be repeated {times} times: it takes a source with a length, and 1 or more."
            )
        super().__init__(dataset.name, dataset.columns, dataset.classes, dataset.image_size, dataset.in_memory)
        self.dataset, self.times = dataset, times
        self.skipped, self.wanted = dataset.skipped, dataset.wanted
        self.like(dataset)

    def _keep_columns(self, columns: tuple[str, ...]) -> None:
        super()._keep_columns(columns)
        self.dataset = self.dataset.select_columns(columns)

    def __len__(self) -> int:
        return len(self.dataset)

    def order(self, seed: int) -> np.ndarray:
        """One sample of ``times``, chosen anew every epoch; its copies within ``GROUP`` · ``times`` places."""
        count = len(self)
        chosen = permutation(count, seed)[: -(-count // self.times)]
        copies = np.arange(self.times)[:, None] * count
        groups = [(copies + chosen[i : i + GROUP]).ravel() for i in range(0, len(chosen), GROUP)]
        return np.concatenate(groups)[:count]

    def read(self, index: int) -> dict[str, Any]:
        return self.dataset.read(index % len(self))

    def read_many(self, indices: Sequence[int]) -> list[dict[str, Any] | Unreadable]:
        return self.dataset.read_many([index % len(self) for index in indices])

    def identify(self, index: int) -> str:
        return self.dataset.identify(index % len(self))

    def number(self, index: int) -> int:
        return self.dataset.number(index % len(self))

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        if isinstance(self.dataset, Memory):
            return self.dataset.fetch(np.asarray(indices, dtype=np.int64) % len(self), replace)
        return super().fetch(indices, replace)
