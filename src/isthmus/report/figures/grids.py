"""Maps, tables of counts, and pictures in rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from isthmus.report.figures.words import LITERAL, blank, name_ticks, shortened, title


def maps(
    values: Mapping[str, ArrayLike],
    label: str = "",
    signed: bool = False,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    columns: int = 6,
) -> Figure:
    """Maps ``(H, W)`` under their names, in common colours with a bar that says what they mean.

    Args:
        values: by name; tensors may be on any device.
        label: what the values are, beside the bar of colours.
        signed: blue below zero, red above, zero white; else from dark to light.
        low: value of the first colour, the smallest of all without it.
        high: value of the last colour, the largest of all without it.
        log: colours by the logarithm; what is not above zero stays white.
        columns: maps a row.
    """
    shown = {name: _array(each) for name, each in values.items()}
    if log:
        shown = {name: np.log10(np.where(each > 0, each, np.nan)) for name, each in shown.items()}
    finite = np.concatenate([np.zeros(0), *(each[np.isfinite(each)] for each in shown.values())])
    first = float(finite.min()) if low is None and len(finite) else low or 0.0
    last = float(finite.max()) if high is None and len(finite) else 1.0 if high is None else high
    if signed:
        last = max(abs(first), abs(last))
        first = -last
    columns = max(1, min(columns, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    shape = next(iter(shown.values())).shape if shown else (1, 1)
    height = 2.1 * min(2.0, max(0.4, shape[0] / shape[1]))
    figure = Figure(figsize=(2.1 * columns + 0.8, (height + 0.3) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    drawn = None
    for axis in axes:
        axis.axis("off")
    for axis, (name, each) in zip(axes, shown.items(), strict=False):
        drawn = axis.imshow(each, cmap="RdBu_r" if signed else "viridis", vmin=first, vmax=last)
        title(axis, name, 28, fontsize=9)
    if drawn is not None:
        text = f"{label} (log10)".strip() if log else label
        figure.colorbar(drawn, ax=list(axes), shrink=0.8).set_label(text, fontsize=8, **LITERAL)
    return figure


def confusion_matrix(counts: ArrayLike, names: Sequence[str]) -> Figure:
    """Shares of every true class (rows) that were taken for each class (columns), from counts ``(K, K)``.

    Numbers stand in the cells of up to twenty classes; of more the colours tell.
    """
    table = _array(counts)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    few = len(names) <= 20
    side = 0.6 * len(names) if few else 9.0
    longest = max((len(shortened(name, 32)) for name in names), default=0) * 0.07
    figure, axes = blank(max(3.0, side + longest + 1), max(2.6, side + longest + 0.6))
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 9 if few else 6
    name_ticks(axes, "x", names, size)
    name_ticks(axes, "y", names, size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if few:
        for row, column in np.ndindex(*share.shape):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{share[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=9)
    else:
        figure.colorbar(drawn, ax=axes, shrink=0.6).set_label("share of the true class", fontsize=8)
    return figure


def table(
    values: Mapping[str, Mapping[str, float]], xlabel: str = "", ylabel: str = "", low: float = 0, high: float = 1
) -> Figure:
    """Numbers ``{row: {column: value}}`` in coloured cells; what is missing stays white."""
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    cells = np.array([[row.get(column, math.nan) for column in columns] for row in values.values()], dtype=float)
    figure, axes = blank(max(3.5, 0.6 * len(columns) + 2), max(2, 0.45 * len(values) + 1))
    axes.imshow(cells, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    name_ticks(axes, "x", columns)
    name_ticks(axes, "y", list(values))
    axes.set_xlabel(xlabel, **LITERAL)
    axes.set_ylabel(ylabel, **LITERAL)
    for row, column in np.ndindex(*cells.shape if len(columns) <= 16 else (0, 0)):
        if math.isfinite(cells[row, column]):
            colour = "white" if cells[row, column] > (low + high) / 2 else "black"
            text = f"{cells[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def captioned(
    images: Tensor, captions: Sequence[str], correct: Sequence[bool] | None = None, columns: int = 8
) -> Figure:
    """Pictures ``(N, C, H, W)`` in rows of ``columns``, each under its caption.

    Args:
        images: one channel is drawn grey, three in colour; each is stretched to all brightnesses.
        captions: one a picture.
        correct: captions are green where it is true, red where it is not; black without it.
        columns: pictures a row.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.4 * columns, 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    colours = ["black" if correct is None else "tab:green" if right else "tab:red" for right in correct or captions]
    unit = to_unit(images).cpu() if len(images) else images
    for axis, image, caption, colour in zip(axes[: len(images)], unit, captions, colours, strict=True):
        _show(axis, image)
        lines = "\n".join(shortened(line, 24) for line in str(caption).splitlines())
        longest = max(map(len, lines.splitlines()), default=0)
        axis.set_title(lines, color=colour, fontsize=min(9.0, 150 / max(1, longest)), pad=2, **LITERAL)
    return figure


def pictures(rows: Mapping[str, Tensor], columns: int = 8, titles: Sequence[str] = (), unit: bool = False) -> Figure:
    """Rows of pictures ``(N, C, H, W)`` in [0, 1] (or bytes), each row with its name in front.

    Args:
        rows: by name; as many pictures are shown as every row has, ``columns`` at most.
        columns: the most pictures a row.
        titles: names above the columns.
        unit: stretch every picture to all brightnesses, for values that have no scale of their own.
    """
    shown = min(columns, min((len(each) for each in rows.values()), default=0))
    room = 0.085 * max((len(shortened(name, 24)) for name in rows), default=0)
    figure = Figure(figsize=(1.2 * shown + room + 0.2, 1.25 * len(rows) + 0.3 * bool(titles)), layout="constrained")
    if not shown:
        return figure
    axes = figure.subplots(len(rows), shown, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        images = to_unit(images[:shown]) if unit else images[:shown]
        for axis, image in zip(line, images, strict=True):
            _show(axis, image.cpu())
        settings: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 9, **LITERAL}
        line[0].set_ylabel(shortened(name, 24), **settings)
    for axis, text in zip(axes[0], titles, strict=False):
        title(axis, text, 18, fontsize=8)
    return figure


def sheet(images: Tensor, columns: int, smallest: int = 64) -> Any:
    """Pictures ``(N, C, H, W)`` in [0, 1] in rows, as one PIL image, small ones enlarged with their pixels visible."""
    factor = max(1, smallest // images.shape[-1])
    images = images.detach().cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return to_pil_image(make_grid(images, nrow=columns, padding=2, pad_value=0.5))


def first_filters(networks: Mapping[str, nn.Module]) -> Figure | None:
    """The kernels of every network's first convolution, in colour; ``None`` where one does not see three channels."""
    kernels = {}
    for name, network in networks.items():
        first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or first.in_channels != 3:
            return None
        kernels[name] = first.weight.detach().cpu()
    figure = Figure(figsize=(4 * len(kernels), 2.3), layout="constrained")
    for axis, (name, kernel) in zip(figure.subplots(1, len(kernels), squeeze=False).flat, kernels.items(), strict=True):
        grid = make_grid(to_unit(kernel), nrow=8, padding=1, pad_value=1.0)
        _show(axis, grid)
        title(axis, name, 50, fontsize=10)
    return figure


def to_unit(images: Tensor) -> Tensor:
    """Every image stretched to [0, 1], for values that have no scale of their own (kernels, normalised pictures)."""
    images = images if images.is_floating_point() else images.float()
    low, high = (reduce(images, dim=(1, 2, 3), keepdim=True) for reduce in (torch.amin, torch.amax))
    return (images - low) / (high - low).clamp_min(1e-9)


def _show(axis: Axes, image: Tensor) -> None:
    """One picture ``(C, H, W)``: three channels in colour, one grey, of others the mean."""
    pixels = image.detach().cpu()
    pixels = pixels.float() / (1 if pixels.is_floating_point() else 255)
    pixels = pixels.nan_to_num().clamp(0, 1)
    if len(pixels) != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
