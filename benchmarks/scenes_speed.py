"""Scenes a second on one thread: factors, pictures, words, against drawing the same with Pillow.

    python -m benchmarks.scenes_speed

Pillow draws at four times the size and shrinks, as is usual for smooth edges; it gets plain circles, squares, triangles
and hexagons on flat ground, one scene after the other. Ours draws the same scenes, then the full ones (textures, fills,
shadows, grain, one to four objects of eight shapes).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.common import compare, record, table
from isthmus.data.builtin.scenes import COLOURS, GROUNDS, Scene, Space, caption, encode, load, paint, question, sample

COUNT = 512
PLAIN = Space(
    shapes=("circle", "square", "triangle", "hexagon"),
    fills=("plain",),
    textures=("plain",),
    shadows=(0,),
    grains=(0,),
)
_CORNERS = {"square": (4, 45), "triangle": (3, -90), "hexagon": (6, 0)}
_SCALE = {"square": 1.0, "triangle": 1.0, "hexagon": 0.96}


def pillow(scenes: list[Scene], size: int) -> np.ndarray:
    """The scenes drawn with Pillow, four times too large and shrunk."""
    pictures = []
    for scene in scenes:
        picture = Image.new("RGB", (4 * size, 4 * size), GROUNDS[scene.ground])
        draw = ImageDraw.Draw(picture)
        for thing in sorted(scene.objects, key=lambda thing: -thing.depth):
            scale = 4 * size / 1024
            x, y, radius = thing.x * scale, thing.y * scale, thing.size / 2 * scale
            colour = tuple(min(255, max(0, c + thing.shade)) for c in COLOURS[thing.colour])
            if thing.shape == "circle":
                draw.ellipse([x - 0.88 * radius, y - 0.88 * radius, x + 0.88 * radius, y + 0.88 * radius], fill=colour)
            else:
                corners, start = _CORNERS[thing.shape]
                angles = [math.radians(thing.rotation + start + 360 * k / corners) for k in range(corners)]
                reach = radius * _SCALE[thing.shape]
                draw.polygon([(x + reach * math.cos(a), y + reach * math.sin(a)) for a in angles], fill=colour)
        pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.BOX)))
    return np.stack(pictures)


def main() -> None:
    torch.set_num_threads(1)
    plain = sample(COUNT, "uniform", torch.Generator().manual_seed(0), PLAIN)
    full = sample(COUNT, "uniform", torch.Generator().manual_seed(0))
    cases = {"draw factors": lambda: sample(COUNT, "uniform", torch.Generator().manual_seed(0))}
    for size in (64, 224):
        cases[f"plain, Pillow, {size} px"] = lambda size=size: pillow(plain, size)
        cases[f"plain, ours, {size} px"] = lambda size=size: paint(encode(plain), size)
    for size in (32, 64, 128, 224):
        cases[f"full, image, {size} px"] = lambda size=size: paint(encode(full), size)
    everything = ("image", "masks", "amodal", "boxes", "depth")
    cases["full, all outputs, 64 px"] = lambda: paint(encode(full), 64, everything)
    dataset = load("train", ("image", "label"), 0, count=COUNT)
    cases["dataset, image and label, 64 px"] = lambda: dataset.fetch(range(COUNT))
    cases["captions"] = lambda: [caption(scene) for scene in full]
    cases["questions"] = lambda: [question(scene) for scene in full]
    rows = compare(cases, rounds=5)
    for row in rows.values():
        row["scenes/s"] = COUNT / row["seconds"]
    print(table(rows))
    print(record("scenes_speed", rows, count=COUNT))


if __name__ == "__main__":
    main()
