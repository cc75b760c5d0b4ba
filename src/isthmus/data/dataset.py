"""What every source gives: samples by number, as dictionaries with fixed keys, corrupt ones replaced and named."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError
from isthmus.data.hashing import permutation
from isthmus.data.splits import spaced

#: The keys that recipes may ask for; a source may have columns of its own besides.
COLUMNS = ("image", "label", "mask", "boxes", "labels", "caption", "audio", "signal", "tokens", "subject")
#: Columns whose length differs from sample to sample: a batch holds a list of tensors, whatever the lengths are.
RAGGED = ("boxes", "labels", "masks")


class Unreadable(Exception):
    """One sample cannot be read; the message is the reason that ``Dataset.skipped`` reports."""


class Dataset(ABC):
    """Map-style samples: ``len(ds)``, ``ds[i] -> dict``, ``ds.fetch(indices) -> batch``.

    A sample has the columns asked for and ``index``, its int64 number in the source. ``image`` is uint8 ``(3, H, W)``,
    ``label`` and ``subject`` int64 scalars, ``mask`` int64 ``(H, W)``, ``boxes`` float32 ``(K, 4)`` in xyxy pixels with
    ``labels`` int64 ``(K,)``, ``caption`` a string, ``audio`` what the source holds.

    Subclasses implement :meth:`read` and ``__len__``, and may override :meth:`fetch` where whole batches are faster.

    Attributes:
        name: what was asked for, for messages and reports.
        columns: every column that the source has, read or not.
        wanted: the columns that are read.
        classes: names of the labels, or ``None``.
        image_size: ``(H, W)`` where all images are known to have one size; ``None`` otherwise.
        mask_classes: names of the numbers in masks, or ``None``.
        notes: sentences about how the source was understood, for the log and the report.
        in_memory: fetching costs next to nothing, so that worker processes would only slow it down.
        skipped: ``(sample, reason)`` of every unreadable sample met so far.
    """

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        classes: Sequence[str] | None = None,
        image_size: tuple[int, int] | None = None,
        in_memory: bool = False,
    ) -> None:
        self.name = name
        self.columns = tuple(columns)
        self.wanted: tuple[str, ...] = self.columns
        self.classes = None if classes is None else list(classes)
        self.image_size = image_size
        self.in_memory = in_memory
        self.mask_classes: list[str] | None = None
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def like(self, dataset: Dataset) -> Self:
        """Take over what is known of the source that ``dataset`` holds too."""
        self.mask_classes, self.notes = dataset.mask_classes, dataset.notes
        return self

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> dict[str, Any]:
        """Sample ``index`` without replacement, and without its ``index`` key.

        Raises:
            Unreadable: the sample is damaged.
        """

    def read_many(self, indices: Sequence[int]) -> list[dict[str, Any] | Unreadable]:
        """Several samples, the error in the place of a damaged one; overridden where that is faster than one by one."""
        samples: list[dict[str, Any] | Unreadable] = []
        for index in indices:
            try:
                samples.append(self.read(index))
            except Unreadable as error:
                samples.append(error)
        return samples

    def identify(self, index: int) -> str:
        """What a person calls sample ``index``: its file or row."""
        return f"sample {index}"

    def number(self, index: int) -> int:
        """The number in the source of sample ``index``; they differ in a subset."""
        return index

    def order(self, seed: int) -> np.ndarray:
        """The numbers of the samples that an epoch of training visits, ``(len,)``; ``seed`` is the epoch's."""
        return permutation(len(self), seed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        return self.samples([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of several numbers (what ``torch.utils.data.DataLoader`` calls)."""
        return self.samples(indices)

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        """The samples of several numbers as one batch, see :func:`collate`.

        Args:
            indices: sample numbers.
            replace: put the next readable sample in the place of an unreadable one; else leave it out.
        """
        return collate(self.samples(indices, replace))

    def samples(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> list[dict[str, Any]]:
        """The samples of several numbers as a list; ``replace`` as in :meth:`fetch`."""
        numbers, samples = [int(i) for i in indices], []
        for index, sample in zip(numbers, self.read_many(numbers), strict=True):
            if isinstance(sample, Unreadable):
                self._skip(index, sample)
                if not replace:
                    continue
                index, sample = self._next(index)
            samples.append({**sample, "index": torch.tensor(self.number(index))})
        return samples

    def select(self, indices: Sequence[int] | np.ndarray) -> Subset:
        """A view of some samples, in the order given; ``index`` still tells their number in the whole."""
        return Subset(self, indices)

    def first(self, number: int) -> Dataset:
        """The first ``number`` samples; all of them where there are fewer, or for 0."""
        if number < 0:
            raise ValueError(f"a number of samples is 0 (all of them) or more, got {number}")
        return self.select(np.arange(number)) if 0 < number < len(self) else self

    def spread(self, number: int) -> Dataset:
        """``number`` samples at equal distances, so that a source that is sorted by class shows all of them."""
        return self.select(spaced(len(self), number))

    def select_columns(self, columns: Sequence[str]) -> Self:
        """The same samples with some of the columns ``wanted``; nothing is read or decoded for the others."""
        lacking = [column for column in columns if column not in self.wanted]
        if lacking:
            raise ValueError(f"{self.name} was loaded with {', '.join(self.wanted)}, without {', '.join(lacking)}")
        chosen = copy.copy(self)
        chosen._keep_columns(tuple(columns))
        return chosen

    def _keep_columns(self, columns: tuple[str, ...]) -> None:
        """Read these alone from now on; ``self`` is a copy."""
        self.wanted = columns

    @property
    def labels(self) -> np.ndarray:
        """The label of every sample, int64 ``(N,)``; no picture is read.

        Raises:
            UserError: the source has no labels.
            ValueError: ``label`` is not among the columns that it was loaded with.
        """
        if "label" not in self.columns:
            raise UserError(f"{self.name} has no labels; it has: {', '.join(self.columns)}.")
        alone = self.select_columns(("label",))
        batches = (range(start, min(start + 4096, len(self))) for start in range(0, len(self), 4096))
        return np.array([int(label) for batch in batches for label in alone.fetch(batch)["label"]], dtype=np.int64)

    def natural_size(self) -> tuple[int, int]:
        """Height and width of the pictures; of the first readable one where they differ."""
        if self.image_size is not None:
            return self.image_size
        height, width = self.select_columns(("image",))[0]["image"].shape[-2:]
        return int(height), int(width)

    def _skip(self, index: int, error: Unreadable) -> None:
        entry = (self.identify(index), str(error))
        if entry not in self.skipped:
            self.skipped.append(entry)

    def _next(self, index: int) -> tuple[int, dict[str, Any]]:
        """The readable sample that follows ``index``, starting again at the end."""
        for step in range(1, len(self)):
            number = (index + step) % len(self)
            sample = self.read_many([number])[0]
            if not isinstance(sample, Unreadable):
                return number, sample
            self._skip(number, sample)
        first, reason = self.skipped[0]
        raise UserError(
            f"{self.name}: none of its {len(self)} samples can be read ({first}: {reason}); give one whose files open."
        )


class Subset(Dataset):
    """Some samples of a dataset, see :meth:`Dataset.select`. Replacements, too, come from these samples only."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | np.ndarray) -> None:
        super().__init__(dataset.name, dataset.columns, dataset.classes, dataset.image_size, dataset.in_memory)
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        if self.indices.size and (self.indices.min() < 0 or self.indices.max() >= len(dataset)):
            raise ValueError(f"select takes numbers from 0 to {len(dataset) - 1}")
        self.skipped, self.wanted = dataset.skipped, dataset.wanted
        self.like(dataset)

    def __len__(self) -> int:
        return len(self.indices)

    def _keep_columns(self, columns: tuple[str, ...]) -> None:
        super()._keep_columns(columns)
        self.dataset = self.dataset.select_columns(columns)

    def read(self, index: int) -> dict[str, Any]:
        return self.dataset.read(int(self.indices[index]))

    def read_many(self, indices: Sequence[int]) -> list[dict[str, Any] | Unreadable]:
        return self.dataset.read_many(self.indices[list(indices)].tolist())

    def identify(self, index: int) -> str:
        return self.dataset.identify(int(self.indices[index]))

    def number(self, index: int) -> int:
        return self.dataset.number(int(self.indices[index]))

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        chosen = self.indices[np.asarray(indices, dtype=np.int64)]
        if isinstance(self.dataset, Memory) and self.dataset.bad.keys().isdisjoint(chosen.tolist()):
            return self.dataset.fetch(chosen)
        return super().fetch(indices, replace)


class Drawn(Dataset):
    """Samples that are drawn when they are asked for, several at once: :meth:`draw` is all that a source has to write.

    Args:
        wanted: the columns to draw, of ``columns``.
        count: number of samples.
        seed: of the source and split; sample i is a function of it and i.

    The others are those of :class:`Dataset`.
    """

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        wanted: Sequence[str],
        count: int,
        seed: int,
        classes: Sequence[str] | None = None,
        image_size: tuple[int, int] | None = None,
        in_memory: bool = False,
    ) -> None:
        super().__init__(name, columns, classes, image_size, in_memory)
        self.wanted, self.count, self.seed = tuple(wanted), count, seed

    @abstractmethod
    def draw(self, indices: Sequence[int]) -> dict[str, Any]:
        """The columns wanted: a tensor of all samples, or a list with something of each."""

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, Any]:
        return {column: values[0] for column, values in self.draw([index]).items()}

    def read_many(self, indices: Sequence[int]) -> list[dict[str, Any] | Unreadable]:
        """Several samples, drawn together."""
        data = self.draw(indices)
        return [{column: values[i] for column, values in data.items()} for i in range(len(indices))]


class Memory(Dataset):
    """Samples that stand in memory: one tensor or list a column, all of one length.

    Args:
        name: of the source.
        data: column → tensor ``(N, …)`` or list of N values.
        columns: every column of the source, where ``data`` holds only those asked for.
        classes: names of the labels.
        bad: sample number → ``(identity, reason)`` of samples whose rows hold nothing.
    """

    def __init__(
        self,
        name: str,
        data: Mapping[str, Tensor | Sequence[Any]],
        columns: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        bad: Mapping[int, tuple[str, str]] | None = None,
    ) -> None:
        image = data.get("image")
        size = (int(image.shape[-2]), int(image.shape[-1])) if isinstance(image, Tensor) else None
        super().__init__(name, columns or tuple(data), classes, size, in_memory=True)
        lengths = {key: len(values) for key, values in data.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must have one length, got {lengths}")
        self.data = dict(data)
        self.wanted = tuple(data)
        self._length = next(iter(lengths.values()))
        self.bad = dict(bad or {})
        self.skipped = list(self.bad.values())

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise Unreadable(self.bad[index][1])
        return {key: values[index] for key, values in self.data.items()}

    def identify(self, index: int) -> str:
        return self.bad[index][0] if index in self.bad else super().identify(index)

    def _keep_columns(self, columns: tuple[str, ...]) -> None:
        super()._keep_columns(columns)
        self.data = {column: self.data[column] for column in columns}

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        numbers = np.asarray(indices, dtype=np.int64)
        if self.bad and not self.bad.keys().isdisjoint(numbers.tolist()):
            return super().fetch(indices, replace)
        chosen = torch.as_tensor(numbers)
        batch: dict[str, Any] = {
            key: values[chosen] if isinstance(values, Tensor) else [values[i] for i in numbers.tolist()]
            for key, values in self.data.items()
        }
        return {**batch, "index": chosen}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples → a batch: tensors are stacked, strings and bytes listed, :data:`RAGGED` columns always listed.

    Raises:
        UserError: images or masks differ in size.
    """
    batch: dict[str, Any] = {}
    for key in samples[0] if samples else ():
        values = [sample[key] for sample in samples]
        if not all(isinstance(value, Tensor) for value in values) or key in RAGGED:
            batch[key] = values
        elif len({value.shape for value in values}) == 1:
            batch[key] = torch.stack(values)
        elif key in ("image", "mask"):
            sizes = sorted({tuple(value.shape[-2:]) for value in values})
            shown = ", ".join(f"{h}×{w}" for h, w in sizes[:3]) + (" …" if len(sizes) > 3 else "")
            raise UserError(
                f"{key}s of one batch differ in size ({shown}); give a transform that makes them equal, such as "
                "RandomResizedCrop(size) for training or Resize(size) with CenterCrop(size) for evaluation."
            )
        else:
            batch[key] = values
    return batch


def pick_needs(name: str, needs: Sequence[str], available: Sequence[str], hint: str = "") -> tuple[str, ...]:
    """The columns to read: all of ``needs`` (those ending in ``?`` only if the source has them).

    Args:
        name: of the source.
        needs: what a job reads.
        available: what the source has.
        hint: what to do where a column is missing.

    Raises:
        UserError: a needed column is missing; the message lists those that are there.
    """
    wanted, missing = [], []
    for need in needs:
        column = need.removesuffix("?")
        if column in available:
            wanted.append(column)
        elif not need.endswith("?"):
            missing.append(column)
    if missing:
        what = "columns " + ", ".join(missing) if len(missing) > 1 else f"column {missing[0]}"
        raise UserError(
            f"{name} has no {what}, which this job needs; it has: {', '.join(available)}.{f' {hint}.' if hint else ''}"
        )
    return tuple(wanted)
