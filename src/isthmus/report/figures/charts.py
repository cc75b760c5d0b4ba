"""Bars, lines, points and histograms of named values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from isthmus.report.figures.words import (
    COLOURS,
    LITERAL,
    blank,
    legend,
    logarithmic,
    name_ticks,
    number,
    readable,
    shortened,
)

Points = Sequence[tuple[float, float]]


def bars(
    values: Mapping[str, float], label: str = "accuracy", grey: str = "untrained", line: float | None = None
) -> Figure:
    """One horizontal bar a value, with its number.

    Args:
        values: by name.
        label: what the values are, with the unit.
        grey: bars whose name contains this, the comparisons, stand back; ``""`` for none.
        line: a value to compare with, such as chance, drawn across all bars.
    """
    figure, axes = blank(6, 0.34 * len(values) + 0.9)
    finite = [value if math.isfinite(value) else 0.0 for value in values.values()]
    colours = ["tab:gray" if grey and grey in name else "tab:blue" for name in values]
    drawn = axes.barh(range(len(values)), finite, color=colours)
    axes.bar_label(drawn, [_at_bar(value) for value in values.values()], padding=3, fontsize=9)
    name_ticks(axes, "y", list(values))
    axes.invert_yaxis()
    readable(axes, "x")
    axes.set_xlabel(label, **LITERAL)
    axes.margins(x=0.12)
    if line is not None:
        axes.axvline(line, color="tab:gray", linestyle="--", linewidth=1)
    return figure


def grouped_bars(rows: Mapping[str, Mapping[str, float]], ylabel: str, line: float | None = None) -> Figure:
    """A group of bars for every column, in each a bar for every row that has it.

    Args:
        rows: ``{row: {column: value}}``; a row is a colour with its name in the legend, a column a place on the axis.
        ylabel: what the values are, with the unit.
        line: a value to compare with, drawn across.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    figure, axes = blank(max(6, 0.22 * len(columns) * len(rows) + 2.5), 3.8)
    width = 0.8 / max(1, len(rows))
    handles = []
    for place, row in enumerate(rows.values()):
        there = [i for i, column in enumerate(columns) if column in row and math.isfinite(row[columns[i]])]
        left = [i + (place + 0.5) * width - 0.4 for i in there]
        heights = [row[columns[i]] for i in there]
        handles.append(axes.bar(left, heights, width * 0.92, color=COLOURS[place % len(COLOURS)]))
    name_ticks(axes, "x", columns)
    readable(axes, "y")
    axes.set_ylabel(ylabel, **LITERAL)
    if line is not None:
        axes.axhline(line, color="tab:gray", linestyle="--", linewidth=1)
    legend(axes, handles, list(rows))
    return figure


def lines(
    curves: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
    across: Mapping[str, float] | None = None,
    at: Sequence[float] = (),
) -> Figure:
    """Lines through points.

    Args:
        curves: ``{name: [(x, y), …]}``; names that begin alike up to a space share a colour and differ in the dashes.
        xlabel: what lies along the x axis, with the unit.
        ylabel: what lies along the y axis, with the unit.
        log_x: a logarithmic x axis; it stays linear where a value is not above zero.
        log_y: the same for the y axis.
        across: named values to compare with, such as chance, as dashed grey lines from left to right.
        at: moments, as thin grey lines from bottom to top.
    """
    figure, axes = blank(7, 3.6)
    colours: dict[str, list[str]] = {}
    handles = []
    for name, points in curves.items():
        alike = colours.setdefault(name.split(" ")[0], [])
        alike.append(name)
        colour = COLOURS[list(colours).index(name.split(" ")[0]) % len(COLOURS)]
        style = ("-", "--", ":", "-.")[(len(alike) - 1) % 4]
        x, y = np.asarray(points, dtype=float).reshape(-1, 2).T
        handles += axes.plot(x, y, color=colour, linestyle=style, marker="." if len(points) < 12 else "")
    for place, value in enumerate((across or {}).values()):
        style = ("--", ":", "-.")[place % 3]
        handles.append(axes.axhline(value, color="tab:gray", linestyle=style, linewidth=1))
    for moment in at:
        axes.axvline(moment, color="tab:gray", linewidth=0.8)
    _scale(axes, list(curves.values()), log_x, log_y)
    axes.set_xlabel(xlabel, **LITERAL)
    axes.set_ylabel(ylabel, **LITERAL)
    legend(axes, handles, [*curves, *(across or {})])
    return figure


def scatter(
    points: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
    diagonal: bool = False,
) -> Figure:
    """Points, a colour a name; a name with a single point stands beside it, others in the legend.

    Args:
        points: ``{name: [(x, y), …]}``.
        xlabel: what lies along the x axis, with the unit.
        ylabel: what lies along the y axis, with the unit.
        log_x: a logarithmic x axis; it stays linear where a value is not above zero.
        log_y: the same for the y axis.
        diagonal: draw where both are equal.
    """
    figure, axes = blank(6, 4)
    single = all(len(each) == 1 for each in points.values())
    handles = []
    for place, (name, each) in enumerate(points.items()):
        x, y = np.asarray(each, dtype=float).reshape(-1, 2).T
        handles.append(axes.scatter(x, y, s=36 if single else 14, color=COLOURS[place % len(COLOURS)]))
        if single:
            axes.annotate(
                shortened(name), (x[0], y[0]), (5, 4), textcoords="offset points", fontsize=9, parse_math=False
            )
    if diagonal:
        everything = [value for each in points.values() for point in each for value in point]
        same = np.linspace(min(everything, default=0), max(everything, default=1), 200)
        axes.plot(same, same, color="tab:gray", linewidth=1)
    _scale(axes, list(points.values()), log_x, log_y)
    axes.margins(0.18 if single else 0.05)
    axes.set_xlabel(xlabel, **LITERAL)
    axes.set_ylabel(ylabel, **LITERAL)
    if not single:
        legend(axes, handles, list(points))
    return figure


def histogram(values: Mapping[str, ArrayLike], xlabel: str, bins: int = 40, log_y: bool = False) -> Figure:
    """How the values of every name are spread, over common bins, as shares of each; what is not finite is left out."""
    figure, axes = blank(7, 3.4)
    numbers = {name: np.asarray(each, dtype=float).ravel() for name, each in values.items()}
    numbers = {name: each[np.isfinite(each)] for name, each in numbers.items()}
    together = np.concatenate([np.zeros(0), *numbers.values()])
    edges = np.histogram_bin_edges(together, bins) if len(together) else np.linspace(0, 1, bins + 1)
    handles = []
    for place, each in enumerate(numbers.values()):
        share = np.histogram(each, edges)[0] / max(1, len(each))
        handles.append(axes.stairs(share, edges, color=COLOURS[place % len(COLOURS)], linewidth=1.4))
    axes.set_xlabel(xlabel, **LITERAL)
    axes.set_ylabel("share")
    if log_y:
        axes.set_yscale("log")
    legend(axes, handles, list(numbers))
    return figure


def series(
    past: ArrayLike, predicted: ArrayLike, names: Sequence[str], future: ArrayLike | None = None, shown: int = 8
) -> Figure:
    """Series ``(C, length)``, their forecast ``(C, horizon)`` and, where it is known, what came; a row each."""
    before, ahead = np.asarray(past, dtype=float), np.asarray(predicted, dtype=float)
    after = None if future is None else np.asarray(future, dtype=float)
    rows = min(len(before), shown)
    figure = Figure(figsize=(7, 0.9 * rows + 0.7), layout="constrained")
    every = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    steps = range(before.shape[1], before.shape[1] + ahead.shape[1])
    handles = []
    for row, axes in enumerate(every):
        handles = axes.plot(before[row], color="tab:gray", linewidth=1)
        handles += [] if after is None else axes.plot(steps, after[row], color="black", linewidth=1)
        handles += axes.plot(steps, ahead[row], color="tab:blue", linewidth=1.4)
        axes.set_ylabel(shortened(names[row], 16), fontsize=8, rotation=0, ha="right", va="center", **LITERAL)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    every[-1].set_xlabel("step", fontsize=8)
    legend(every[0], handles, ["past", *(() if after is None else ("what came",)), "forecast"])
    return figure


def _at_bar(value: float) -> str:
    return f"{value:.3f}" if (math.isfinite(value) and 1e-3 <= abs(value) < 1) or value == 0 else number(value)


def _scale(axes: Axes, curves: Sequence[Points], log_x: bool, log_y: bool) -> None:
    readable(axes, "x")
    readable(axes, "y")
    if log_x:
        logarithmic(axes, "x", [x for points in curves for x, _ in points])
    if log_y:
        logarithmic(axes, "y", [y for points in curves for _, y in points])
