"""Files that say what class numbers, or the colours of masks, stand for."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

from isthmus.data.readers.masks import Palette

_COLOURED = ("class_dict.csv", "label_colors.txt", "label_colours.txt", "labelmap.txt")
_NAMED = ("classes.txt", "codes.txt", "class_names.txt", "labels.txt")
_CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_CITYSCAPES_IDS = (
    "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road", "sidewalk",
    "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole", "polegroup",
    "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus",
    "caravan", "trailer", "train", "motorcycle", "bicycle",
)  # fmt: skip


class Meaning(NamedTuple):
    """Names of class numbers by position, and the palette where masks are coloured."""

    names: list[str]
    palette: Palette | None = None


def meaning(root: Path, masks: list[str]) -> Meaning | None:
    """What a file in ``root`` says about the masks below it, or what the names of Cityscapes' files say.

    ``class_dict.csv`` has the columns name, r, g, b; ``label_colors.txt`` lines of three numbers and a name;
    ``labelmap.txt`` lines of name:r,g,b; ``classes.txt``, ``codes.txt``, ``class_names.txt`` and ``labels.txt`` a name
    a line.
    """
    for name in _COLOURED:
        if (root / name).is_file() and (rows := _coloured((root / name).read_text(encoding="utf-8-sig"))):
            return Meaning([row[0] for row in rows], Palette([row[1] for row in rows]))
    for name in _NAMED:
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
            return Meaning([line.strip() for line in lines if line.strip()])
    for ending, names in (("_gtFine_labelTrainIds.png", _CITYSCAPES), ("_gtFine_labelIds.png", _CITYSCAPES_IDS)):
        if masks and all(mask.endswith(ending) for mask in masks):
            return Meaning(list(names))
    return None


def _coloured(text: str) -> list[tuple[str, tuple[int, int, int]]]:
    """Every line that holds a name and three numbers up to 255, in whatever order and with whatever between."""
    rows = []
    for row in csv.reader(text.splitlines()):
        line = ",".join(row)
        found = re.search(r"(?<![\w.])(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})(?![\w.])", line)
        if found and not line.startswith("#"):
            name = re.sub(r"[\s,;:]+$|^[\s,;:]+", "", line[: found.start()] or line[found.end() :])
            red, green, blue = (min(255, int(each)) for each in found.groups())
            rows.append((name, (red, green, blue)))
    return rows
