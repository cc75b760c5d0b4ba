"""``street-numbers``: real handwritten digits composed to numbers on photographs, turned, blurred and cluttered.

Digits are scikit-learn's, disjoint between the splits as in ``digits``; backgrounds are places of two photographs, the
left five eighths for training and the rest for the other splits. ``NumberBox`` cuts real pictures to their number, as
the paper does with SVHN's boxes (arXiv 1312.6082, section 5.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from isthmus.codec import UserError
from isthmus.data.builtin import digits as handwriting
from isthmus.data.builtin.photos import photograph, regions
from isthmus.data.dataset import Dataset, pick_needs
from isthmus.data.hashing import normal, words
from isthmus.data.readers.decoding import resize_exactly
from isthmus.data.splits import check_split
from isthmus.data.transforms import Transform
from isthmus.data.transforms.pictures import _cropped
from isthmus.layers.random import derive_seed

_COLUMNS = ("image", "labels", "boxes", "caption")
_PHOTOGRAPHS = ("china", "flower")
_CONTRAST, _NOISE = 0.4, 0.03  # of the background; of every pixel
_DRAWS = 64
_MOST_BYTES = 256 * 2**20


class StreetNumbers(Dataset):
    """Picture i is a function of (seed, split, i)."""

    def __init__(
        self, name: str, wanted: Sequence[str], split: str, size: tuple[int, int], most: int, warp: bool, seed: int
    ) -> None:
        super().__init__(name, _COLUMNS, [str(i) for i in range(10)], size)
        self.wanted, self.size, self.most, self.warp, self.seed = tuple(wanted), size, most, warp, seed
        self.count = 0
        store = handwriting.load(split, ("image", "label"), 0)
        self.ink = [Image.fromarray(image) for image in store.data["image"][:, 0].numpy()]  # type: ignore[union-attr]
        self.names = store.data["label"]
        part = "train" if "train" in split or split == "all" else "test"
        self.walls = []
        for each in _PHOTOGRAPHS:
            pixels = photograph(each)
            left, _, right, _ = regions(*pixels.shape[:2])[part]
            self.walls.append(Image.fromarray(pixels[:, left:right]))
        self._made: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, Any]:
        sample = self._made.get(index)
        if sample is None:
            sample = self._compose(index)
            if (len(self._made) + 1) * sample["image"].numel() <= _MOST_BYTES:
                self._made[index] = sample
        return {column: sample[column] for column in self.wanted}

    def _compose(self, index: int) -> dict[str, Any]:
        height, width = self.size
        draw = _Draw(self.seed, index)
        count = 1 + draw.below(self.most)
        chosen = [draw.below(len(self.ink)) for _ in range(count)]
        layer, boxes = self._written(chosen, draw)
        wall = self._wall(draw)
        brightness = draw.between(0.35, 0.9)
        colour = np.ones(3)
        if self.warp:
            layer, boxes = self._seen_from_aside(layer, boxes, draw)
            colour = np.array([draw.between(0.6, 1.0) for _ in range(3)])
            brightness *= -1 if draw.below(2) else 1
        strength = np.asarray(layer, dtype=np.float64) / 255
        picture = wall + brightness * strength[..., None] * colour
        draws = words(derive_seed(self.seed, "noise"), [index], 2 * height * width)[0]
        picture += _NOISE * normal(draws, centred=True).reshape(height, width, 1)
        pixels = np.clip(np.round(255 * picture), 0, 255).astype(np.uint8)
        labels = self.names[chosen]  # type: ignore[index]
        return {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "labels": labels.clone(),
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "caption": "".join(str(int(label)) for label in labels),
        }

    def _written(self, chosen: Sequence[int], draw: _Draw) -> tuple[Image.Image, list[tuple[float, ...]]]:
        """The digits side by side on an empty layer, and where they are."""
        height, width = self.size
        side = max(6, round(min(0.72 * height, 0.94 * width / len(chosen)) * draw.between(0.85, 1.0)))
        side = min(side, height, width // len(chosen))
        layer = Image.new("L", (width, height))
        left = draw.below(width - side * len(chosen) + 1)
        boxes = []
        middle = draw.below(height - side + 1)
        for number in chosen:
            top = min(max(0, middle + draw.below(5) - 2), height - side)
            layer.paste(Image.fromarray(resize_exactly(self.ink[number], side)), (left, top))
            boxes.append((left, top, left + side, top + side))
            left += side
        return layer, boxes

    def _wall(self, draw: _Draw) -> np.ndarray:
        """A place of a photograph with its contrast lowered, ``(H, W, 3)`` in [0, 1]; grey where nothing is warped."""
        height, width = self.size
        wall = self.walls[draw.below(len(self.walls))]
        zoom = draw.between(1.0, 3.0)
        wide, high = min(wall.width, round(width * zoom)), min(wall.height, round(height * zoom))
        left, top = draw.below(wall.width - wide + 1), draw.below(wall.height - high + 1)
        part = wall.resize((width, height), Image.Resampling.BOX, (left, top, left + wide, top + high))
        if not self.warp:
            part = part.convert("L").convert("RGB")
        pixels = np.asarray(part, dtype=np.float64) / 255
        return 0.35 + _CONTRAST * (pixels - pixels.mean()) + (draw.between(-0.1, 0.3) if self.warp else 0.0)

    def _seen_from_aside(
        self, layer: Image.Image, boxes: list[tuple[float, ...]], draw: _Draw
    ) -> tuple[Image.Image, list[tuple[float, ...]]]:
        """Perspective, strokes of clutter, blur."""
        height, width = self.size
        corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
        jitter = np.array([[draw.between(-0.1, 0.1) for _ in range(2)] for _ in range(4)]) * (width, height)
        there = _homography(corners + jitter, corners)  # from where a pixel comes
        layer = layer.transform((width, height), Image.Transform.PERSPECTIVE, there, Image.Resampling.BILINEAR)
        back = _homography(corners, corners + jitter)
        moved = []
        for left, top, right, bottom in boxes:
            points = _mapped(back, np.array([(left, top), (right, top), (right, bottom), (left, bottom)]))
            low, high = points.min(0).clip(0), points.max(0).clip(0, (width, height))
            moved.append((float(low[0]), float(low[1]), float(high[0]), float(high[1])))
        pixels = np.array(layer)
        for _ in range(draw.below(3)):  # strokes such as a frame, a wire, a crack
            across = draw.below(2)
            place = draw.below(height if across else width)
            thick, shade = 1 + draw.below(2), 60 + draw.below(120)
            lines = pixels[place : place + thick] if across else pixels[:, place : place + thick]
            lines[:] = np.maximum(lines, shade)
        return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(draw.between(0.0, 0.9))), moved


class _Draw:
    """Numbers one after another, each a function of (seed, sample, turn)."""

    def __init__(self, seed: int, index: int) -> None:
        self.numbers = iter((words(seed, [index], _DRAWS)[0] >> np.uint64(11)).astype(np.float64) / 2**53)

    def below(self, bound: int) -> int:
        return int(next(self.numbers) * bound)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self.numbers))


def _homography(source: np.ndarray, target: np.ndarray) -> tuple[float, ...]:
    """The eight numbers with which ``source`` corners map to ``target`` corners, as PIL takes them."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y, u), (0, 0, 0, x, y, 1, -v * x, -v * y, v)]
    return tuple(_solved(np.array(rows)).tolist())


def _solved(system: np.ndarray) -> np.ndarray:
    """``(n, n + 1)`` linear equations, by elimination in an order of operations that is the same on every machine."""
    for column in range(len(system)):
        pivot = column + int(np.abs(system[column:, column]).argmax())
        system[[column, pivot]] = system[[pivot, column]]
        system[column] /= system[column, column]
        others = np.arange(len(system)) != column
        system[others] -= system[others, column, None] * system[column]
    return system[:, -1]


def _mapped(numbers: tuple[float, ...], points: np.ndarray) -> np.ndarray:
    a, b, c, d, e, f, g, h = numbers
    x, y = points[:, 0], points[:, 1]
    scale = g * x + h * y + 1
    return np.stack([(a * x + b * y + c) / scale, (d * x + e * y + f) / scale], 1)


@dataclass
class NumberBox(Transform):
    """The smallest box around all digit boxes, enlarged by ``margin``, resized to ``size`` without keeping its shape.

    What the enlarged box reaches beyond the picture is cut off. Pictures without boxes are taken whole.
    """

    size: int | tuple[int, int] = 64
    margin: float = 0.3
    fixes_size = True

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        height, width = batch["image"].shape[-2:]
        target = (self.size, self.size) if isinstance(self.size, int) else self.size
        windows = []
        for boxes in batch.get("boxes", [torch.empty(0, 4)] * len(batch["image"])):
            if not len(boxes):
                windows.append((0, 0, height, width))
                continue
            (left, top), (right, bottom) = boxes[:, :2].amin(0).tolist(), boxes[:, 2:].amax(0).tolist()
            wide, high = self.margin / 2 * (right - left), self.margin / 2 * (bottom - top)
            # A box wholly beside the picture (there are such in real data) keeps its nearest row or column.
            top, left = min(max(0, round(top - high)), height - 1), min(max(0, round(left - wide)), width - 1)
            bottom, right = min(height, round(bottom + high)), min(width, round(right + wide))
            windows.append((top, left, max(1, bottom - top), max(1, right - left)))
        kept = {key: value for key, value in batch.items() if key not in ("boxes", "labels")}
        return {
            **_cropped(kept, windows, target, "bilinear"),
            **({"labels": batch["labels"]} if "labels" in batch else {}),
        }


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    size: str = "54",
    most: int = 5,
    warp: int = 1,
    count: int = 0,
    name: str = "street-numbers",
) -> StreetNumbers:
    """Numbers of 1 to ``most`` digits on pictures of ``size`` (``H`` or ``HxW``).

    Columns: ``image``, ``labels`` (the digits, int64 ``(K,)``), ``boxes`` of the digits, ``caption`` (the number).
    ``warp=0`` leaves out colour, perspective, clutter and blur; ``count`` pictures, 4,000 for training and 1,500 in
    the other splits otherwise.
    """
    try:
        numbers = [int(number) for number in str(size).lower().split("x")]
        shape = {1: (numbers[0], numbers[0]), 2: tuple(numbers)}[len(numbers)]
    except (ValueError, KeyError):
        shape = (0, 0)
    if min(shape) < 8:
        raise UserError(f"{name}: {size!r} is no size; write street-numbers:54 or street-numbers:16x32, 8 at least.")
    if not 1 <= most <= shape[1] // 6:
        raise UserError(f"{name}: {shape[1]} pixels hold 1 to {shape[1] // 6} digits, most={most} was asked for.")
    if count < 0:
        raise UserError(f"{name}: count must be positive, got {count}.")
    part = "+".join(check_split(name, split))
    wanted = pick_needs(name, needs, _COLUMNS)
    dataset = StreetNumbers(name, wanted, part, shape, most, bool(warp), derive_seed("street-numbers", part, seed))  # type: ignore[arg-type]
    dataset.count = count or (4000 if "train" in part or part == "all" else 1500)
    return dataset
