"""Curves as inline SVG: a page needs no script, follows light and dark, and prints sharply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30
COLOURS = 6  # page.css defines --s0 … --s5


class Curve(NamedTuple):
    """Places and values of one line; a value of ``None`` breaks it."""

    x: Sequence[float]
    y: Sequence[float | None]


def plot(curves: Mapping[str, Curve], label: str) -> str:
    """Draw curves over common axes; the value axis is logarithmic where values span more than a factor of fifty.

    Args:
        curves: ``{run: curve}``; the n-th run has the n-th colour.
        label: what the value is, for readers who do not see the picture.

    Returns:
        an ``<svg>`` element, empty text where there is nothing to draw.
    """
    points = {run: [(x, y) for x, y in zip(*curve, strict=True) if y is not None] for run, curve in curves.items()}
    values = [y for line in points.values() for _, y in line]
    places = [x for line in points.values() for x, _ in line]
    if not values:
        return ""
    logarithmic = min(values) > 0 and max(values) / min(values) > 50
    across = _Axis(min(places), max(places), LEFT, WIDTH - RIGHT)
    up = _Axis(min(values), max(values), HEIGHT - BOTTOM, TOP, logarithmic)
    body = []
    for tick, text in up.ticks(5):
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{tick:.1f}" y2="{tick:.1f}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{tick + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in across.ticks(5):
        anchor = "end" if tick > WIDTH - RIGHT - 12 else "middle"
        body.append(f'<text x="{tick:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{text}</text>')
    for index, (run, curve) in enumerate(curves.items()):
        colour = f"var(--s{index % COLOURS})"
        shape = _path(curve, across, up)
        body.append(f'<path class="line" d="{shape}" style="stroke:{colour}"><title>{escape(run)}</title></path>')
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def _path(curve: Curve, across: _Axis, up: _Axis) -> str:
    told, drawing = [], False
    for x, y in zip(*curve, strict=True):
        if y is not None:
            told.append(f"{'L' if drawing else 'M'}{across(x):.1f} {up(y):.1f}")
        drawing = y is not None
    if len(told) == 1:  # a single point has no length to draw
        told.append("h0.01")
    return "".join(told)


class _Axis:
    """Values to places on the page, and the round values worth a mark."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False) -> None:
        self.logarithmic = logarithmic
        if low == high:
            room = abs(low) / 10 or 1.0
            low, high = low - room, high + room
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About ``count`` round values within the axis, with their places."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = -(-len(decades) // count)
            within = (1, 2, 5) if len(decades) < 4 else (1,)
            values = [digit * 10.0**decade for decade in decades if decade % every == 0 for digit in within]
        else:
            rough = (self.high - self.low) / count
            size = 10 ** math.floor(math.log10(rough))
            step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
            values = [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self(value), short(value)) for value in values if self.low <= value <= self.high]


def short(value: float) -> str:
    """A number as an axis shows it: ``0.25``, ``20k``, ``1e-06``."""
    if value and abs(value) >= 10_000 and value % 100 == 0:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.6g}"
