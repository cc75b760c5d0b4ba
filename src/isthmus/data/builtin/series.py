"""``series``: windows of several series that run side by side, for forecasting. ``series:FILE.csv`` reads your own.

A file has one row a time step and one column a series; columns that hold no numbers (dates) are left out. The first
60 % of the rows are for training, the next 20 % for validation, the rest for testing, and no window crosses a border.
Without a file there are seven drawn series of hours: days, weeks, slow drifts, and noise that lasts a while.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.dataset import Dataset, Unreadable, pick_needs
from isthmus.data.hashing import normal, unit, words
from isthmus.data.readers.headers import read_file
from isthmus.data.splits import check_split, spaced
from isthmus.layers.random import derive_seed

_COLUMNS = ("signal",)
_PARTS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0), "all": (0.0, 1.0)}
_HOURS, _SERIES = 10000, 7


class Series(Dataset):
    """Windows: ``signal`` float32 ``(channels, length)``, every channel standardised by its training part.

    Attributes:
        channels: names of the series.
        mean: of every series over the training part, float64.
        std: likewise.
    """

    def __init__(
        self, name: str, values: np.ndarray, channels: Sequence[str], length: int, part: str, count: int
    ) -> None:
        super().__init__(name, _COLUMNS, in_memory=True)
        training = values[: int(len(values) * _PARTS["train"][1])]
        self.channels, self.length = list(channels), length
        self.mean, self.std = training.mean(0), np.maximum(training.std(0), 1e-8)
        first, last = (int(len(values) * share) for share in _PARTS[part])
        rows = torch.from_numpy(((values[first:last] - self.mean) / self.std).astype(np.float32))
        if len(rows) < length:
            raise UserError(f"{name}: the {part} part has {len(rows)} rows, fewer than a window of {length}.")
        self.windows = rows.unfold(0, length, 1)  # (N, channels, length), a view
        self.starts = spaced(len(self.windows), count or None)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> dict[str, Any]:
        return {"signal": self.windows[int(self.starts[index])].clone()}


def read_csv(path: Path) -> tuple[np.ndarray, list[str]]:
    """The numeric columns of a comma-separated file, float64 ``(rows, columns)``, and their names.

    Raises:
        UserError: there is no such file, no numeric column, or a cell that is no number.
    """
    try:
        text = io.StringIO(read_file(path).decode("utf-8-sig"), newline="")
        rows = [row for row in csv.reader(text) if row]
    except (Unreadable, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table of text ({error}).") from error
    if len(rows) < 2:
        raise UserError(f"{path} has {len(rows)} rows; a heading and one row a time step are needed.")
    named = not any(_is_number(cell) for cell in rows[0])
    heads, body = (rows[0], rows[1:]) if named else ([f"series {i}" for i in range(len(rows[0]))], rows)
    kept = [i for i in range(len(heads)) if i < len(body[0]) and _is_number(body[0][i])]
    if not kept:
        raise UserError(f"{path} has no column of numbers; its first row is {', '.join(body[0][:5])}.")
    try:
        values = np.array([[float(row[i]) for i in kept] for row in body])
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: a row has no number where the first one has ({error}).") from error
    if not np.isfinite(values).all():
        raise UserError(f"{path}: row {int(np.argwhere(~np.isfinite(values))[0, 0]) + 1} is not finite; fill the gaps.")
    return values, [heads[i].strip() for i in kept]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _drawn(seed: int) -> tuple[np.ndarray, list[str]]:
    """Seven series of 10,000 hours that share their days and weeks, each with weights of its own."""
    t = np.arange(_HOURS)[:, None]
    weights = unit(words(derive_seed(seed, "weights"), [0], 6 * _SERIES)).reshape(6, _SERIES)
    noise = normal(words(derive_seed(seed, "noise"), range(_SERIES), 2 * _HOURS)).T
    lasting = np.empty_like(noise)
    level = np.zeros(_SERIES)
    for hour, shock in enumerate(noise):  # every hour depends on the one before
        level = 0.97 * level + 0.25 * shock
        lasting[hour] = level
    day, week, year = (2 * np.pi * (t / period + weights[i]) for i, period in enumerate((24, 168, 8760)))
    values = (0.5 + weights[3]) * (exact.sin(day) + 0.4 * exact.sin(2 * day + 1)) + weights[4] * exact.sin(week)
    return values + (0.5 + weights[5]) * exact.sin(year) + lasting, [f"series {i}" for i in range(_SERIES)]


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    path: str = "",
    length: int = 120,
    count: int = 0,
    name: str = "series",
) -> Series:
    """Windows of ``length`` steps, ``count`` of them at equal distances, or every one."""
    if length < 2 or count < 0:
        raise UserError(f"{name}: length must be at least 2 and count at least 0, got {length} and {count}.")
    parts = check_split(name, split)
    if len(parts) > 1:
        raise UserError(f"{name}: windows of {split} would cross a border; take one part, or all.")
    pick_needs(name, needs, _COLUMNS)
    values, channels = read_csv(Path(path).expanduser()) if path else _drawn(derive_seed("series", seed))
    return Series(name, values, channels, length, parts[0], count)
