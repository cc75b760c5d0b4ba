"""Tables, numbers and times as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any


def cell(content: str, kind: str = "", label: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' data-label="{escape(label)}"' if label else ""
    return f"<td{attributes}>{content}</td>"


def table(heads: Sequence[str | tuple[str, str]], rows: list[list[str]], kind: str) -> str:
    """A table; a head is its text, or its text and its class."""
    pairs = [(head, "") if isinstance(head, str) else head for head in heads]
    cells = "".join(f'<th class="{style}">{escape(text)}</th>' for text, style in pairs)
    head = f"<thead><tr>{cells}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def breakable(bar: str) -> str:
    """Lines may break after an underscore, not between a comparison sign and its number."""
    return re.sub(r"([≥≤] \S+)", r'<span class="whole">\1</span>', escape(bar).replace("_", "_<wbr>"))


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def in_words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(in_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == {}:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def moment(iso: str) -> str:
    return iso.replace("T", " ").replace("Z", " UTC")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
