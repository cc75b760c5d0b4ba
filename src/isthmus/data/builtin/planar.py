"""``planar``: points of the plane in two half moons, two circles or a spiral of several arms, to see decisions whole.

The sets on which relevance pruning was first shown (Yeom et al., arXiv 1912.08881, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.dataset import Memory, pick_needs
from isthmus.data.hashing import polar, unit, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("signal", "label")
SHAPES = ("moon", "circle", "spiral")
_NOISE = {"moon": 0.1, "circle": 0.1, "spiral": 0.06}  # deviation of a point from its curve
_TURNS = 0.5  # that an arm of the spiral goes round on its way out


def points(shape: str, label: np.ndarray, along: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Places ``(N, 2)`` of samples, about as far from the middle as one.

    Args:
        shape: moon, circle or spiral.
        label: class of each, ``(N,)``; the arms of the spiral are spread evenly.
        along: where on its curve each lies, in [0, 1).
        noise: ``(N, 2)`` added, in deviations of the shape's noise.
    """
    if shape == "moon":
        upper = _on_circle(np.pi * along)
        curve = np.where(label[:, None] == 0, upper, np.array([1, 0.5]) - upper) - np.array([0.5, 0.25])
    elif shape == "circle":
        curve = np.where(label == 0, 1.0, 0.5)[:, None] * _on_circle(2 * np.pi * along)
    else:
        arms = int(label.max()) + 1 if len(label) else 1
        curve = (0.15 + 0.85 * along)[:, None] * _on_circle(2 * np.pi * (label / arms + _TURNS * along))
    return curve + _NOISE[shape] * noise


def _on_circle(angle: np.ndarray) -> np.ndarray:
    return np.stack([exact.cos(angle), exact.sin(angle)], 1)


def load(
    split: str, needs: Sequence[str], seed: int, *, kind: str = "moon", count: int = 400, arms: int = 4, name: str
) -> Memory:
    """``count`` points; classes take turns. Columns: ``signal`` (2,), float32, and ``label``.

    Args:
        split: other splits are other draws; those besides train have 1,000 points where ``count`` is left out.
        needs: columns to give.
        seed: of the draw.
        kind: moon, circle (two classes each) or spiral.
        count: points.
        arms: classes of the spiral.
        name: for messages.

    Raises:
        UserError: an unknown shape, or too few points or arms.
    """
    part = "+".join(check_split(name, split))
    if kind not in SHAPES:
        raise UserError(f"{name}: there is no set {kind!r}; there are {', '.join(SHAPES)}.")
    classes = arms if kind == "spiral" else 2
    if classes < 2 or count < classes:
        raise UserError(f"{name}: needs two arms and a point of each class at least, got {arms} arms, {count} points.")
    if count == 400 and "train" not in part and part != "all":
        count = 1000
    label = np.arange(count) % classes
    draws = words(derive_seed("planar", kind, part, seed), np.arange(count), 3)
    length, angle = polar(draws[:, 1:], centred=True)
    places = points(kind, label, unit(draws[:, 0]) + 2**-54, length * _on_circle(angle[:, 0]))
    data: dict[str, Any] = {
        "signal": torch.from_numpy(places.astype(np.float32)),
        "label": torch.from_numpy(label.astype(np.int64)),
    }
    kept = {column: data[column] for column in pick_needs(name, needs, _COLUMNS)}
    names = {"moon": ["upper", "lower"], "circle": ["outer", "inner"]}.get(kind, [f"arm {i}" for i in range(classes)])
    return Memory(name, kept, _COLUMNS, names)
