"""The first layer: what is in a scene. Plain data, all integers and names; pictures and words are made from it.

Lengths are in 1/1024 of the picture's side, x to the right and y downwards, angles in degrees clockwise, so that a
scene has no resolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: The picture's side in scene units.
CANVAS = 1024
#: Shapes by name; the first eight are the default choice.
SHAPES = (
    *("circle", "square", "triangle", "star", "ring", "cross", "moon", "ellipse"),
    *("rectangle", "heart", "hexagon", "arrow"),
)
#: Colours of objects, RGB; the first eight are the default choice.
COLOURS = {
    "red": (214, 48, 49),
    "green": (58, 164, 76),
    "blue": (52, 101, 220),
    "yellow": (246, 202, 44),
    "purple": (138, 74, 198),
    "orange": (243, 128, 38),
    "pink": (242, 118, 172),
    "cyan": (62, 196, 214),
    "white": (240, 240, 236),
    "brown": (134, 84, 54),
}
#: Colours of backgrounds, RGB: muted, so that every object stands out.
GROUNDS = {
    "grey": (112, 116, 122),
    "black": (24, 24, 30),
    "sand": (206, 192, 166),
    "navy": (34, 44, 78),
    "olive": (92, 98, 66),
    "maroon": (84, 40, 50),
    "teal": (34, 84, 90),
    "slate": (66, 74, 92),
}
#: Textures of backgrounds and fills of objects.
TEXTURES = ("plain", "gradient", "stripes", "checker", "dots", "speckle", "noise", "waves", "bar")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene.

    Attributes:
        shape: one of :data:`SHAPES`.
        colour: one of :data:`COLOURS`.
        size: diameter of the circle around the shape.
        x: of that circle's centre.
        y: of that circle's centre.
        rotation: degrees clockwise.
        depth: distance from the viewer, 0 to 254 (the background stands at 255); nearer objects hide farther ones.
        fill: texture on its surface, one of :data:`TEXTURES`.
        shade: lightness added to its colour, of 255.
        aspect: height in percent of width, of ellipses and rectangles only.
    """

    shape: str
    colour: str
    size: int
    x: int
    y: int
    rotation: int = 0
    depth: int = 0
    fill: str = "plain"
    shade: int = 0
    aspect: int = 60


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects before a background.

    Attributes:
        objects: in any order; ``depth`` says which hides which.
        ground: colour of the background, one of :data:`GROUNDS`.
        texture: of the background, one of :data:`TEXTURES`.
        pitch: period of the texture.
        angle: of the texture, degrees.
        contrast: difference between the texture's two tones, of 255.
        light: where light comes from, degrees (0 is right, 90 below, 270 above).
        brightness: of the whole picture, percent.
        shadow: darkness of the objects' shadows, percent; 0 draws none.
        grain: amplitude of fine noise, of 255.
        seed: of everything random in textures and grain.
    """

    objects: tuple[Thing, ...] = ()
    ground: str = "grey"
    texture: str = "plain"
    pitch: int = 128
    angle: int = 0
    contrast: int = 40
    light: int = 235
    brightness: int = 100
    shadow: int = 0
    grain: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.objects)


#: What the columns of :class:`Table` mean.
THING_FIELDS = tuple(f.name for f in dataclasses.fields(Thing))
SCENE_FIELDS = tuple(f.name for f in dataclasses.fields(Scene) if f.name != "objects")
#: Names of the factors that are names rather than numbers.
NAMES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "fill": TEXTURES,
    "ground": tuple(GROUNDS),
    "texture": TEXTURES,
}
#: Least and most that a number may be.
_LIMITS = {
    "size": (1, 4 * CANVAS),
    "x": (-4 * CANVAS, 5 * CANVAS),
    "y": (-4 * CANVAS, 5 * CANVAS),
    "rotation": (-(2**20), 2**20),
    "depth": (0, 254),
    "shade": (-255, 255),
    "aspect": (5, 100),
    "pitch": (8, 4 * CANVAS),
    "angle": (-(2**20), 2**20),
    "contrast": (0, 255),
    "light": (-(2**20), 2**20),
    "brightness": (0, 400),
    "shadow": (0, 100),
    "grain": (0, 255),
    "seed": (0, 2**31 - 1),
}


@dataclass
class Table:
    """Many scenes as integers: what is drawn from and what is rendered.

    Attributes:
        things: int64 ``(N, K, F)``, columns as in :data:`THING_FIELDS`, names as their position in :data:`NAMES`.
        present: bool ``(N, K)``; rows of ``things`` that are absent hold zeros.
        scene: int64 ``(N, G)``, columns as in :data:`SCENE_FIELDS`.
    """

    things: Tensor
    present: Tensor
    scene: Tensor

    def __len__(self) -> int:
        return len(self.scene)

    def thing(self, field: str) -> Tensor:
        """``(N, K)`` of one factor of the objects."""
        return self.things[..., THING_FIELDS.index(field)]

    def whole(self, field: str) -> Tensor:
        """``(N,)`` of one factor of the scenes."""
        return self.scene[:, SCENE_FIELDS.index(field)]

    def rows(self, chosen: slice | Tensor) -> Table:
        """Some of the scenes."""
        return Table(self.things[chosen], self.present[chosen], self.scene[chosen])

    def to(self, device: torch.device | str) -> Table:
        """The same scenes on another device."""
        return Table(self.things.to(device), self.present.to(device), self.scene.to(device))


def encode(scenes: Sequence[Scene]) -> Table:
    """Scenes → integers.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    most = max((len(scene.objects) for scene in scenes), default=0)
    absent = [0] * len(THING_FIELDS)
    things, present = [], []
    for scene in scenes:
        rows = [_codes(thing, THING_FIELDS) for thing in scene.objects]
        things.append(rows + [absent] * (most - len(rows)))
        present.append([True] * len(rows) + [False] * (most - len(rows)))
    n = len(scenes)
    return Table(
        torch.tensor(things, dtype=torch.int64).reshape(n, most, len(THING_FIELDS)),
        torch.tensor(present, dtype=torch.bool).reshape(n, most),
        torch.tensor([_codes(s, SCENE_FIELDS) for s in scenes], dtype=torch.int64).reshape(n, len(SCENE_FIELDS)),
    )


def decode(table: Table) -> list[Scene]:
    """Integers → scenes; the inverse of :func:`encode`."""
    scenes = []
    for things, present, whole in zip(table.things.tolist(), table.present.tolist(), table.scene.tolist(), strict=True):
        objects = tuple(_thing(row) for row, here in zip(things, present, strict=True) if here)
        ground, texture, *numbers = whole
        scenes.append(Scene(objects, NAMES["ground"][ground], TEXTURES[texture], *numbers))
    return scenes


def _thing(row: list[int]) -> Thing:
    shape, colour, size, x, y, rotation, depth, fill, shade, aspect = row
    names = NAMES["colour"]
    return Thing(SHAPES[shape], names[colour], size, x, y, rotation, depth, TEXTURES[fill], shade, aspect)


def _codes(item: Thing | Scene, fields: Iterable[str]) -> list[int]:
    return [code(field, getattr(item, field)) for field in fields]


def code(field: str, value: str | int) -> int:
    """The integer that stands for a factor's value.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    if field in NAMES:
        if value not in NAMES[field]:
            raise ValueError(f"{field} {value!r} is unknown; choose from {', '.join(NAMES[field])}")
        return NAMES[field].index(str(value))
    least, most = _LIMITS[field]
    if not isinstance(value, int | np.integer) or not least <= value <= most:
        raise ValueError(f"{field} must be a whole number from {least} to {most}, got {value!r}")
    return int(value)


def without_texture(scene: Scene) -> Scene:
    """The same scene with plain surfaces, no shadow and no grain: its structure alone."""
    objects = tuple(dataclasses.replace(thing, fill="plain") for thing in scene.objects)
    return dataclasses.replace(scene, objects=objects, texture="plain", shadow=0, grain=0)
