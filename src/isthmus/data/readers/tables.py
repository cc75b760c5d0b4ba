"""``parquet:PATH`` and ``hub:NAME``: tables read through Hugging Face ``datasets``, which maps them into memory.

A path is a file, a glob or a folder. File names and the folders between say the split
(``train-00000-of-00004.parquet``, ``validation/a.parquet``); what is missing is carved out as
:mod:`isthmus.data.splits` says.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus.codec import UserError
from isthmus.data.cache import keep_small
from isthmus.data.dataset import Dataset, Unreadable, pick_needs
from isthmus.data.readers.columns import Columns
from isthmus.data.splits import divide, name_parts, row_fractions, spaced

_STREAM_ABOVE = 32 * 2**30  # bytes of parquet that are no longer copied into the cache of datasets


class Table(Dataset):
    """Rows of a table, decoded when they are asked for.

    Args:
        name: of the source.
        table: the rows, with images left encoded.
        rows: which rows are meant, and in which order.
        columns: turns rows into samples.
        wanted: the columns to read.
        places: ``(first row, file)`` of every file, in order, to name a row.
    """

    def __init__(
        self,
        name: str,
        table: datasets.Dataset,
        rows: np.ndarray,
        columns: Columns,
        wanted: Sequence[str],
        places: Sequence[tuple[int, str]],
    ) -> None:
        super().__init__(name, tuple(columns.source), columns.names.get("label") or columns.names.get("labels"))
        self.table = encoded(table).select_columns(columns.top(wanted))
        self.rows, self.names, self.wanted, self.places = rows, columns, tuple(wanted), list(places)

    def _keep_columns(self, columns: tuple[str, ...]) -> None:
        super()._keep_columns(columns)
        self.table = self.table.select_columns(self.names.top(columns))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> dict[str, Any]:
        return self.names.sample(self.table[int(self.rows[index])], self.wanted)

    def read_many(self, indices: Sequence[int]) -> list[dict[str, Any] | Unreadable]:
        if not len(indices):
            return []
        cells = self.table[self.rows[np.asarray(indices, dtype=np.int64)].tolist()]
        samples: list[dict[str, Any] | Unreadable] = []
        for values in zip(*cells.values(), strict=True):
            try:
                samples.append(self.names.sample(dict(zip(cells, values, strict=True)), self.wanted))
            except Unreadable as error:
                samples.append(error)
        return samples

    def identify(self, index: int) -> str:
        row = int(self.rows[index])
        start, file = self.places[bisect_right([first for first, _ in self.places], row) - 1]
        return f"row {row - start} of {file}"


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    path: str,
    stream: int = -1,
    buffer: int = 1024,
    boxes_format: str = "xyxy",
    renames: Mapping[str, str] | None = None,
    limit: int | None = None,
    name: str = "parquet",
) -> Any:
    """The rows of parquet files.

    Args:
        split: see :mod:`isthmus.data.splits`; of a single file 80 % are ``train`` and 10 % each ``val`` and ``test``.
        needs: columns to read.
        seed: unused; rows are what they are.
        path: a file, a folder or a glob.
        stream: 1 reads from the disk in turn instead of copying into the cache, 0 never; by itself above 32 GiB.
        buffer: samples that a stream shuffles at a time.
        boxes_format: ``xyxy``, ``xywh`` or ``cxcywh``.
        renames: our column → the file's.
        limit: at most so many rows, evenly spaced.
        name: what messages call the source.

    Raises:
        UserError: no such file, none readable, a missing column, or no row in the split.
    """
    root, files = find(path, (".parquet",), name)
    if stream == 1 or (stream == -1 and sum(file.stat().st_size for file in files) > _STREAM_ABOVE):
        from isthmus.data.readers.shards import load as load_shards

        return load_shards(
            split, needs, seed, pattern=path, buffer=buffer, boxes_format=boxes_format, renames=renames, name=name
        )
    lengths, broken = _lengths(files)
    if not lengths:
        raise UserError(f"{broken[0][0]} is not a readable parquet file: {broken[0][1]}.")
    files = list(lengths)
    starts = [0, *accumulate(lengths.values())]
    named = name_parts([file.relative_to(root).as_posix() for file in files])
    parts = [part for part, file in zip(named, files, strict=True) for part in [part] * lengths[file]]
    fractions = [row_fractions(file.relative_to(root).as_posix(), lengths[file]) for file in files]
    chosen = divide(parts, split, np.concatenate(fractions))
    if not len(chosen):
        raise UserError(f"{name} has {starts[-1]} rows but none for the split {split!r}; add a file named after it.")
    chosen = chosen[spaced(len(chosen), limit)]
    used = np.unique(np.searchsorted(starts, chosen, side="right") - 1)
    offsets = [0, *accumulate(lengths[files[i]] for i in used)]
    local = chosen.copy()
    for offset, i in zip(offsets, used, strict=False):
        inside = (chosen >= starts[i]) & (chosen < starts[i + 1])
        local[inside] += offset - starts[i]
    with quiet(name):
        table = datasets.load_dataset("parquet", data_files=[str(files[i]) for i in used], split="train")
    columns = Columns(name, table.features, renames or {}, boxes_format, files[0].parent)
    wanted = pick_needs(name, needs, tuple(columns.source))
    with quiet(name):  # of all files, so that a word has the same number in every split
        learn(columns, lambda chosen: (pq.read_table(file, columns=chosen) for file in files), wanted)
    places = [(offset, str(files[i].relative_to(root))) for offset, i in zip(offsets, used, strict=False)]
    dataset = keep_small(Table(name, table, local, columns, wanted, places))
    dataset.skipped[:0] = [(str(file), reason) for file, reason in broken]
    return dataset


def learn(columns: Columns, read: Callable[[list[str]], Iterable[pa.Table]], wanted: Sequence[str]) -> None:
    """Find out which words and numbers occur where classes and people are wanted.

    Args:
        columns: learns them.
        read: gives all rows of some of the table's columns.
        wanted: the columns that will be read.
    """
    for column in columns.numbered(wanted):
        for_one = columns.top([column])
        columns.learn(column, chain.from_iterable(_occurring(columns, rows, column) for rows in read(for_one)))


def _occurring(columns: Columns, rows: pa.Table, column: str) -> Iterable[Any]:
    path = columns.source[column]
    if path in rows.column_names and not pa.types.is_nested(rows.schema.field(path).type):
        return rows[path].unique().to_pylist()
    return columns.values(rows.to_pylist(), column)


def arrow(table: datasets.Dataset) -> Callable[[list[str]], Iterable[pa.Table]]:
    """Gives rows of some columns, for :func:`learn`."""
    return lambda chosen: [table.select_columns(chosen).with_format("arrow")[:]]


def encoded(table: Any) -> Any:
    """The table with images and sounds left as the bytes they are, for us to decode."""
    for column, kind in table.features.items():
        if isinstance(kind, (datasets.Image, datasets.Audio)):
            table = table.cast_column(column, type(kind)(decode=False))
    return table


def find(path: str, suffixes: tuple[str, ...], name: str) -> tuple[Path, list[Path]]:
    """The files that a path, folder or glob means, sorted, and the folder that their names start from.

    Raises:
        UserError: there is none; the message tells the nearest name.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given.parent, [given]
    if given.is_dir():
        files = sorted(file for file in given.rglob("*") if file.is_file() and str(file).endswith(suffixes))
        if not files:
            raise UserError(f"{name}: the folder {given} holds no file that ends in {' or '.join(suffixes)}.")
        return given, files
    files = sorted(Path(file) for file in glob.glob(str(given), recursive=True) if Path(file).is_file())
    if not files:
        import difflib

        beside = [each.name for each in given.parent.iterdir()] if given.parent.is_dir() else []
        near = difflib.get_close_matches(given.name, beside, n=1, cutoff=0.5)
        told = f" Nearest: {given.parent / near[0]}." if near else ""
        raise UserError(f"{name}: there is no file {given}; give a file, a folder or a glob.{told}")
    return Path(os.path.commonpath([file.parent for file in files])), files


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """``datasets`` without its progress bars, and with its errors in one sentence.

    Raises:
        UserError: for everything that ``datasets`` raises.
    """
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # ArrowInvalid, DatasetGenerationError, ConnectionError, OSError, …
        cause = error.__cause__ or error
        raise UserError(f"{name} cannot be read: {' '.join(str(cause).split())[:300]}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _lengths(files: Sequence[Path]) -> tuple[dict[Path, int], list[tuple[Path, str]]]:
    """File → rows, by what its footer says, and the files that have no readable footer."""
    lengths, broken = {}, []
    for file in files:
        try:
            lengths[file] = pq.read_metadata(file).num_rows
        except (OSError, pa.ArrowException) as error:
            broken.append((file, f"it may be cut short ({' '.join(str(error).split())[:120]})"))
    return lengths, broken
