"""Pictures with known causes: which columns tell of them, and the causes as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isthmus.codec import UserError
from isthmus.data.dataset import Dataset, Memory
from isthmus.data.loading import evaluation_batches
from isthmus.data.sources import load
from isthmus.data.transforms import Transform

#: Bytes of pixels that are kept in memory rather than read again in every epoch.
MEMORY = 2**28
_NO_CAUSES = ("image", "index", "mask", "masks", "boxes", "labels", "caption", "audio", "signal", "tokens", "depth")


class Factors(NamedTuple):
    """Causes of pictures.

    Attributes:
        values: ``(n, S)`` numbers; categories that are words are numbered.
        names: of the S causes.
        notes: sentences on columns that were left out.
    """

    values: Tensor
    names: list[str]
    notes: list[str]


def factor_columns(dataset: Dataset, asked: Sequence[str] = ()) -> list[str]:
    """Columns that tell of causes: those asked for, or ``factors``, or every column of one number or word a sample.

    Raises:
        UserError: a column asked for is not there.
    """
    if missing := [name for name in asked if name not in dataset.columns]:
        raise UserError(f"{dataset.name} has no column {missing[0]!r}; it has: {', '.join(dataset.columns)}.")
    if asked:
        return list(asked)
    if "factors" in dataset.columns:
        return ["factors"]
    return [name for name in dataset.columns if name not in _NO_CAUSES and not name.startswith("__")]


def load_with_factors(
    source: str, split: str, seed: int, asked: Sequence[str], transform: Transform, limit: int | None = None
) -> tuple[Dataset, list[str]]:
    """Pictures, in memory where they fit, and the columns that tell of causes.

    Args:
        source: what stands after ``--data``.
        split: part of it.
        seed: of sources that are drawn.
        asked: columns; all that may tell of causes without them.
        transform: to the size that is trained on, so that pictures of one size are kept in memory.
        limit: samples to read, at most.

    Raises:
        UserError: a stream, a column that is not there, no readable picture.
    """
    columns = factor_columns(load(source, split, ("image",), seed), asked)
    try:
        dataset = load(source, split, ("image", *columns), seed)
    except UserError:
        if asked:
            raise
        dataset, columns = load(source, split, ("image",), seed), []
    if not hasattr(dataset, "__len__"):
        raise UserError(f"{source} is a stream; give a source that can be read more than once.")
    if limit is not None:
        dataset = dataset.select(range(min(len(dataset), limit)))
    first = next(evaluation_batches(dataset, 1, transform=transform), None)
    if first is None:
        raise UserError(f"{source} has no readable picture.")
    if len(dataset) * first["image"][0].numel() <= MEMORY:
        return in_memory(dataset, columns, transform), columns
    return dataset, columns


def in_memory(dataset: Dataset, columns: Sequence[str], transform: Transform) -> Memory:
    """All pictures at their final size, as bytes, and all of some columns."""
    found: dict[str, list[Any]] = {name: [] for name in ("image", *columns)}
    for batch in evaluation_batches(dataset, 256, transform=transform):
        found["image"] += list((batch["image"] * 255).round().byte())
        for name in columns:
            found[name] += list(batch[name])
    data: dict[str, Any] = {
        name: torch.stack(values) if all(isinstance(value, Tensor) for value in values) else values
        for name, values in found.items()
    }
    memory = Memory(dataset.name, data, dataset.columns, dataset.classes)
    memory.notes, memory.skipped = dataset.notes, dataset.skipped
    if names := getattr(dataset, "factor_names", None):
        memory.factor_names = names  # type: ignore[attr-defined]
    return memory


def factors(batch: Mapping[str, Any], columns: Sequence[str], names: Sequence[str] = ()) -> Factors:
    """Causes as numbers; columns that are no categories are left out, and so are causes that never change.

    Args:
        batch: columns of all samples.
        columns: those that tell of causes, one cause each, or several as ``(n, S)``.
        names: of the causes of a column that holds several.
    """
    found, found_names, notes = [], [], []
    for column in columns:
        values = batch[column]
        if isinstance(values, Tensor) and values.ndim == 2:
            found += list(values.double().T)
            several = [f"{column}{i}" for i in range(values.shape[1])]
            found_names += list(names) if len(names) == values.shape[1] else several
            continue
        try:
            numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
        except (TypeError, ValueError):
            if not all(isinstance(value, str) for value in values):
                notes.append(f"The column {column} holds neither numbers nor words, and is left out.")
                continue
            known = {word: number for number, word in enumerate(sorted(set(values)))}
            numbers = torch.tensor([known[value] for value in values], dtype=torch.float64)
        if len(numbers.unique()) > max(50, len(numbers) // 10) or not bool(numbers.isfinite().all()):
            notes.append(f"The column {column} takes too many values to be a category, and is left out.")
            continue
        found.append(numbers)
        found_names.append(column)
    varies = [i for i, values in enumerate(found) if len(values.unique()) > 1]
    stacked = torch.stack([found[i] for i in varies], 1) if varies else torch.empty(0, 0)
    return Factors(stacked, [found_names[i] for i in varies], notes)
