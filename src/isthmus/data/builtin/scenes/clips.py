"""Short clips: scenes whose objects move. A clip is a list of scenes first, pictures after that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.data.builtin.scenes.factors import CANVAS, Scene, Thing
from isthmus.data.builtin.scenes.render import render
from isthmus.data.builtin.scenes.shapes import TURN


@dataclass(frozen=True)
class Motion:
    """How one object moves from frame to frame.

    Attributes:
        dx, dy: scene units (1/1024 of the side) a frame; an object bounces off the picture's edges.
        spin: degrees clockwise a frame, about itself.
        orbit: degrees clockwise a frame, about the picture's centre, instead of ``dx`` and ``dy``.
    """

    dx: int = 0
    dy: int = 0
    spin: int = 0
    orbit: int = 0


#: What a motion is called → its direction: (dx, dy, spin, orbit) of one step.
MOTIONS: dict[str, tuple[int, int, int, int]] = {
    "stays still": (0, 0, 0, 0),
    "moves to the right": (1, 0, 0, 0),
    "moves to the left": (-1, 0, 0, 0),
    "moves down": (0, 1, 0, 0),
    "moves up": (0, -1, 0, 0),
    "turns clockwise": (0, 0, 1, 0),
    "turns anticlockwise": (0, 0, -1, 0),
    "circles clockwise": (0, 0, 0, 1),
    "circles anticlockwise": (0, 0, 0, -1),
}


@dataclass(frozen=True)
class Clip:
    """A moving scene.

    Attributes:
        video: float32 ``(T, 3, S, S)`` in [0, 1].
        scenes: the factors of every frame.
        motions: of every object.
    """

    video: Tensor
    scenes: list[Scene]
    motions: tuple[Motion, ...]


def clip(
    scene: Scene,
    frames: int,
    size: int = 64,
    motions: Sequence[Motion] | None = None,
    generator: torch.Generator | None = None,
) -> Clip:
    """Let a scene move.

    Args:
        scene: the first frame.
        frames: number of frames, T.
        size: pixels of a side, S.
        motions: one for every object; drawn from ``generator`` where they are not given.
        generator: see :func:`draw_motions`.

    Raises:
        ValueError: neither motions nor a generator, or not one motion for every object.
    """
    if motions is None:
        if generator is None:
            raise ValueError("a clip needs motions, or a generator to draw them from")
        motions = draw_motions(scene, frames, generator)
    scenes = move(scene, motions, frames)
    return Clip(render(scenes, size, ("image",))["image"], scenes, tuple(motions))


def move(scene: Scene, motions: Sequence[Motion], frames: int) -> list[Scene]:
    """The scenes of all frames; the first one is ``scene``. Light, background and grain stay."""
    if len(motions) != len(scene.objects):
        raise ValueError(f"one motion for every object: {len(scene.objects)} objects, {len(motions)} motions")
    return [
        dataclasses.replace(
            scene, objects=tuple(_moved(thing, m, t) for thing, m in zip(scene.objects, motions, strict=True))
        )
        for t in range(frames)
    ]


def _moved(thing: Thing, motion: Motion, t: int) -> Thing:
    x, y = thing.x, thing.y
    if motion.orbit:
        cosine, sine = TURN[:, motion.orbit * t % 360].tolist()
        right, down = x - CANVAS // 2, y - CANVAS // 2
        x = CANVAS // 2 + (right * cosine - down * sine + 2**13) // 2**14
        y = CANVAS // 2 + (right * sine + down * cosine + 2**13) // 2**14
    else:
        x, y = (_bounce(start, step * t, thing.size) for start, step in ((x, motion.dx), (y, motion.dy)))
    return dataclasses.replace(thing, x=x, y=y, rotation=(thing.rotation + motion.spin * t) % 360)


def _bounce(start: int, distance: int, size: int) -> int:
    """Where an object is that is thrown back whenever it touches an edge."""
    least, room = (size + 1) // 2, CANVAS - 2 * ((size + 1) // 2)
    if distance == 0 or room <= 0 or not least <= start <= least + room:
        return start + distance  # resting, too large to bounce, or outside from the start
    way = (start - least + distance) % (2 * room)
    return least + min(way, 2 * room - way)


def draw_motions(
    scene: Scene, frames: int, generator: torch.Generator, names: Sequence[str] = tuple(MOTIONS)
) -> list[Motion]:
    """A motion for every object, one of those in ``names`` that it has room for over ``frames`` frames.

    A move crosses at least an eighth of the picture without meeting an edge, a circle or a turn covers at least 60° and
    less than a full one; where an object has room for none, it stays still.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in MOTIONS]
    if unknown:
        raise ValueError(f"motion {unknown[0]!r} is unknown; choose from {', '.join(MOTIONS)}")
    steps = max(frames - 1, 1)
    motions = []
    for thing in scene.objects:
        radius = (thing.size + 1) // 2
        right, down = thing.x - CANVAS // 2, thing.y - CANVAS // 2
        options: list[Motion] = []
        for name in names:
            dx, dy, spin, orbit = MOTIONS[name]
            if dx or dy:
                room = CANVAS // 2 - radius - dx * right - dy * down
                least, most = -(-CANVAS // (8 * steps)), min(room, CANVAS // 2) // steps
            elif orbit:
                away = right * right + down * down
                fits = away >= (CANVAS // 8) ** 2 and away <= max(CANVAS // 2 - radius, 0) ** 2
                least, most = -(-60 // steps), 300 // steps if fits else 0
            elif spin:
                least, most = -(-60 // steps), 300 // steps if thing.shape not in ("circle", "ring") else 0
            else:
                least = most = 0
            if least <= most:
                speed = least + int(torch.randint(most - least + 1, (), generator=generator))
                options.append(Motion(dx * speed, dy * speed, spin * speed, orbit * speed))
        motions.append(options[int(torch.randint(len(options), (), generator=generator))] if options else Motion())
    return motions


def describe(scene: Scene, motions: Sequence[Motion]) -> str:
    """ "a red circle moves to the right and a blue square stays still", from the larger part of every motion.

    Raises:
        ValueError: not one motion for every object.
    """
    if len(motions) != len(scene.objects):
        raise ValueError(f"one motion for every object: {len(scene.objects)} objects, {len(motions)} motions")
    parts = [
        f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape} {_called(motion)}"
        for thing, motion in zip(scene.objects, motions, strict=True)
    ]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else "nothing"


def _called(motion: Motion) -> str:
    directions: Mapping[tuple[int, int, int, int], str] = {value: name for name, value in MOTIONS.items()}
    sign = lambda value: (value > 0) - (value < 0)  # noqa: E731
    if motion.orbit:
        return directions[0, 0, 0, sign(motion.orbit)]
    if abs(motion.dx) > abs(motion.dy):
        return directions[sign(motion.dx), 0, 0, 0]
    if motion.dy:
        return directions[0, sign(motion.dy), 0, 0]
    return directions[0, 0, sign(motion.spin), 0]
