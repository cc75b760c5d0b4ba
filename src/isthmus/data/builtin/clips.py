"""``clips``: short films of one square that moves right, left, down or up, or circles the middle either way.

No single frame tells which; only their order does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data import exact
from isthmus.data.builtin.scenes import CANVAS, MOTIONS, Motion, Scene, Thing, describe, move, render
from isthmus.data.dataset import Drawn, pick_needs
from isthmus.data.hashing import below, normal, unit, words
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_COLUMNS = ("video", "label", "caption")
_NAMES = (
    "moves to the right",
    "moves to the left",
    "moves down",
    "moves up",
    "circles clockwise",
    "circles anticlockwise",
)
_COLOURS = ("red", "green", "blue", "yellow", "white")


class Clips(Drawn):
    """Clip i is a function of (seed, split, i): ``video`` uint8 ``(T, 3, S, S)``, ``label``, ``caption``."""

    def __init__(
        self, name: str, wanted: Sequence[str], size: int, frames: int, noise: int, count: int, seed: int
    ) -> None:
        super().__init__(name, _COLUMNS, wanted, count, seed, _NAMES)
        self.size, self.frames, self.noise = size, frames, noise

    def scene(self, index: int) -> tuple[Scene, Motion]:
        """The first frame of a clip, and how its square moves."""
        draws = words(derive_seed(self.seed, "scene"), [index], 9)[0]
        size, colour = 180 + int(below(draws[0], 121)), _COLOURS[int(below(draws[1], len(_COLOURS)))]
        dx, dy, _, orbit = MOTIONS[_NAMES[index % len(_NAMES)]]
        radius, steps = (size + 1) // 2, max(self.frames - 1, 1)
        if orbit:
            away = CANVAS // 4 + int(below(draws[2], CANVAS // 2 - radius - CANVAS // 4))
            turn = 2 * np.pi * unit(draws[3])
            x, y = (CANVAS // 2 + round(away * float(f(turn))) for f in (exact.cos, exact.sin))
            motion = Motion(orbit=orbit * ((90 + int(below(draws[4], 180))) // steps or 1))
        else:
            speed = (CANVAS // 4 + int(below(draws[4], CANVAS // 4))) // steps or 1
            room = CANVAS - 2 * radius
            along = radius + int(below(draws[2], room - speed * steps + 1))  # in the direction of the motion
            across = radius + int(below(draws[3], room + 1))
            forward = along if dx + dy > 0 else CANVAS - along
            x, y = (forward, across) if dx else (across, forward)
            motion = Motion(dx * speed, dy * speed)
        thing = Thing("square", colour, size, x, y, int(below(draws[5], 90)), shade=int(below(draws[6], 33)) - 16)
        return Scene((thing,), ground="black", texture="plain", grain=0, seed=int(below(draws[7], 2**31 - 1))), motion

    def draw(self, indices: Sequence[int]) -> dict[str, Any]:
        scenes = [self.scene(int(index)) for index in indices]
        data: dict[str, Any] = {"label": torch.as_tensor(np.asarray(indices, dtype=np.int64) % len(_NAMES))}
        if "caption" in self.wanted:
            data["caption"] = [describe(scene, [motion]) for scene, motion in scenes]
        if "video" in self.wanted:
            frames = [frame for scene, motion in scenes for frame in move(scene, [motion], self.frames)]
            video = render(frames, self.size, ("image",))["image"].unflatten(0, (len(scenes), self.frames))
            if self.noise:
                cells = self.frames * self.size**2
                grain = normal(words(derive_seed(self.seed, "noise"), indices, 2 * cells)) * (self.noise / 100)
                video = video + torch.from_numpy(grain).view(len(scenes), self.frames, 1, self.size, self.size)
            data["video"] = video.mul(255).round().clamp(0, 255).to(torch.uint8)
        return {column: data[column] for column in self.wanted}


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    size: int = 16,
    frames: int = 8,
    noise: int = 15,
    count: int = 0,
    name: str = "clips",
) -> Clips:
    """Clips of ``frames`` pictures of ``size`` pixels, with noise of ``noise`` percent; 900, or 400 to test."""
    if size < 8 or not 2 <= frames <= 256 or noise < 0 or count < 0:
        raise UserError(
            f"{name}: size must be at least 8, frames from 2 to 256, noise and count at least 0; got {size}, {frames}, "
            f"{noise} and {count}."
        )
    part = "+".join(check_split(name, split))
    many = count or (900 if "train" in part or part == "all" else 400)
    return Clips(name, pick_needs(name, needs, _COLUMNS), size, frames, noise, many, derive_seed("clips", part, seed))
