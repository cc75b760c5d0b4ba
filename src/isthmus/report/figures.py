"""Figures that several recipes draw. Nothing here is shown on a screen; ``run.figure`` keeps what these return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import make_grid


def bars(values: Mapping[str, float], label: str = "accuracy", grey: str = "untrained") -> Figure:
    """One horizontal bar a value; those whose name contains ``grey``, the comparisons, stand back."""
    figure, axis = _figure(5.5, 0.42 * len(values) + 0.8)
    drawn = axis.barh(
        [name.replace("_", " ") for name in values],
        list(values.values()),
        color=["tab:gray" if grey in name else "tab:blue" for name in values],
    )
    axis.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def confusion(counts: Tensor, names: Sequence[str]) -> Figure:
    """Shares of every true class (rows) that were taken for each class (columns), from counts ``(K, K)``."""
    share = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    figure, axis = _figure(0.75 * len(names) + 1.2, 0.75 * len(names) + 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("told")
    axis.set_ylabel("true")
    for row, column in np.ndindex(*share.shape):
        colour = "white" if share[row, column] > 0.5 else "black"
        axis.text(column, row, f"{share[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=9)
    return figure


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
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    return figure


def captioned(images: Tensor, captions: Sequence[str], right: Sequence[bool], columns: int) -> Figure:
    """Pictures ``(N, 3, H, W)`` in rows of ``columns``, each under its caption, green where it is right, else red."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.3 * columns, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    shown = axes[: len(images)]
    for axis, picture, caption, good in zip(shown, to_unit(images).cpu(), captions, right, strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(caption, color="tab:green" if good else "tab:red", fontsize=9, pad=2)
    return figure


def to_unit(images: Tensor) -> Tensor:
    """Every image stretched to [0, 1], for values that have no scale of their own (kernels, normalised pictures)."""
    low, high = (reduce(images, dim=(1, 2, 3), keepdim=True) for reduce in (torch.amin, torch.amax))
    return (images - low) / (high - low).clamp_min(1e-9)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
