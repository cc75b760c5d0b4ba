"""What has to stand in ``report.json``, so that a damaged or foreign record is told in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_WORD = (str,)
_WORD_OR_NONE = (str, type(None))
_NUMBER = (int, float)
_NUMBER_OR_NONE = (int, float, type(None))

_RECORD: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("system", "scale", "command", "status", "started", "updated"), _WORD),
    **dict.fromkeys(("error", "commit"), _WORD_OR_NONE),
    **dict.fromkeys(("seed", "seconds"), _NUMBER),
    **dict.fromkeys(("config", "options", "hardware", "versions", "metrics", "curves"), (dict,)),
    **dict.fromkeys(("claims", "figures", "artifacts", "notes"), (list,)),
}
_ENTRIES: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "metrics": {"value": _NUMBER_OR_NONE, "unit": _WORD, "published": _WORD_OR_NONE},
    "curves": {"x": (list,), "y": (list,)},
    "claims": {
        **dict.fromkeys(("name", "text", "metric", "bar", "rule"), _WORD),
        "published": _WORD_OR_NONE,
        "value": _NUMBER_OR_NONE,
        "holds": (bool, type(None)),
    },
    "figures": dict.fromkeys(("name", "file", "caption"), _WORD),
    "artifacts": dict.fromkeys(("name", "path", "text"), _WORD),
}
_DEEPEST = 50


def fault(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a record, such as ``it lacks 'metrics'``; ``None`` where it is whole."""
    if (found := _keys(record, _RECORD, "it")) is not None:
        return found
    for kind, keys in _ENTRIES.items():
        entries = record[kind]
        named = entries.items() if isinstance(entries, dict) else enumerate(entries)
        for name, entry in named:
            if not isinstance(entry, dict):
                return f"{kind} {name!r} is no object"
            if (found := _keys(entry, keys, f"{kind} {name!r}")) is not None:
                return found
    for name, curve in record["curves"].items():
        if len(curve["x"]) != len(curve["y"]) or not all(_finite(v) for v in curve["x"]):
            return f"curve {name!r} has no place for each value"
        if not all(v is None or _finite(v) for v in curve["y"]):
            return f"curve {name!r} has values that are no numbers"
    if not all(isinstance(note, str) for note in record["notes"]):
        return "its notes are not all sentences"
    for key in ("started", "updated"):
        try:
            datetime.fromisoformat(record[key].replace("Z", "+00:00"))
        except ValueError:
            return f"{key!r} is no date: {record[key]!r:.40}"
    return "its settings are nested too deep" if _depth(record) > _DEEPEST else None


def _keys(entry: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]], whose: str) -> str | None:
    for key, kinds in keys.items():
        if key not in entry:
            return f"{whose} lacks {key!r}"
        if not isinstance(entry[key], kinds):
            return f"{key!r} of {whose} is {entry[key]!r:.40}" if whose != "it" else f"{key!r} is {entry[key]!r:.40}"
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _depth(value: Any) -> int:
    """How many objects and lists stand in each other, up to a few more than are allowed."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        depth += 1
        level = [
            item
            for each in level
            if isinstance(each, (dict, list))
            for item in (each.values() if isinstance(each, dict) else each)
        ]
    return depth
