"""Samples of any modality as the network sees them, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping

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
    """What the network saw, ``(1, C, H, W)``, under what it predicts."""
    figure = Figure(figsize=(3.6, 3.8), layout="constrained")
    axis = figure.subplots()
    _show(axis, picture, name)
    axis.set_title(answer, fontsize=11)
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
