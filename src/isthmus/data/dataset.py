"""What every source gives: samples by number, as dictionaries with fixed keys, corrupt ones replaced and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError

#: The keys that recipes may ask for; a source may have columns of its own besides.
COLUMNS = ("image", "label", "mask", "boxes", "labels", "caption", "audio", "signal", "tokens", "subject")
#: Columns whose length differs from sample to sample: a batch holds a list of tensors, whatever the lengths are.
RAGGED = ("boxes", "labels")


class Unreadable(Exception):
    """One sample cannot be read; the message is the reason that ``Dataset.skipped`` reports."""


class Dataset:
    """Map-style samples: ``len(ds)``, ``ds[i] -> dict``, ``ds.fetch(indices) -> batch``.

    A sample has the columns asked for and ``index``, its int64 number in the source. ``image`` is uint8 ``(3, H, W)``,
    ``label`` and ``subject`` int64 scalars, ``mask`` int64 ``(H, W)``, ``boxes`` float32 ``(K, 4)`` in xyxy pixels with
    ``labels`` int64 ``(K,)``, ``caption`` a string, ``audio`` what the source holds.

    Subclasses implement :meth:`read` and ``__len__``, and may override :meth:`fetch` where whole batches are faster.

    Attributes:
        name: what was asked for, for messages and reports.
        columns: every column that the source has, read or not.
        classes: names of the labels, or ``None``.
        image_size: ``(H, W)`` where all images are known to have one size; ``None`` otherwise.
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
        self.classes = None if classes is None else list(classes)
        self.image_size = image_size
        self.in_memory = in_memory
        self.skipped: list[tuple[str, str]] = []
        self._bad: set[int] = set()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> dict[str, Any]:
        """Sample ``index`` without replacement, and without its ``index`` key.

        Raises:
            Unreadable: the sample is damaged.
        """
        raise NotImplementedError

    def identify(self, index: int) -> str:
        """What a person calls sample ``index``: its file or row."""
        return f"sample {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, asked for number {index}")
        return self._replaced(index % len(self))

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of several numbers (what ``torch.utils.data.DataLoader`` calls)."""
        return [self[int(i)] for i in indices]

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        """The samples of several numbers as one batch, see :func:`collate`.

        Args:
            indices: sample numbers.
            replace: put the next readable sample in the place of an unreadable one; else leave it out.
        """
        return collate(self.samples(indices, replace))

    def samples(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> list[dict[str, Any]]:
        """The samples of several numbers as a list; ``replace`` as in :meth:`fetch`."""
        if replace:
            return self.__getitems__([int(i) for i in indices])
        read = ((int(i), self._readable(int(i))) for i in indices)
        return [{**sample, "index": torch.tensor(i)} for i, sample in read if sample is not None]

    def select(self, indices: Sequence[int] | np.ndarray) -> Subset:
        """A view of some samples, in the order given; ``index`` still tells their number in the whole."""
        return Subset(self, indices)

    def _readable(self, index: int) -> dict[str, Any] | None:
        if index in self._bad:
            return None
        try:
            return self.read(index)
        except Unreadable as error:
            self._bad.add(index)
            self.skipped.append((self.identify(index), str(error)))
            return None

    def _replaced(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            number = (index + step) % len(self)
            sample = self._readable(number)
            if sample is not None:
                return {**sample, "index": torch.tensor(number)}
        first, reason = self.skipped[0]
        raise UserError(
            f"{self.name}: none of its {len(self)} samples can be read ({first}: {reason}); give one whose files open."
        )


class Subset(Dataset):
    """Some samples of a dataset, see :meth:`Dataset.select`."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | np.ndarray) -> None:
        super().__init__(dataset.name, dataset.columns, dataset.classes, dataset.image_size, dataset.in_memory)
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        if self.indices.size and (self.indices.min() < 0 or self.indices.max() >= len(dataset)):
            raise ValueError(f"select takes numbers from 0 to {len(dataset) - 1}")
        self.skipped = dataset.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> dict[str, Any]:
        return self.dataset.read(int(self.indices[index]))

    def identify(self, index: int) -> str:
        return self.dataset.identify(int(self.indices[index]))

    def _replaced(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):  # the next readable one of the subset, so that test samples never enter training
            number = int(self.indices[(index + step) % len(self)])
            sample = self.dataset._readable(number)
            if sample is not None:
                return {**sample, "index": torch.tensor(number)}
        return super()._replaced(index)

    def _readable(self, index: int) -> dict[str, Any] | None:
        return self.dataset._readable(int(self.indices[index]))

    def samples(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> list[dict[str, Any]]:
        if self.in_memory and not self.dataset._bad:
            return self.dataset.samples(self.indices[np.asarray(indices)], replace)
        samples = super().samples(indices, replace)
        return samples if replace else [{**s, "index": torch.tensor(int(self.indices[s["index"]]))} for s in samples]

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        if self.in_memory and not self.dataset._bad:
            return self.dataset.fetch(self.indices[np.asarray(indices)], replace)
        return super().fetch(indices, replace)


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
        self._length = next(iter(lengths.values()))
        self._bad = set(bad or {})
        self.skipped = list((bad or {}).values())

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> dict[str, Any]:
        return {key: values[index] for key, values in self.data.items()}

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        if self._bad:
            return super().fetch(indices, replace)
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        batch: dict[str, Any] = {
            key: values[chosen] if isinstance(values, Tensor) else [values[i] for i in chosen.tolist()]
            for key, values in self.data.items()
        }
        return {**batch, "index": chosen}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples → a batch: tensors are stacked, strings and bytes listed, ``boxes`` and ``labels`` always listed.

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


def pick_needs(name: str, needs: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    """The columns to read: all of ``needs`` (those ending in ``?`` only if the source has them).

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
        raise UserError(f"{name} has no {what}, which this job needs; it has: {', '.join(available)}.")
    return tuple(wanted)
