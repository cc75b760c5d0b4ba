"""``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet`` beside files: a row a picture or sound, as on the hub.

The column ``file_name`` holds the file, relative to the table; the others are what belongs to it: ``label`` (words or
numbers), ``mask`` (a file), ``boxes`` and ``labels``, ``caption`` or ``number``, whatever :mod:`.columns` knows. A
column ``split`` says the part, or the folders of the files do, or the folder of each of several tables.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from isthmus.codec import UserError
from isthmus.data.cache import keep_small
from isthmus.data.dataset import Dataset, Unreadable, pick_needs
from isthmus.data.hashing import fraction
from isthmus.data.readers import layout
from isthmus.data.readers.columns import Columns
from isthmus.data.readers.decoding import IMAGE_SUFFIXES
from isthmus.data.readers.headers import read_file
from isthmus.data.readers.palettes import meaning
from isthmus.data.readers.sounds import SOUND_SUFFIXES
from isthmus.data.readers.tables import Table, arrow, learn, quiet
from isthmus.data.readers.walk import Tree
from isthmus.data.splits import divide, part_of, spaced

_TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
_FILE = ("file_name", "filename", "file", "image_path", "path", "image")


def beside(tree: Tree) -> list[str]:
    """The tables of metadata: the one at the top, else those of the folders below it."""
    found = [file for file in tree.files if file.rpartition("/")[2].lower() in _TABLES]
    top = [file for file in found if "/" not in file]
    return top[:1] or found


def load(
    name: str,
    root: Path,
    tree: Tree,
    tables: Sequence[str],
    split: str,
    needs: Sequence[str],
    boxes_format: str,
    renames: Mapping[str, str],
    limit: int | None,
) -> Dataset:
    """The rows of the tables as samples; arguments as those of :func:`.files.load`.

    Raises:
        UserError: a table that cannot be read, has no column of files, or no row in the split.
    """
    rows: list[dict[str, Any]] = []
    places: list[tuple[int, str]] = []
    for table in tables:
        places.append((len(rows), table))
        rows += _rows(name, root, table)
    if not rows:
        raise UserError(f"{name}: {tables[0]} has no rows.")
    heard = all(str(row["file_name"]).lower().endswith(SOUND_SUFFIXES) for row in rows)
    parts = _parts(rows)
    with quiet(name):
        table = datasets.Dataset.from_list(rows)
    media = "audio" if heard else "image"
    masks = meaning(root, [row["mask"] for row in rows if isinstance(row.get("mask"), str)])
    columns = Columns(
        name, table.features, {media: "file_name", **renames}, boxes_format, root, masks.palette if masks else None
    )
    wanted = pick_needs(name, needs, tuple(columns.source), f"metadata is read from {root / tables[0]}")
    learn(columns, arrow(table), wanted)
    numbers = divide(parts, split, np.array([fraction(row["file_name"]) for row in rows]))
    if not len(numbers):
        raise UserError(f"{name}: {tables[0]} has {len(rows)} rows but none for the split {split!r}.")
    dataset = Table(name, table, numbers[spaced(len(numbers), limit)], columns, wanted, places)
    dataset.mask_classes = masks.names if masks else None
    dataset.notes = _notes(tree, rows, tables, parts, SOUND_SUFFIXES if heard else IMAGE_SUFFIXES)
    return keep_small(dataset)


def _rows(name: str, root: Path, table: str) -> list[dict[str, Any]]:
    """The rows of one table, with ``file_name`` and other files relative to ``root``."""
    path, below = root / table, table.rpartition("/")[0]
    try:
        data = read_file(path)
        if table.lower().endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(data)).to_pylist()
        elif table.lower().endswith(".jsonl"):
            rows = [json.loads(line) for line in data.decode("utf-8-sig").splitlines() if line.strip()]
        else:
            text = io.StringIO(data.decode("utf-8-sig"), newline="")
            rows = _typed(list(csv.DictReader(text, delimiter="\t" if table.lower().endswith(".tsv") else ",")))
    except (
        Unreadable,
        OSError,
        ValueError,
        RecursionError,
        csv.Error,
    ) as error:
        raise UserError(f"{name}: {table} cannot be read ({' '.join(str(error).split())[:160]}).") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{name}: every line of {table} is an object, such as {{"file_name": "a.png"}}.')
    column = next((each for each in _FILE if rows and isinstance(rows[0].get(each), str)), None)
    if rows and column is None:
        raise UserError(
            f"{name}: {table} has no column file_name with the names of files; it has {', '.join(map(str, rows[0]))}."
        )
    for row in rows:
        file = row.pop(column or "", None)
        row["file_name"] = f"{below}/{file}".lstrip("/") if file else ""
        for key in ("mask", "mask_file_name", "mask_path"):
            if isinstance(row.get(key), str) and below:
                row[key] = f"{below}/{row[key]}"
    return rows


def _typed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells of text → numbers, where a whole column holds them, and lists; empty ones are ``None``."""
    for column in {key for row in rows for key in row if key is not None}:
        cells = [row.get(column) or "" for row in rows]
        filled = [cell.strip() for cell in cells if cell.strip()]
        kind: Any = str
        if filled and all(cell.startswith(("[", "{")) for cell in filled):
            kind = json.loads
        elif filled and all(
            cell.lstrip("+-").isdigit() and cell.lstrip("+-")[:1] != "0"[: len(cell) > 1] for cell in filled
        ):
            kind = int
        elif filled and all(_is_number(cell) for cell in filled) and not any(cell.isdigit() for cell in filled):
            kind = float
        for row, cell in zip(rows, cells, strict=True):
            row[column] = kind(cell.strip()) if cell.strip() else None
    return [{key: value for key, value in row.items() if key is not None} for row in rows]


def _is_number(cell: str) -> bool:
    try:
        return not math.isinf(float(cell)) or "inf" in cell.lower()
    except ValueError:
        return False


def _parts(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The part of every row, by its column ``split`` or by the folder of its file."""
    told = [row.get("split") for row in rows]
    if all(isinstance(word, str) and part_of(word) for word in told):
        return [part_of(str(word)) for word in told]
    return [place.part for place in layout.parts_of([row["file_name"] for row in rows])]


def _notes(
    tree: Tree,
    rows: Sequence[Mapping[str, Any]],
    tables: Sequence[str],
    parts: Sequence[str | None],
    suffixes: tuple[str, ...],
) -> list[str]:
    named = {str(value) for row in rows for value in row.values() if isinstance(value, str)}
    others = [file for file in tree.files if file.lower().endswith(suffixes) and file not in named]
    notes = [f"{len(rows)} files are described by {', '.join(tables[:3])}{' …' if len(tables) > 3 else ''}."]
    if others:
        notes.append(f"{len(others)} files without a row in it are left out, such as {others[0]}.")
    counts = {part: sum(each == part for each in parts) for part in dict.fromkeys(filter(None, parts))}
    return notes + ([f"Parts of the data: {', '.join(f'{n} {part}' for part, n in counts.items())}."] if counts else [])
