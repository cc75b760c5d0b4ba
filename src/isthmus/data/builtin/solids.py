"""``solids``: points on the surfaces of four bodies: sphere, cube, cone and torus, turned and stretched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.dataset import Drawn, pick_needs
from isthmus.data.hashing import normal, unit, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("points", "label")
SOLIDS = ("sphere", "cube", "cone", "torus")
_TUBE = 0.4  # radius of the torus's tube over that of its ring


class Solids(Drawn):
    """Cloud i is a function of (seed, split, i): ``points`` float32 ``(P, 3)`` within the unit ball; ``label``."""

    def __init__(self, name: str, wanted: Sequence[str], points: int, noise: int, count: int, seed: int) -> None:
        super().__init__(name, _COLUMNS, wanted, count, seed, SOLIDS)
        self.points, self.noise = points, noise

    def draw(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        label = np.asarray(indices, dtype=np.int64) % len(SOLIDS)
        data: dict[str, torch.Tensor] = {"label": torch.from_numpy(label)}
        if "points" in self.wanted:
            data["points"] = torch.from_numpy(self._clouds(indices, label))
        return {column: data[column] for column in self.wanted}

    def _clouds(self, indices: Sequence[int], label: np.ndarray) -> np.ndarray:
        many = self.points
        where = unit(words(derive_seed(self.seed, "surface"), indices, 3 * many)).reshape(len(label), many, 3)
        cloud = np.empty((len(label), many, 3))
        for kind, draw in enumerate((_sphere, _cube, _cone, _torus)):
            cloud[label == kind] = draw(where[label == kind])
        cloud *= 0.8 + 0.4 * unit(words(derive_seed(self.seed, "stretch"), indices, 3))[:, None]
        jitter = normal(words(derive_seed(self.seed, "noise"), indices, 6 * many)).reshape(cloud.shape)
        turns = _turns(normal(words(derive_seed(self.seed, "turn"), indices, 8)))
        cloud = cloud + self.noise / 100 * jitter
        x, y, z = np.split(cloud, 3, axis=2)  # written out, because libraries round matrix products in their own way
        cloud = x * turns[:, None, 0] + y * turns[:, None, 1] + z * turns[:, None, 2]
        cloud -= cloud.mean(1, keepdims=True)
        cloud /= np.linalg.norm(cloud, axis=2).max(1)[:, None, None]
        return (np.round(cloud * 2**16) / 2**16).astype(np.float32)


def _turns(q: np.ndarray) -> np.ndarray:
    """Rotations ``(N, 3, 3)``, uniform, from normal quaternions ``(N, 4)``."""
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


# Three numbers in [0, 1) a point → a place on the surface, alike everywhere on it.


def _ring(turn: np.ndarray) -> np.ndarray:
    return np.stack([exact.cos(2 * np.pi * turn), exact.sin(2 * np.pi * turn)], -1)


def _sphere(u: np.ndarray) -> np.ndarray:
    z = 2 * u[..., :1] - 1
    return np.concatenate([np.sqrt(1 - z * z) * _ring(u[..., 1]), z], -1)


def _cube(u: np.ndarray) -> np.ndarray:
    face = np.floor(6 * u[..., 0]).astype(np.int64)[..., None]
    flat = 2 * u - 1
    axis, side = face % 3, np.where(face < 3, 1.0, -1.0)
    first, second = flat[..., 1:2], flat[..., 2:3]
    column = np.arange(3)
    place = (column - axis) % 3
    return 0.8 * np.where(place == 0, side, np.where(place == 1, first, second))


def _cone(u: np.ndarray) -> np.ndarray:
    """Base of radius 0.9 at z = -0.8, tip at 0.8."""
    radius, height = 0.9, 1.6
    slope = np.sqrt(radius**2 + height**2)
    out = np.sqrt(u[..., :1])  # of the radius: areas grow with its square
    on_base = u[..., 2:] < radius / (radius + slope)
    z = np.where(on_base, -0.8, 0.8 - height * out)
    return np.concatenate([radius * out * _ring(u[..., 1]), z], -1)


def _torus(u: np.ndarray) -> np.ndarray:
    """The ring has radius 0.75; the outer side of the tube is the larger one, so angles are drawn by area."""
    angle = 2 * np.pi * u[..., 2]
    for _ in range(8):  # Newton steps on the share of area up to an angle, (a + tube·sin a) / 2π
        angle = angle - (angle + _TUBE * exact.sin(angle) - 2 * np.pi * u[..., 2]) / (1 + _TUBE * exact.cos(angle))
    around = 0.75 * (1 + _TUBE * exact.cos(angle))[..., None]
    return np.concatenate([around * _ring(u[..., 1]), 0.75 * _TUBE * exact.sin(angle)[..., None]], -1)


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    points: int = 256,
    noise: int = 2,
    count: int = 0,
    name: str = "solids",
) -> Solids:
    """Clouds of ``points`` points, with noise of ``noise`` percent; ``count`` of them, 800 or 400 otherwise."""
    if points < 4 or noise < 0 or count < 0:
        raise UserError(
            f"{name}: points must be at least 4, noise and count at least 0; got {points}, {noise}, {count}."
        )
    part = "+".join(check_split(name, split))
    many = count or (800 if "train" in part or part == "all" else 400)
    return Solids(name, pick_needs(name, needs, _COLUMNS), points, noise, many, derive_seed("solids", part, seed))
