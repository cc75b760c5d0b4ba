"""``photos``: patches of the sixteen photographs that scikit-image and scikit-learn ship.

Natural images that need no network. ``label`` is the photograph a patch comes from. Every photograph is cut once and
for all into three regions that do not touch: the left five eighths for training; of the rest, the upper 40 % for
validation and the lower 60 % for test. A patch is a square of a region, 40 to 100 % as wide as the narrowest of the
three regions, so that patches of all splits are alike in scale, resized to the size asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from isthmus.codec import UserError
from isthmus.data.dataset import Dataset, Memory, pick_needs
from isthmus.data.hashing import below, words
from isthmus.data.readers.decoding import decode_image, resize_exactly
from isthmus.data.splits import PARTS, check_split
from isthmus.layers.random import derive_seed

#: Photograph → the package and the file that hold it. Colour, unless the comment says otherwise.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),  # grey
    "camera": ("skimage", "data/camera.png"),  # grey
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),  # grey
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),  # grey
    "gravel": ("skimage", "data/gravel.png"),  # grey
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),  # grey
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
_COUNTS = {"train": 4096, "val": 512, "test": 1024}
_MEMORY = 256 * 2**20  # bytes of patches that are kept rather than cut anew


class Patches(Dataset):
    """Patches cut on demand: where they lie is drawn at once, their pixels when they are asked for."""

    def __init__(self, name: str, wanted: Sequence[str], names: Sequence[str], size: int, places: np.ndarray) -> None:
        super().__init__(name, ("image", "label"), names, (size, size))
        self.wanted, self.size, self.places = tuple(wanted), size, places
        self.photographs = [Image.fromarray(photograph(each)) for each in names]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> dict[str, Any]:
        which, left, top, side = self.places[index].tolist()
        sample: dict[str, Any] = {}
        if "image" in self.wanted:
            patch = resize_exactly(self.photographs[which], self.size, (left, top, left + side, top + side))
            sample["image"] = torch.from_numpy(np.array(patch.transpose(2, 0, 1), order="C"))
        if "label" in self.wanted:
            sample["label"] = torch.tensor(which)
        return sample


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    size: int = 64,
    count: int = 0,
    include: str = "",
    name: str = "photos",
) -> Dataset:
    """Patches of ``size`` × ``size`` pixels, labels balanced.

    Args:
        split: ``train``, ``val``, ``test`` or a sum of them.
        needs: columns to read, of ``image`` and ``label``.
        seed: draws the places of the patches; the regions do not depend on it.
        size: pixels of a side.
        count: patches a split; 4,096, 512 and 1,024 by default.
        include: comma-separated names of photographs, all sixteen by default.
    """
    wanted = pick_needs(name, needs, ("image", "label"))
    names = [each.strip() for each in include.split(",")] if include else list(PHOTOGRAPHS)
    unknown = [each for each in names if each not in PHOTOGRAPHS]
    if unknown:
        raise UserError(f"{name}: there is no photograph {unknown[0]!r}; there are {', '.join(PHOTOGRAPHS)}.")
    if size < 1 or count < 0:
        raise UserError(f"{name}: size must be at least 1 and count not negative, got {size} and {count}.")
    parts = PARTS if check_split(name, split) == ["all"] else check_split(name, split)
    places = np.concatenate([_places(names, part, count or _COUNTS[part], seed) for part in parts])
    patches = Patches(name, wanted, names, size, places)
    if len(places) * 3 * size * size > _MEMORY:
        return patches
    samples = [patches.read(i) for i in range(len(patches))]
    data = {key: torch.stack([sample[key] for sample in samples]) for key in wanted}
    return Memory(name, data, patches.columns, names)


@cache
def photograph(name: str) -> np.ndarray:
    """The whole photograph, uint8 ``(H, W, 3)``.

    Raises:
        UserError: the installed package does not hold it.
    """
    package, file = PHOTOGRAPHS[name]
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else Path(package)
    if not (folder / file).is_file():
        raise UserError(f"the installed {package} holds no {file}; install the version that constraints.txt names.")
    pixels = decode_image(folder / file).numpy().transpose(1, 2, 0)
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return pixels


def regions(height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
    """Split → (left, top, right, bottom) of its region in a photograph of that size."""
    column, row = width * 5 // 8, height * 2 // 5
    return {"train": (0, 0, column, height), "val": (column, 0, width, row), "test": (column, row, width, height)}


def _places(names: Sequence[str], part: str, count: int, seed: int) -> np.ndarray:
    """``(count, 4)`` int64: photograph, left, top and side of every patch of a part."""
    draws = words(derive_seed("photos", part, seed), np.arange(count), 3)
    which = np.arange(count) % len(names)
    shapes = [photograph(each).shape[:2] for each in names]
    boxes = np.array([regions(*shape)[part] for shape in shapes])[which]
    narrowest = [
        min(min(right - left, bottom - top) for left, top, right, bottom in regions(*shape).values())
        for shape in shapes
    ]
    largest = np.array(narrowest)[which]
    smallest = largest * 2 // 5
    side = smallest + below(draws[:, 0], largest - smallest + 1)
    left = boxes[:, 0] + below(draws[:, 1], boxes[:, 2] - boxes[:, 0] - side + 1)
    top = boxes[:, 1] + below(draws[:, 2], boxes[:, 3] - boxes[:, 1] - side + 1)
    return np.stack([which, left, top, side], axis=1)
