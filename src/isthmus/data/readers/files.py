"""``folder:PATH``: pictures or sounds as files, with classes, parts, masks or a table of metadata beside them.

How a folder may look is written in ``docs/data.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data.cache import keep_small
from isthmus.data.dataset import Dataset, Unreadable, pick_needs
from isthmus.data.hashing import fraction
from isthmus.data.readers import layout, pairs
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.readers.headers import header, read_file
from isthmus.data.readers.masks import decode_mask, is_lossy
from isthmus.data.readers.palettes import Meaning, meaning
from isthmus.data.readers.sounds import SOUND_SUFFIXES
from isthmus.data.readers.walk import walk
from isthmus.data.splits import divide, spaced

GUIDE = "docs/data.md shows how a folder may look"


class File(NamedTuple):
    """A picture or a sound of a folder, what belongs to it, and what the hash sees that divides the source."""

    name: str
    key: str
    part: str | None = None
    label: str | None = None
    mask: str | None = None


class Folder(Dataset):
    """Pictures or sounds by path, read when they are asked for.

    Args:
        root: the folder that names start from.
        files: the samples.
        classes: of their labels.
        masks: what masks mean.

    The others are those of :class:`Dataset`.
    """

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        wanted: Sequence[str],
        root: Path,
        files: Sequence[File],
        classes: list[str] | None = None,
        masks: Meaning | None = None,
    ) -> None:
        super().__init__(name, columns, classes)
        self.wanted, self.root, self.files = tuple(wanted), root, list(files)
        self.palette = masks.palette if masks else None
        self.mask_classes = masks.names if masks else None
        self._numbers = {label: number for number, label in enumerate(classes or ())}

    def __len__(self) -> int:
        return len(self.files)

    def identify(self, index: int) -> str:
        return self.files[index].name

    def read(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        sample: dict[str, Any] = {}
        for column in self.wanted:
            if column == "label":
                sample["label"] = torch.tensor(self._numbers[file.label or ""])
            elif column == "caption":
                sample["caption"] = number_in(file.name)
        if {"image", "mask", "audio"} & set(self.wanted):
            self._read_file(file, sample)
        return {column: sample[column] for column in self.wanted}

    def _read_file(self, file: File, sample: dict[str, Any]) -> None:
        data = read_file(self.root / file.name)
        if "audio" in self.wanted:
            sample["audio"] = data
        if "image" in self.wanted:
            sample["image"] = decode_image(data)
        if "mask" in self.wanted and file.mask is not None:
            try:
                sample["mask"] = decode_mask(self.root / file.mask, header(data), self.palette)
            except Unreadable as error:
                raise Unreadable(f"{file.mask}: {error}") from error
            if "image" in sample and sample["image"].shape[-2:] != sample["mask"].shape:
                sizes = [f"{each.shape[-2]}×{each.shape[-1]}" for each in (sample["image"], sample["mask"])]
                raise Unreadable(f"the picture is {sizes[0]} and its mask {file.mask} {sizes[1]}")


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    path: str,
    number: str = "",
    boxes_format: str = "xyxy",
    limit: int | None = None,
    renames: Mapping[str, str] | None = None,
    name: str = "folder",
) -> Dataset:
    """The pictures or sounds below ``path``, in the order of their names.

    A ``metadata.csv``, ``.jsonl`` or ``.parquet`` says what belongs to each file, :mod:`.metadata`. Else masks are
    found by :mod:`.pairs`, and classes and parts by :mod:`.layout`. Hidden files are passed over.

    Args:
        split: see :mod:`isthmus.data.splits`.
        needs: columns to read.
        seed: unused.
        path: the folder.
        number: ``name`` takes the number in every file's name as its ``caption``.
        boxes_format: of boxes in metadata: ``xyxy``, ``xywh`` or ``cxcywh``.
        limit: at most so many samples, evenly spaced.
        renames: our column → the metadata's; without metadata ``image`` and ``mask`` name folders.
        name: what messages call the source.

    Raises:
        UserError: no such folder, nothing in it to read, or none in the split.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(_no_folder(name, root))
    if number not in ("", "name"):
        raise UserError(f"{name}: number={number!r} is unknown; number=name takes the number in a file's name.")
    tree = walk(str(root))
    from isthmus.data.readers import metadata

    if table := metadata.beside(tree):
        return metadata.load(name, root, tree, table, split, needs, boxes_format, renames or {}, limit)
    if renames and not renames.keys() <= {"image", "mask"}:
        raise UserError(
            f"{name}: only a table names columns, and {root} has no metadata.csv or .jsonl; image=FOLDER and "
            f"mask=FOLDER name folders of pictures and of masks. {GUIDE}."
        )
    pictures = [file for file in tree.files if file.lower().endswith(IMAGE_SUFFIXES)]
    sounds = [file for file in tree.files if file.lower().endswith(SOUND_SUFFIXES)]
    heard = "audio" in needs or (bool(sounds) and not pictures)
    kind, found, suffixes = ("sound", sounds, SOUND_SUFFIXES) if heard else ("picture", pictures, IMAGE_SUFFIXES)
    if not found:
        told = f"it has {len(tree.files)} other files, such as {tree.files[0]}" if tree.files else "it is empty"
        raise UserError(f"{root} holds no {kind} (looked for {', '.join(suffixes)}); {told}. {GUIDE}.")
    paired = None if heard else pairs.find(found, **(renames or {}))
    if renames and paired is None:
        told = ", ".join(f"{role}={where}" for role, where in renames.items())
        raise UserError(f"{name}: {told} leaves pictures or masks without a file; {GUIDE}.")
    files, notes, masks = _of_pairs(root, paired, needs) if paired else ([], [], None)
    classes = None
    if not paired:
        arranged = layout.arrange(found)
        files = [File(place.name, place.key, place.part, place.label) for place in arranged.places]
        classes = sorted({file.label for file in files if file.label is not None}) if arranged.labelled else None
        notes = arranged.notes + layout.say_parts(arranged.places) + layout.say_left_out(tree, found, kind)
    columns = (
        "audio" if heard else "image",
        *(("label",) if classes else ()),
        *(("mask",) if paired else ()),
        *(("caption",) if number else ()),
    )
    wanted = pick_needs(name, needs, columns, GUIDE)
    numbers = divide([file.part for file in files], split, np.array([fraction(file.key) for file in files]))
    if not len(numbers):
        raise UserError(
            f"{root} has {len(files)} {kind}s but none for the split {split!r}; add {kind}s or a {split} folder."
        )
    chosen = [files[i] for i in numbers[spaced(len(numbers), limit)]]
    dataset = Folder(name, columns, wanted, root, chosen, classes, masks)
    dataset.notes = notes
    return keep_small(dataset)


def number_in(name: str) -> str:
    """The digits that a file's name begins with, else the last ones in it: ``1984_2.png`` and ``house_1984.png``.

    Raises:
        Unreadable: there are none.
    """
    stem = name.rpartition("/")[2].rpartition(".")[0]
    found = re.match(r"\d+", stem) or re.search(r"\d+(?=\D*$)", stem)
    if found is None:
        raise Unreadable("its name holds no number")
    return found[0]


def _of_pairs(root: Path, found: pairs.Pairs, needs: Sequence[str]) -> tuple[list[File], list[str], Meaning | None]:
    """Pictures with their masks, notes, and what the masks mean; pictures without one where none is asked for."""
    asked = "mask" in needs or "mask?" in needs
    kept = [pair for pair in found.pairs if pair.mask or not asked]
    places = layout.parts_of([pair.key for pair in kept])
    files = [File(pair.image, place.key, place.part, None, pair.mask) for pair, place in zip(kept, places, strict=True)]
    masks = [pair.mask for pair in found.pairs if pair.mask]
    notes = [f"{len(masks)} of {len(found.pairs)} pictures have a mask, such as {masks[0]}." if masks else ""]
    if len(kept) < len(found.pairs):
        bare = next(pair.image for pair in found.pairs if not pair.mask)
        notes.append(f"{len(found.pairs) - len(kept)} pictures without a mask are left out, such as {bare}.")
    if found.alone:
        notes.append(f"{len(found.alone)} masks belong to no picture, such as {found.alone[0]}.")
    lossy = sum(_is_lossy(root / mask) for mask in masks[:20])
    if lossy and asked:
        notes.append(
            "Masks are stored as JPEG or lossy WebP, which changes class numbers along edges; save them as PNG."
        )
    if asked and not kept:
        raise UserError(f"{root} has pictures and masks, but none of like names ({found.alone[0]}). {GUIDE}.")
    return files, [*filter(None, notes), *layout.say_parts(places)], meaning(root, masks)


def _is_lossy(path: Path) -> bool:
    try:
        return is_lossy(read_file(path))
    except Unreadable:
        return False


def _no_folder(name: str, root: Path) -> str:
    if root.exists():
        return f"{name}: {root} is a file; give the folder that holds the images."
    import difflib

    parent = root.parent
    siblings = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(root.name, siblings, n=1, cutoff=0.5)
    told = f" Nearest: {parent / near[0]}." if near else ""
    return f"{name}: there is no folder {root}; give the path of a folder of images.{told}"
