"""Which samples are for training, validation and test, and how a source that does not say is divided.

One rule for every source: a part that the source has is used as it is; a ``val`` or ``test`` part that it lacks is
carved out of its ``train`` part, 10 % each, by a hash of the file name or row number; a source without a ``train``
part is pooled and carved 80/10/10, at least one sample each. ``train+val`` joins parts and ``all`` takes everything.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np

from isthmus.codec import UserError
from isthmus.data.hashing import words
from isthmus.layers.random import derive_seed

PARTS = ("train", "val", "test")
_ALIASES = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_HELD_OUT = 0.1


def spaced(size: int, limit: int | None) -> np.ndarray:
    """``limit`` numbers of ``range(size)`` at equal distances, so that sources sorted by class keep all of them."""
    kept = size if limit is None else min(size, limit)
    return np.arange(kept) * size // max(kept, 1)


def check_split(name: str, split: str, parts: Collection[str] = (*PARTS, "all")) -> list[str]:
    """``"train+val"`` → ``["train", "val"]``.

    Raises:
        UserError: an unknown part.
    """
    chosen = [part.strip() for part in split.split("+")]
    unknown = [part for part in chosen if part not in parts]
    if unknown:
        raise UserError(
            f"{name} has no split {unknown[0]!r}; the splits are {', '.join(parts)}, joined by + if need be."
        )
    return ["all"] if "all" in chosen else list(dict.fromkeys(chosen))


def part_of(word: str) -> str | None:
    """The split that a folder or split name stands for (``validation`` → ``val``), or ``None``."""
    return next((part for part, names in _ALIASES.items() if word.lower() in names), None)


#: ``train``, ``train-00000-of-00004``, ``test_12``, ``val.3``; the hub's older files end in a hash.
_WORDS = "|".join(word for words in _ALIASES.values() for word in words)
_NUMBERED = re.compile(rf"(?:(.*)[-_.])?({_WORDS})(?:[-_.]?\d+(?:-of-\d+)?)*(?:-[0-9a-f]{{16}})?", re.IGNORECASE)


def name_parts(names: Sequence[str]) -> list[str | None]:
    """The part of every file of a table, by names relative to its folder.

    All folders of one level are parts (``train/…``, ``validation/…``), or a file is called like one, with or without
    its number (``train-00000-of-00004.parquet``), or all files begin alike and differ in the part
    (``birds-train-0.tar``, ``birds-test-0.tar``). A word elsewhere in a name says nothing.
    """
    folders = [name.split("/")[:-1] for name in names]
    for level in range(max(map(len, folders), default=0)):
        if all(part_of(each[level]) for each in folders if len(each) > level):
            loose = iter(_stem_parts([name for name, each in zip(names, folders, strict=True) if len(each) <= level]))
            return [part_of(each[level]) if len(each) > level else next(loose) for each in folders]
    return _stem_parts(names)


def _stem_parts(names: Sequence[str]) -> list[str | None]:
    found = [_NUMBERED.fullmatch(re.split(r"\.(?!\d)", name.rpartition("/")[2])[0]) for name in names]
    before = {match[1] if match else None for match in found}
    parts = [part_of(match[2]) if match else None for match in found]
    if all(parts) and len(before) == 1 and len(set(parts)) > 1:
        return parts
    return [part if match and not match[1] else None for part, match in zip(parts, found, strict=True)]


def divide(parts: Sequence[str | None], split: str, fractions: np.ndarray) -> np.ndarray:
    """The numbers of the samples of ``split``, int64, ascending within each part, by the rule at the top of this file.

    Args:
        parts: of every sample, ``None`` where the source does not say.
        split: parts joined by ``+``, or ``all``, as :func:`check_split` accepts.
        fractions: of every sample, a number in [0, 1) that depends on its name only.
    """
    wanted = check_split("the source", split)
    if wanted == ["all"]:
        return np.arange(len(parts))
    named = np.array([part or "train" for part in parts], dtype="<U5")
    if "train" not in named:
        named[:] = "train"
    lacking = [part for part in ("val", "test") if part not in named]
    carved = named.copy()
    for slot, part in enumerate(lacking):
        chosen = (carved == "train") & (fractions >= slot * _HELD_OUT) & (fractions < (slot + 1) * _HELD_OUT)
        rest = np.flatnonzero(carved == "train")
        if not chosen.any() and len(rest) > 1:  # so few samples that chance left none: the one that is nearest
            chosen = rest[[np.abs(fractions[rest] - (slot + 0.5) * _HELD_OUT).argmin()]]
        carved[chosen] = part
    return np.concatenate([np.flatnonzero(carved == part) for part in PARTS if part in wanted])


def row_fractions(name: str, count: int) -> np.ndarray:
    """Fractions of rows 0 to ``count`` − 1 of a table that is called ``name``, float64."""
    return (words(derive_seed("rows", name), np.arange(count), 1)[:, 0] >> np.uint64(11)) * 2.0**-53
