"""Eight heaps in the unit square, learned two at a time: what learners predict everywhere, after every task.

Points of two dimensions show at a glance what a stream of classes does to a learner (arXiv 2207.11240, figure 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

CLASSES, TASKS = 8, 4
_SIDE = 80  # places a side at which predictions are drawn


class Drawn(NamedTuple):
    """What came of it: accuracy on all eight classes by learner, after the last task; and the picture."""

    accuracy: dict[str, float]
    figure: Figure


def heaps(generator: torch.Generator, number: int = 100, spread: float = 0.03) -> tuple[Tensor, Tensor]:
    """``number`` points of each class around a ring of centres: ``(8·number, 2)`` in the unit square, and labels."""
    angle = torch.arange(CLASSES) * (2 * torch.pi / CLASSES)
    centres = 0.5 + 0.35 * torch.stack([angle.cos(), angle.sin()], 1)
    centres = centres[torch.randperm(CLASSES, generator=generator)]
    label = torch.arange(CLASSES).repeat_interleave(number)
    points = centres[label] + spread * torch.randn(len(label), 2, generator=generator)
    return points.clamp(0, 1), label


def draw(models: Mapping[str, nn.Module], points: Tensor, label: Tensor, steps: int = 1000, lr: float = 1e-3) -> Drawn:
    """Learn the four tasks one after the other, ``steps`` of Adam on all points of a task.

    Args:
        models: points ``(B, 2)`` to logits ``(B, 8)``, trained in place.
        points: of :func:`heaps`.
        label: likewise.
        steps: for every task.
        lr: of Adam.
    """
    axis = (torch.arange(_SIDE) + 0.5) / _SIDE
    square = torch.cartesian_prod(axis, axis).flip(1)  # rows are y
    figure = Figure(figsize=(2.2 * TASKS, 2.3 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), TASKS, squeeze=False)
    accuracy = {}
    for row, (name, model) in enumerate(models.items()):
        for task in range(TASKS):
            chosen = label // (CLASSES // TASKS) == task
            _learn(model, points[chosen], label[chosen], steps, lr)
            model.eval()
            with torch.no_grad():
                predicted = model(square).argmax(1).view(_SIDE, _SIDE)
                accuracy[name] = float((model(points).argmax(1) == label).float().mean())
            _panel(axes[row][task], predicted, points, label, (task + 1) * (CLASSES // TASKS))
            axes[row][task].set_title(f"{name}, task {task + 1}: {accuracy[name]:.0%} of all", fontsize=8)
    return Drawn(accuracy, figure)


def _learn(model: nn.Module, x: Tensor, label: Tensor, steps: int, lr: float) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimiser.step()


def _panel(axis, predicted: Tensor, points: Tensor, label: Tensor, seen: int) -> None:
    colours = colormaps["tab10"]
    axis.imshow(colours(predicted.numpy()), origin="lower", extent=(0, 1, 0, 1), alpha=0.45, interpolation="nearest")
    shown = (label < seen).numpy() & (np.arange(len(label)) % 4 == 0)
    axis.scatter(*points.numpy()[shown].T, c=colours(label.numpy()[shown]), s=5, linewidths=0)
    axis.set_xticks([])
    axis.set_yticks([])
