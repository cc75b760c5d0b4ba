"""Names, legends and numbers on figures. Names are drawn as they are: ``$``, ``_`` and ``\\`` have no meaning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLOURS = tuple(f"C{number}" for number in range(10))
LITERAL: dict[str, Any] = {"parse_math": False}


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one axes without the upper and right lines."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shortened(name: object, length: int = 40) -> str:
    """A name on one line, its middle left out where it is longer than ``length``."""
    name = " ".join(str(name).split())
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"


def title(axes: Axes, text: object, length: int, **settings: Any) -> None:
    """A title as it is, of lines no longer than ``length``."""
    axes.set_title("\n".join(shortened(line, length) for line in str(text).splitlines()), **LITERAL, **settings)


def name_ticks(axes: Axes, along: Literal["x", "y"], names: Sequence[object], size: float = 9) -> None:
    """A name at each of the places 0, 1, …; long ones of the x axis stand upright, and of many every n-th is shown."""
    places = range(0, len(names), max(1, -(-len(names) // 50)))
    shown = [shortened(names[place], 40 if along == "y" else 24) for place in places]
    if along == "y":
        axes.set_yticks(places, shown, fontsize=size, **LITERAL)
        return
    inches = axes.figure.get_figwidth() / max(1, len(names))  # type: ignore[union-attr]
    upright = max(map(len, shown), default=0) * size * 0.6 / 72 > inches
    axes.set_xticks(places, shown, fontsize=size, rotation=90 if upright else 0, **LITERAL)


def legend(axes: Axes, handles: Sequence[Any], names: Sequence[object]) -> None:
    """A legend beside the axes, where it hides nothing; none for a single nameless line."""
    if not handles or (len(names) == 1 and not str(names[0])):
        return
    figure = axes.figure
    drawn = figure.legend(  # the names come after: matplotlib leaves out what begins with an underscore
        handles, [str(number) for number in range(len(handles))], loc="outside right upper", frameon=False, fontsize=8
    )
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(name))


def logarithmic(axes: Axes, along: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic axis with numbers that people read, at the values themselves where they are few.

    Values at or below zero have no place on it: where there are some, the axis stays linear.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0:
        return
    axis = axes.xaxis if along == "x" else axes.yaxis
    (axes.set_xscale if along == "x" else axes.set_yscale)("log")
    places = sorted(set(finite))
    near = any(b / a < 1.25 for a, b in itertools.pairwise(places))
    if along == "y" or len(places) > 8 or near:
        places = round_values(min(finite), max(finite))
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade, or the powers of ten alone where there are many, from below ``low`` to ``high``."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(decades) < 4 else (1,)
    every = -(-len(decades) // 8)
    found = [digit * 10.0**decade for decade in decades if decade % every == 0 for digit in digits]
    within = [value for value in found if low * 0.999 <= value <= high * 1.001]
    return within if len(within) > 1 else sorted({low, high})


def readable(axes: Axes, along: Literal["x", "y"]) -> None:
    """Numbers of a linear axis without a factor that stands far away from them."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    largest = max(map(abs, axis.get_data_interval()))
    if math.isfinite(largest) and largest and not 1e-3 <= largest < 1e4:
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def number(value: float) -> str:
    """A number at an axis or a bar: ``0.25``, ``1500``, ``20k``, ``1.5M``, ``1e-06``; ``not finite`` for no number."""
    if not math.isfinite(value):
        return "not finite"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"
