"""``folder:PATH``: the images of a folder, flat or in a subfolder a class, with or without train and test parts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from isthmus.codec import UserError
from isthmus.data.cache import keep_small
from isthmus.data.dataset import Dataset, pick_needs
from isthmus.data.hashing import fraction
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.splits import divide, part_of, spaced


class _File(NamedTuple):
    path: str
    name: str  # relative to the folder, with forward slashes
    key: str  # the same without the split's folder: what the hash split sees
    label: str | None
    part: str | None


class Folder(Dataset):
    """Images by path, decoded when they are asked for."""

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        wanted: Sequence[str],
        files: Sequence[_File],
        classes: list[str] | None,
    ) -> None:
        super().__init__(name, columns, classes)
        self.wanted, self.files = tuple(wanted), list(files)
        self._numbers = {label: number for number, label in enumerate(classes or ())}

    def __len__(self) -> int:
        return len(self.files)

    def identify(self, index: int) -> str:
        return self.files[index].name

    def read(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        sample: dict[str, Any] = {}
        if "image" in self.wanted:
            sample["image"] = decode_image(Path(file.path))
        if "label" in self.wanted and file.label is not None:
            sample["label"] = torch.tensor(self._numbers[file.label])
        return sample


def load(
    split: str, needs: Sequence[str], seed: int, *, path: str, limit: int | None = None, name: str = "folder"
) -> Dataset:
    """The images below ``path``, in the order of their names.

    Subfolders named train, val(idation) and test are the splits; what is missing is carved out as
    :mod:`isthmus.data.splits` says. If every image lies in a subfolder, the first one below the split is its ``label``
    and classes are sorted by name; otherwise there is no ``label``. Hidden files are passed over.

    Raises:
        UserError: no such folder, no image in it, or none in the split.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(_no_folder(name, root))
    parts = {child.name: part for child in root.iterdir() if child.is_dir() and (part := part_of(child.name))}
    files: list[_File] = []
    others: list[str] = []
    for relative in _walk(str(root)):
        if not relative.lower().endswith(IMAGE_SUFFIXES):
            others.append(relative)
            continue
        first, slash, inner = relative.partition("/")
        part = parts.get(first) if slash else None
        inner = inner if part else relative
        label, slash, _ = inner.partition("/")
        files.append(_File(f"{root}/{relative}", relative, inner, label if slash else None, part))
    if not files:
        told = f"; it has {len(others)} other files, such as {others[0]}" if others else "; it is empty"
        raise UserError(f"{root} holds no image (looked for {', '.join(IMAGE_SUFFIXES)}){told}.")
    labelled = all(each.label is not None for each in files)
    classes = sorted({each.label for each in files if each.label is not None}) if labelled else None
    columns = ("image", "label") if labelled else ("image",)
    numbers = divide([each.part for each in files], split, np.array([fraction(each.key) for each in files]))
    if not len(numbers):
        raise UserError(
            f"{root} has {len(files)} images but none for the split {split!r}; add images or a {split} folder."
        )
    wanted = pick_needs(name, needs, columns)
    chosen = [files[i] for i in numbers[spaced(len(numbers), limit)]]
    return keep_small(Folder(name, columns, wanted, chosen, classes))


def _walk(root: str) -> Iterator[str]:
    """Names of the visible files below ``root``, with forward slashes, sorted folder by folder, links followed once."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith((".", "__MACOSX")))
        below = folder[len(root) :].replace(os.sep, "/").strip("/")
        start = f"{below}/" if below else ""
        yield from (start + each for each in sorted(files) if not each.startswith("."))


def _no_folder(name: str, root: Path) -> str:
    if root.exists():
        return f"{name}: {root} is a file; give the folder that holds the images."
    import difflib

    parent = root.parent
    siblings = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(root.name, siblings, n=1, cutoff=0.5)
    told = f" Nearest: {parent / near[0]}." if near else ""
    return f"{name}: there is no folder {root}; give the path of a folder of images.{told}"
