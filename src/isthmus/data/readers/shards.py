"""``shards:PATTERN``: WebDataset tars or parquet files that are read in turn through Hugging Face ``datasets``.

A pattern is a file, a folder, a glob, or names with a range in braces, on the disk or behind an address that
``datasets`` opens: ``shards:data/train-*.tar``, ``shards:hf://datasets/user/set/{0000..0099}.tar``. Shards whose names
say train, val(idation) or test are those parts. Where val or test is missing and there are ten training shards or more,
every tenth shard is held out for each; ``all`` takes everything.

How a stream is shuffled, shared and resumed: :mod:`isthmus.data.readers.streams`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus.codec import UserError
from isthmus.data.dataset import pick_needs
from isthmus.data.readers.columns import Columns
from isthmus.data.readers.streams import Shard, Stream
from isthmus.data.readers.tables import encoded, find, quiet
from isthmus.data.splits import PARTS, check_split, name_parts

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".parquet")
_HELD_OUT = 10  # one shard in so many is held out for val, and another for test


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    pattern: str,
    buffer: int = 1024,
    boxes_format: str = "xyxy",
    renames: Mapping[str, str] | None = None,
    name: str = "shards",
) -> Stream:
    """A stream of the shards that ``pattern`` means; see the top of this file.

    Raises:
        UserError: no such shard, none readable, a missing column, or no shard for the split.
    """
    addresses = _addresses(pattern, name)
    shards = [_shard(*address) for address in addresses]
    parts = name_parts([address[0] for address in addresses])
    stream = _stream(name, shards, _chosen(name, shards, parts, split), needs, renames or {}, boxes_format, buffer)
    cut = [Path(address) for _, address in addresses if _is_cut(address)]
    stream.skipped += [(file.name, "is cut short; samples are read up to there") for file in cut]
    return stream


def stream_of(
    name: str,
    tables: Mapping[str, Any],
    parts: Mapping[str, str | None],
    split: str,
    needs: Sequence[str],
    renames: Mapping[str, str],
    boxes_format: str,
    buffer: int,
) -> Stream:
    """A stream of ``datasets.IterableDataset`` objects, one a split of the hub, whose shards become ours."""
    shards, labels = [], []
    for key, table in tables.items():
        raw = encoded(table)
        for i in range(raw.num_shards):
            shards.append(Shard(f"{key} shard {i}", partial(raw.shard, raw.num_shards, i)))
            labels.append(parts[key])
    return _stream(name, shards, _chosen(name, shards, labels, split), needs, renames, boxes_format, buffer)


def _stream(
    name: str,
    shards: Sequence[Shard],
    chosen: Sequence[Shard],
    needs: Sequence[str],
    renames: Mapping[str, str],
    boxes_format: str,
    buffer: int,
) -> Stream:
    broken: list[tuple[str, str]] = []
    for shard in shards:
        try:
            with quiet(shard.name):
                features = shard.open().features
        except UserError as error:
            broken.append((shard.name, str(error)))
            continue
        if features:
            break
    else:
        raise UserError(f"{name}: none of its {len(shards)} shards can be read ({broken[0][1] if broken else 'empty'})")
    columns = Columns(name, features, renames, boxes_format)
    wanted = pick_needs(name, needs, tuple(columns.source))
    wordy = columns.wordy(wanted)
    if wordy:
        raise UserError(
            f"{name}: {wordy[0]} holds words, which a stream cannot number before it has seen them all; "
            "store numbers in the shards, or read the files with parquet: and stream=0."
        )
    stream = Stream(name, chosen, columns, wanted, buffer)
    stream.skipped += broken
    return stream


def _chosen(name: str, shards: Sequence[Shard], parts: Sequence[str | None], split: str) -> list[Shard]:
    """The shards of a split, by the rule at the top of this file."""
    wanted = check_split(name, split)
    if wanted == ["all"]:
        return list(shards)
    named = [part or "train" for part in parts]
    if "train" not in named:
        named = ["train"] * len(named)
    training = [i for i, part in enumerate(named) if part == "train"]
    if len(training) >= _HELD_OUT:
        for slot, part in enumerate(("val", "test")):
            if part not in named:
                for i in training[_HELD_OUT - 2 + slot :: _HELD_OUT]:
                    named[i] = part
    chosen = [
        shard for part in PARTS if part in wanted for shard, own in zip(shards, named, strict=True) if own == part
    ]
    if not chosen:
        raise UserError(
            f"{name} has no shards for the split {split!r}: name some after it ({wanted[0]}-0000.tar), "
            "give ten shards or more, or ask for the split all."
        )
    return chosen


def _addresses(pattern: str, name: str) -> list[tuple[str, str]]:
    """``(name, path or address)`` of every shard, braces and globs expanded."""
    if re.match(r"[a-z0-9]+://", pattern):
        return [(address.split("://", 1)[1], address) for address in _braces(pattern)]
    found: list[tuple[str, str]] = []
    for each in _braces(pattern):
        root, files = find(each, _SUFFIXES, name)
        foreign = [file for file in files if not file.name.endswith(_SUFFIXES)]
        if foreign:
            raise UserError(f"{name}: {foreign[0]} is no shard; shards end in {', '.join(_SUFFIXES)}.")
        found += [(file.relative_to(root).as_posix(), str(file)) for file in files]
    return found


def _braces(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` → three names; ``{train,val}`` → two."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        inner = [str(number).zfill(len(ends[1])) for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        inner = match[1].split(",")
    return [each for word in inner for each in _braces(pattern[: match.start()] + word + pattern[match.end() :])]


def _is_cut(path: str) -> bool:
    """Whether a tar on the disk lacks the empty block that ends an archive; ``datasets`` reads such a file silently."""
    if not path.endswith(".tar") or "://" in path:
        return False
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 512))
        return size % 512 > 0 or any(file.read())


def _shard(name: str, path: str) -> Shard:
    kind = "parquet" if path.endswith(".parquet") else "webdataset"

    length = None
    if kind == "parquet" and "://" not in path:
        try:
            length = pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException):
            length = 0
    return Shard(name, partial(_open, name, kind, path), length)


def _open(name: str, kind: str, path: str) -> Any:
    with quiet(name):
        return encoded(datasets.load_dataset(kind, data_files=[path], split="train", streaming=True))
