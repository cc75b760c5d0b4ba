"""``hub:NAME``: a data set of the Hugging Face hub, or a folder in its layout; downloaded once, or streamed.

``hub:uoft-cs/cifar10``, ``hub:user/set?config=small&revision=…&image=pic``. What the hub calls ``validation`` is
``val``; a split that is missing is carved out as :mod:`isthmus.data.splits` says; splits with other names are joined to
``train`` only where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import datasets
import numpy as np

from isthmus.codec import UserError
from isthmus.data.cache import keep_small
from isthmus.data.dataset import pick_needs
from isthmus.data.readers.columns import Columns
from isthmus.data.readers.tables import Table, arrow, learn, quiet
from isthmus.data.splits import divide, part_of, row_fractions, spaced

_STREAM_ABOVE = 8 * 2**30  # bytes to download


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    repo: str,
    config: str = "",
    revision: str = "",
    stream: int = -1,
    buffer: int = 1024,
    boxes_format: str = "xyxy",
    renames: Mapping[str, str] | None = None,
    limit: int | None = None,
    name: str = "hub",
) -> Any:
    """A data set of the hub as a table, or as a stream with ``stream=1`` or by itself above 8 GiB.

    Args:
        split: see :mod:`isthmus.data.splits`.
        needs: columns to read.
        seed: unused.
        repo: ``owner/name``, or a folder with data files in the hub's layout.
        config: which of the repository's configurations.
        revision: branch, tag or commit.
        stream: 1 reads over the network in turn, 0 downloads.
        buffer: samples that a stream shuffles at a time.
        boxes_format: ``xyxy``, ``xywh`` or ``cxcywh``.
        renames: our column → the table's.
        limit: at most so many rows, evenly spaced.
        name: what messages call the source.

    Raises:
        UserError: no such data set, no network, a configuration is wanted, a column is missing.
    """
    where: dict[str, Any] = {"path": repo, "name": config or None, "revision": revision or None}
    with _asking_for_a_config(name), quiet(name):
        if stream == -1:
            size = datasets.load_dataset_builder(**where).info.download_size
            stream = int((size or 0) > _STREAM_ABOVE)
        tables: Any = datasets.load_dataset(**where, streaming=bool(stream))
    parts = {key: part_of(key) for key in tables}
    if "train" in parts.values():
        parts = {key: part for key, part in parts.items() if part}
    if stream:
        from isthmus.data.readers.shards import stream_of

        return stream_of(
            name, {key: tables[key] for key in parts}, parts, split, needs, renames or {}, boxes_format, buffer
        )
    starts = [0, *accumulate(len(tables[key]) for key in parts)]
    labelled = [part for key, part in parts.items() for part in [part] * len(tables[key])]
    rows = divide(labelled, split, np.concatenate([row_fractions(key, len(tables[key])) for key in parts]))
    if not len(rows):
        raise UserError(f"{name} has {starts[-1]} rows but none for the split {split!r}; it has {', '.join(tables)}.")
    rows = rows[spaced(len(rows), limit)]
    with quiet(name):
        table = datasets.concatenate_datasets([tables[key] for key in parts])
    columns = Columns(name, table.features, renames or {}, boxes_format)
    wanted = pick_needs(name, needs, tuple(columns.source))
    learn(columns, arrow(table), wanted)
    return keep_small(Table(name, table, rows, columns, wanted, list(zip(starts, parts, strict=False))))


@contextmanager
def _asking_for_a_config(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if "config name is missing" in str(error).lower():
            raise UserError(f"{error} Here: {name}{'&' if '?' in name else '?'}config=…") from error
        raise
