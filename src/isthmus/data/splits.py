"""Which samples are for training, validation and test, and how a source that does not say is divided.

One rule for every source: a part that the source has is used as it is; a ``val`` or ``test`` part that it lacks is
carved out of its ``train`` part, 10 % each, by a hash of the file name or row number; a source without a ``train``
part is pooled and carved 80/10/10. ``train+val`` joins parts and ``all`` takes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

from isthmus.codec import UserError
from isthmus.data.hashing import fraction

PARTS = ("train", "val", "test")
_ALIASES = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_HELD_OUT = 0.1

T = TypeVar("T")


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


def divide(found: Mapping[str | None, Sequence[T]], split: str, key: Callable[[T], str]) -> list[T]:
    """The samples of ``split``, in their order, by the rule at the top of this file.

    Args:
        found: part (``None`` where the source does not say) → its samples.
        split: parts joined by ``+``, or ``all``, as :func:`check_split` accepts.
        key: sample → the name that is hashed.
    """
    wanted = check_split("the source", split)
    pooled = [sample for part in (*PARTS, None) for sample in found.get(part, ())]
    if wanted == ["all"]:
        return pooled
    own = {part: list(found.get(part, ())) for part in PARTS}
    rest = own["train"] + list(found.get(None, ()))
    if not rest:
        own, rest = {part: [] for part in PARTS}, pooled
    lacking = [part for part in ("val", "test") if not own[part]]
    carved: dict[str, list[T]] = {part: [] for part in PARTS}
    for sample in rest:
        slot = int(fraction(key(sample)) / _HELD_OUT)
        carved[lacking[slot] if slot < len(lacking) else "train"].append(sample)
    parts = {part: carved[part] if part == "train" or part in lacking else own[part] for part in PARTS}
    return [sample for part in PARTS if part in wanted for sample in parts[part]]
