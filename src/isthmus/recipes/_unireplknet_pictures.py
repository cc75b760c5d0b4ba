"""Figures of UniRepLKNet's recipe: samples as the network sees them, answers, forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from isthmus.report.figures import to_unit


def draw_inputs(seen: Mapping[str, Tensor]) -> Figure:
    """One picture ``(1, C, H, W)`` a task."""
    figure = Figure(figsize=(2.2 * len(seen) + 0.3, 2.5), layout="constrained")
    for axis, (name, picture) in zip(figure.subplots(1, len(seen), squeeze=False)[0], seen.items(), strict=True):
        _show(axis, picture, name)
        axis.set_title(name, fontsize=10)
    return figure


def draw_answer(picture: Tensor, name: str, answer: str) -> Figure:
    """What the network saw, ``(1, C, H, W)``, under what it says."""
    figure = Figure(figsize=(3.6, 3.8), layout="constrained")
    axis = figure.subplots()
    _show(axis, picture, name)
    axis.set_title(answer, fontsize=11)
    return figure


def draw_forecast(past: Tensor, told: Tensor, names: Sequence[str], future: Tensor | None = None) -> Figure:
    """Series ``(C, length)``, what is foretold ``(C, horizon)`` and, where it is known, what came; eight at most."""
    rows = min(len(past), 8)
    figure = Figure(figsize=(7, 0.9 * rows + 0.7), layout="constrained")
    ahead = range(past.shape[1], past.shape[1] + told.shape[1])
    for axis, name, seen, guess, number in zip(
        figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0], names, past, told, range(rows), strict=False
    ):
        axis.plot(range(len(seen)), seen.tolist(), color="tab:gray", lw=1)
        if future is not None:
            axis.plot(ahead, future[number].tolist(), color="black", lw=1, label="what came")
        axis.plot(ahead, guess.tolist(), color="tab:blue", lw=1.4, label="foretold")
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=7, loc="upper left")
    figure.axes[-1].set_xlabel("step", fontsize=8)
    return figure


def _show(axis: object, picture: Tensor, name: str) -> None:
    image = to_unit(picture)[0].cpu()
    grey = image.shape[0] == 1
    drawn = image[0] if grey else image.permute(1, 2, 0)
    axis.imshow(  # type: ignore[attr-defined]
        drawn.numpy(),
        cmap="magma" if grey else None,
        interpolation="nearest",
        origin="lower" if name == "audio" else "upper",
        aspect="auto" if name == "audio" else "equal",
    )
    axis.set_axis_off()  # type: ignore[attr-defined]
