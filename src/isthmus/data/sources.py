"""The sources by name, and ``load``, which turns what a person writes after ``--data`` into a dataset."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from isthmus.codec import UserError
from isthmus.data.dataset import COLUMNS, Dataset
from isthmus.data.splits import check_split, spaced


class Source(NamedTuple):
    """One kind of source."""

    name: str
    module: str  # under isthmus.data; it has ``load(split, needs, seed, **options)``
    argument: str  # the option that what stands after the colon goes to; "" takes none
    summary: str
    needs_argument: bool = False
    renames: bool = False  # whether ``?image=pic`` names columns
    limits: bool = False  # whether its ``load`` takes ``limit``, to read no more than that


_SOURCES = {
    source.name: source
    for source in (
        Source("digits", "builtin.digits", "size", "1,797 handwritten digits, 8×8; digits:32 enlarges them"),
        Source(
            "photos",
            "builtin.photos",
            "size",
            "patches of sixteen photographs, 64×64; photos:128 for larger ones",
        ),
        Source(
            "scenes",
            "builtin.scenes",
            "size",
            "drawn scenes with factors, masks, boxes, captions and questions",
        ),
        Source(
            "street-numbers",
            "builtin.street_numbers",
            "size",
            "real digits composed to numbers on photographs, 54×54; street-numbers:16x32?most=3&warp=0",
        ),
        Source("discs", "builtin.discs", "size", "720 soft discs, every colour, radius and place once, 16×16"),
        Source("textures", "builtin.textures", "size", "oriented noise in eight classes, 98×98; textures:64"),
        Source(
            "planar",
            "builtin.planar",
            "kind",
            "points in the plane: planar:moon, planar:circle, planar:spiral",
        ),
        Source("fields", "builtin.fields", "size", "noise fields with a target made of products of up to four"),
        Source(
            "brain",
            "builtin.brain",
            "",
            "simulated people look at things under MEG; brain?subjects=1&trials=200",
        ),
        Source("meg", "readers.recordings", "path", "recordings: meg:subject1-epo.fif, .npz or .npy", True),
        Source(
            "sounds",
            "builtin.sounds",
            "kind",
            "a second of drawn sound, eight kinds of event; sounds:clicks",
        ),
        Source("signals", "builtin.signals", "kind", "two bumps in noise at four distances; signals:sinusoids"),
        Source(
            "solids",
            "builtin.solids",
            "points",
            "points on a sphere, cube, cone or torus, 256; solids:512",
        ),
        Source("clips", "builtin.clips", "size", "eight frames of a moving square, 16×16; clips:32?frames=16"),
        Source("series", "builtin.series", "path", "windows of series side by side, drawn, or series:FILE.csv"),
        Source("random", "builtin.noise", "size", "noise of a given shape: random:224, random:1x28x28", True),
        Source(
            "folder",
            "readers.files",
            "path",
            "a folder of images or sounds, with classes, masks or a table beside them",
            True,
            True,
            True,
        ),
        Source(
            "parquet",
            "readers.tables",
            "path",
            "a parquet file, glob or folder: parquet:PATH?image=pic",
            True,
            True,
            True,
        ),
        Source(
            "hub",
            "readers.hub",
            "repo",
            "a data set of the Hugging Face hub: hub:NAME?config=…",
            True,
            True,
            True,
        ),
        Source(
            "shards",
            "readers.shards",
            "pattern",
            "tar or parquet shards, streamed: shards:data-*.tar",
            True,
            True,
        ),
    )
}

#: What stands before and behind the question mark; a glob's own question marks are followed by no ``name=``.
_ADDRESS = re.compile(r"(.*?)(?:\?([\w.]+=[^?]*))?", re.DOTALL)


def sources() -> list[Source]:
    """Every kind of source that :func:`load` knows."""
    return list(_SOURCES.values())


def load(
    source: str, split: str = "train", needs: Sequence[str] = ("image",), seed: int = 0, **options: Any
) -> Dataset:
    """A dataset from what stands after ``--data``: ``NAME``, ``NAME:ARGUMENT``, either with ``?option=value&…``.

    Args:
        source: for example ``photos:64``, ``folder:pictures``, ``parquet:train.parquet?image=pic&label=y``. For tables,
            options with a column's name say which column of the file is meant; ``limit`` keeps so many samples, evenly
            spaced.
        split: ``train``, ``val``, ``test``, ``train+val`` or ``all``; see :mod:`isthmus.data.splits`.
        needs: columns to read; a name that ends in ``?`` is read where the source has it.
        seed: for sources that draw their samples.
        options: the same as behind ``?``; they go before those.

    Raises:
        UserError: an unknown source or option, a wrong path, a missing column, nothing to read.
    """
    address, query = _ADDRESS.fullmatch(source).groups(default="")  # type: ignore[union-attr]
    kind, colon, argument = address.partition(":")
    found = _SOURCES.get(kind)
    if found is None:
        raise UserError(_unknown(source, kind))
    if (found.needs_argument and not argument) or (colon and not argument):
        raise UserError(f"{kind}: wants something after the colon, as in {_example(found)}.")
    if argument and not found.argument:
        raise UserError(f"{kind} takes nothing after a colon, got {argument!r}; options stand behind a ?.")
    check_split(source, split)
    given: dict[str, Any] = {**dict(parse_qsl(query, keep_blank_values=True)), **options}
    if argument:
        given[found.argument] = argument
    limit = _number(source, "limit", given.pop("limit")) if "limit" in given else None
    module = importlib.import_module(f"isthmus.data.{found.module}")
    extra: dict[str, Any] = {"name": source}
    if found.renames:
        extra["renames"] = {key: str(given.pop(key)) for key in COLUMNS if key in given}
    if limit is not None and limit < 1:
        raise UserError(f"{source}: limit must be at least 1, got {limit}.")
    if limit is not None and found.limits:
        extra["limit"] = limit
    given = _checked(source, found, module.load, given)
    dataset = module.load(split, tuple(needs), seed, **given, **extra)
    if limit is not None and not hasattr(dataset, "__len__"):
        raise UserError(f"{source}: a stream takes no limit; give fewer shards.")
    if limit is not None and not found.limits:
        return dataset.select(spaced(len(dataset), limit))
    return dataset


def _checked(source: str, found: Source, function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Options that the source has, turned to numbers where its defaults are numbers."""
    known = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in ("split", "needs", "seed", "name", "renames", "limit")
    }
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            told = f" Nearest: {near[0]}." if near else f" It takes: {', '.join(known)}."
            raise UserError(f"{source}: {found.name} has no option {key!r}.{told}")
        if isinstance(value, str) and isinstance(known[key].default, int):
            given[key] = _number(source, key, value)
    return given


def _number(source: str, key: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{source}: {key} must be a whole number, got {value!r}.") from error


def _example(found: Source) -> str:
    return {"random": "random:224", "hub": "hub:uoft-cs/cifar10", "shards": "shards:data-*.tar"}.get(
        found.name, f"{found.name}:PATH" if found.argument == "path" else f"{found.name}:64"
    )


def _unknown(source: str, kind: str) -> str:
    from pathlib import Path

    path = Path(source).expanduser()
    if path.is_dir():
        return f"{source!r} is no source; for the images in that folder write folder:{source}."
    if path.suffix == ".parquet":
        return f"{source!r} is no source; for that file write parquet:{source}."
    near = difflib.get_close_matches(kind, _SOURCES, n=1, cutoff=0.4)
    told = f" Nearest: {near[0]}." if near else ""
    return f"there is no data source {kind!r}; there are {', '.join(_SOURCES)}.{told}"
