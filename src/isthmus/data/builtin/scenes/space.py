"""What there is to draw from: the values of every factor, and what may be planted among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from isthmus.data.builtin.scenes.factors import CANVAS, COLOURS, GROUNDS, SHAPES, code


@dataclass(frozen=True)
class Space:
    """The values that every factor may take: names, or whole numbers as a ``range`` or a tuple.

    A value that is listed twice comes twice as often. ``Space(shapes=("circle",), sizes=(200, 400))``.

    Attributes:
        objects: how many objects a scene has.
        shapes, colours, fills, sizes, xs, ys, rotations, shades, aspects: of every object, see :class:`Thing`.
        grounds, textures, pitches, angles, contrasts, lights, brightnesses, shadows, grains: of the scene.
        overlap: how much of its width one object may push into another, in percent of the smaller one.
        inside: objects lie within the picture.
        distinct: no two objects of a scene have the same shape and colour (as long as there are enough).
        without: ``(colour, shape)`` pairs that no object has, to be met for the first time in a test.
    """

    objects: Sequence[int] = range(1, 5)
    shapes: Sequence[str] = SHAPES[:8]
    colours: Sequence[str] = tuple(COLOURS)[:8]
    fills: Sequence[str] = ("plain", "plain", "plain", "stripes", "checker", "dots")
    sizes: Sequence[int] = range(220, 461)
    xs: Sequence[int] = range(CANVAS + 1)
    ys: Sequence[int] = range(CANVAS + 1)
    rotations: Sequence[int] = range(360)
    shades: Sequence[int] = range(-16, 17)
    aspects: Sequence[int] = (60,)
    grounds: Sequence[str] = tuple(GROUNDS)
    textures: Sequence[str] = ("plain", "gradient", "stripes", "checker", "dots", "speckle", "noise", "waves")
    pitches: Sequence[int] = range(96, 257)
    angles: Sequence[int] = range(180)
    contrasts: Sequence[int] = range(12, 45)
    lights: Sequence[int] = range(360)
    brightnesses: Sequence[int] = range(88, 109)
    shadows: Sequence[int] = range(20, 61)
    grains: Sequence[int] = range(9)
    overlap: int = 35
    inside: bool = True
    distinct: bool = True
    without: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        for field, attribute in ATTRIBUTES.items():
            values = getattr(self, attribute)
            if len(values) == 0:
                raise ValueError(f"{attribute} of a Space is empty; give at least one value")
            for value in (values[0], values[-1]) if isinstance(values, range) else values:
                code(field, value)
        if not self.objects or min(self.objects) < 0 or max(self.objects) > 16:
            raise ValueError(f"objects of a Space must be counts from 0 to 16, got {self.objects!r}")
        pairs = {(colour, shape) for colour in self.colours for shape in self.shapes}
        if not pairs - set(self.without):
            raise ValueError("without leaves no pair of colour and shape to draw")

    @classmethod
    def easy(cls, **values: object) -> Space:
        """One bright object on dark ground with a bar behind it and little noise: 2,000 pictures of 32 px teach it."""
        chosen: dict[str, object] = {
            "objects": (1,),
            "colours": ("white",),
            "fills": ("plain",),
            "sizes": range(384, 641),
            "shades": range(-40, 1),
            "grounds": ("black",),
            "textures": ("bar",),
            "pitches": range(64, 161),
            "contrasts": range(60, 121),
            "shadows": (0,),
            "grains": (12,),
        }
        return cls(**{**chosen, **values})  # type: ignore[arg-type]

    @classmethod
    def factorial(cls, **values: object) -> Space:
        """One object on plain ground with few values a factor, for the rule ``grid``: 4·4·3·4·4 = 768 combinations."""
        chosen: dict[str, object] = {
            "objects": (1,),
            "shapes": ("circle", "square", "triangle", "star"),
            "colours": ("red", "green", "blue", "yellow"),
            "fills": ("plain",),
            "sizes": (200, 280, 360),
            "xs": (208, 411, 613, 816),
            "ys": (208, 411, 613, 816),
            "rotations": (0,),
            "shades": (0,),
            "grounds": ("grey",),
            "textures": ("plain",),
            "pitches": (128,),
            "angles": (0,),
            "contrasts": (0,),
            "lights": (235,),
            "brightnesses": (100,),
            "shadows": (0,),
            "grains": (0,),
        }
        return cls(**{**chosen, **values})  # type: ignore[arg-type]

    @property
    def varying(self) -> tuple[str, ...]:
        """Factors with more than one value, in the order in which ``grid`` counts (the last one fastest)."""
        return tuple(field for field, attribute in ATTRIBUTES.items() if len(getattr(self, attribute)) > 1)

    @property
    def combinations(self) -> int:
        """How many scenes the full factorial has."""
        return math.prod(len(getattr(self, attribute)) for attribute in ATTRIBUTES.values())

    def values(self, field: str) -> Sequence[str] | Sequence[int]:
        """The values of one factor, named as in :class:`Thing` and :class:`Scene`."""
        if field not in ATTRIBUTES:
            raise ValueError(f"{field!r} is no factor that a Space draws; choose from {', '.join(ATTRIBUTES)}")
        return getattr(self, ATTRIBUTES[field])


#: Factor → the attribute of :class:`Space` that lists its values.
ATTRIBUTES = {
    "shape": "shapes",
    "colour": "colours",
    "fill": "fills",
    "size": "sizes",
    "x": "xs",
    "y": "ys",
    "rotation": "rotations",
    "shade": "shades",
    "aspect": "aspects",
    "ground": "grounds",
    "texture": "textures",
    "pitch": "pitches",
    "angle": "angles",
    "contrast": "contrasts",
    "light": "lights",
    "brightness": "brightnesses",
    "shadow": "shadows",
    "grain": "grains",
}


@dataclass(frozen=True)
class Bias:
    """One factor follows another: every value of ``cause`` has favourites among those of ``effect``.

    With c of C causes, the favourite among named effects is number c modulo their count, and among numbers the c-th of
    C equal parts of their list. An effect on the whole scene follows the first object.

    Attributes:
        cause: a named factor of an object (shape, colour, fill) or, for effects on the scene, also ground or texture.
        effect: any other factor.
        strength: percent of objects whose effect is a favourite; the others take any of the rest alike.
    """

    cause: str = "shape"
    effect: str = "colour"
    strength: int = 90


@dataclass(frozen=True)
class Pairing:
    """Two objects that come together.

    Attributes:
        first, second: ``(colour, shape)``.
        strength: percent of the scenes with ``first`` that also have ``second``.
        share: percent of scenes with ``first``.
        alone: percent of the scenes without ``first`` that have ``second``.
    """

    first: tuple[str, str] = ("red", "circle")
    second: tuple[str, str] = ("blue", "square")
    strength: int = 90
    share: int = 50
    alone: int = 10


def codes_of(space: Space, field: str) -> np.ndarray:
    values = space.values(field)
    return np.asarray(values if isinstance(values, range) else [code(field, value) for value in values], dtype=np.int64)


def positions(space: Space, field: str, codes: torch.Tensor) -> torch.Tensor:
    """Codes of a factor → positions in the space's list of its values (the nearest one, the first of equal ones)."""
    values = torch.from_numpy(codes_of(space, field))
    return (codes[..., None] - values).abs().argmin(-1)
