"""Which column of a table is which, and what its cells become.

Tables name the same thing in many ways. An exact name comes first, then the usual names below, as long as the column's
type fits; what stays uncertain is told by the person: ``?image=pic&label=objects.category``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import as_image, file_in
from isthmus.data.readers.headers import Header, header, read_file
from isthmus.data.readers.masks import Palette, as_mask

_ALIASES = {
    "image": ("image", "img", "images", "picture", "photo", "pixel_values", "jpg", "jpeg", "png", "webp", "image.jpg"),
    "label": ("label", "labels", "fine_label", "target", "class", "category", "cls", "digit", "y"),
    "mask": (
        *("mask", "segmentation_mask", "segmentation", "annotation", "seg", "label", "mask.png", "seg.png"),
        *("mask_file_name", "mask_path"),
    ),
    "boxes": ("boxes", "bboxes"),  # bbox is as often xywh as xyxy: not guessed
    "labels": ("labels", "categories", "classes", "category"),
    "caption": ("caption", "captions", "text", "txt", "sentence", "sentences"),
    "audio": ("audio", "sound", "wav", "flac", "mp3", "ogg"),
    "signal": ("signal", "timeseries", "eeg", "meg"),
    "tokens": ("tokens", "input_ids"),
    "subject": ("subject", "subject_id", "speaker", "speaker_id", "participant"),
}
_FEW = 4096  # labels below are taken as they are, however few of them occur
_MOST = 2**20  # labels of a stream, which nobody has seen all of, are below
_FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "xyxy": lambda boxes: boxes,
    "xywh": lambda boxes: torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
    "cxcywh": lambda boxes: torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1),
}


class Columns:
    """How the rows of one table become samples.

    Args:
        name: of the source, for messages.
        features: the table's column types.
        renames: our column → the table's, where a person said so; ``objects.bbox`` reaches into a structure.
        boxes_format: what the four numbers of a box are: ``xyxy``, ``xywh`` or ``cxcywh``, in pixels.
        folder: where relative image paths start.
        palette: what the colours of masks stand for.

    Attributes:
        source: our column → the table's column, in the table's order of columns.
        names: our column → the words that its numbers stand for.

    Raises:
        UserError: a rename names a column that is not there, or an unknown box format.
    """

    def __init__(
        self,
        name: str,
        features: datasets.Features,
        renames: Mapping[str, str],
        boxes_format: str = "xyxy",
        folder: Path | None = None,
        palette: Palette | None = None,
    ) -> None:
        if boxes_format not in _FORMATS:
            raise UserError(f"{name}: boxes_format must be {', '.join(_FORMATS)}, got {boxes_format!r}.")
        self.features, self.folder, self.boxes_format, self.palette = features, folder, boxes_format, palette
        self.source = _resolve(name, features, renames)
        self.names: dict[str, list[str]] = {}
        self._places: dict[str, dict[int, int]] = {}
        for column, path in self.source.items():
            kind = _innermost(_feature(features, path))
            if isinstance(kind, datasets.ClassLabel):
                self.names[column] = list(kind.names)

    def numbered(self, columns: Iterable[str]) -> list[str]:
        """Those of ``columns`` that number classes or people by cells of their own: :meth:`learn` them beforehand."""
        return [column for column in columns if column in ("label", "labels", "subject") and column not in self.names]

    def wordy(self, columns: Iterable[str]) -> list[str]:
        """Those of :meth:`numbered` that hold words."""
        kinds = {column: _innermost(_feature(self.features, self.source[column])) for column in self.numbered(columns)}
        return [column for column, kind in kinds.items() if getattr(kind, "dtype", "").endswith("string")]

    def learn(self, column: str, values: Iterable[Any]) -> None:
        """Number the words of a column in alphabetical order, and numbers that are far apart or negative in theirs."""
        cells = {cell for value in values for cell in (value if isinstance(value, list) else [value])}
        words = sorted(cell for cell in cells if isinstance(cell, str))
        if words:
            self.names[column] = words
            return
        numbers = sorted({int(cell) for cell in cells if isinstance(cell, (int, float)) and _is_whole(cell)})
        if numbers and numbers[0] == -1 and numbers[1:4] == [0, 1, 2]:  # the usual sign of no label
            del numbers[0]
        if numbers and (numbers[0] < 0 or numbers[-1] >= max(_FEW, 4 * len(numbers))):
            self.names[column] = [str(number) for number in numbers]
            self._places[column] = {number: place for place, number in enumerate(numbers)}

    def values(self, rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[Any]:
        """The untouched cells of one column."""
        for row in rows:
            yield self._cell(row, column)

    def sample(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
        """A row of the table → the columns asked for.

        Raises:
            Unreadable: a cell is empty, damaged or of the wrong form.
        """
        sample = {}
        picture = self._picture(row) if {"mask", "boxes"} & set(columns) else None
        for column in columns:
            value = None
            try:
                value = self._cell(row, column)
                sample[column] = self._convert(column, value, picture)
            except Unreadable as error:
                raise Unreadable(f"{column}: {error}") from error
            except (TypeError, ValueError, KeyError) as error:
                raise Unreadable(f"{column}: {value!r:.60} is of no use ({error})") from error
        _check(sample)
        return sample

    def top(self, columns: Iterable[str]) -> list[str]:
        """The table's own columns that ``columns`` are read from; masks and boxes are turned as their pictures are."""
        turned = ("image",) if {"mask", "boxes"} & set(columns) and "image" in self.source else ()
        return list(dict.fromkeys(self._steps(column)[0] for column in (*columns, *turned)))

    def _picture(self, row: Mapping[str, Any]) -> Header | None:
        """Size and orientation of the encoded picture of a row, where it has one that can be read."""
        try:
            value = file_in(_located(self._cell(row, "image"), self.folder)) if "image" in self.source else None
            data = read_file(value) if isinstance(value, Path) else value
            return header(data) if isinstance(data, bytes) else None
        except Unreadable:
            return None

    def _cell(self, row: Mapping[str, Any], column: str) -> Any:
        value: Any = row
        for step in self._steps(column):
            value = value[step] if isinstance(value, Mapping) else [each[step] for each in value or ()]
        return value

    def _steps(self, column: str) -> list[str]:
        path = self.source[column]
        return [path] if path in self.features else path.split(".")

    def _convert(self, column: str, value: Any, picture: Header | None) -> Any:
        if column in ("image", "mask"):
            value = _located(value, self.folder)
            return as_image(value) if column == "image" else as_mask(value, picture, self.palette)
        if column == "boxes":
            boxes = _FORMATS[self.boxes_format](torch.as_tensor(np.asarray(value, dtype=np.float32).reshape(-1, 4)))
            if not boxes.isfinite().all():
                raise Unreadable("a box is not finite")
            return picture.turned(boxes) if picture else boxes
        if column == "labels":
            return torch.tensor([self._number(column, each) for each in value], dtype=torch.int64)
        if column in ("label", "subject"):
            return torch.tensor(self._number(column, value))
        if column == "caption":
            text = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(text, (int, float)) and _is_whole(text):  # a number to be read
                text = str(int(text))
            if not isinstance(text, str):
                raise Unreadable("the cell holds no text")
            return text
        if column == "tokens":
            return torch.as_tensor(np.asarray(value, dtype=np.int64))
        if column == "signal":
            return torch.atleast_2d(torch.as_tensor(np.asarray(value, dtype=np.float32)))  # one series is one channel
        if column == "audio" and isinstance(value, (str, bytes, Mapping)):
            file = file_in(_located(value, self.folder))
            return read_file(file) if isinstance(file, Path) else file
        return _plain(value)

    def _number(self, column: str, value: Any) -> int:
        """The class or person that a cell stands for."""
        if value is None or value != value:
            raise Unreadable("the cell is empty")
        names = self.names.get(column)
        if isinstance(value, str):
            if names is None or value not in names:
                raise Unreadable(f"{value!r} is none of the known words")
            return names.index(value)
        if not _is_whole(value):
            raise Unreadable(f"{value} is no whole number, as classes are")
        number = self._places[column].get(int(value), -1) if column in self._places else int(value)
        if not 0 <= number < (len(names) if names else _MOST):
            raise Unreadable(f"{value} is no class{f': there are {len(names)}' if names else ''}")
        return number


def _is_whole(value: float) -> bool:
    return isinstance(value, int) or (math.isfinite(value) and float(value).is_integer())


def _resolve(name: str, features: datasets.Features, renames: Mapping[str, str]) -> dict[str, str]:
    for column, path in renames.items():
        if _feature(features, path) is None:
            near = difflib.get_close_matches(path, features, n=1)
            told = f" Nearest: {near[0]}." if near else ""
            raise UserError(
                f"{name}: there is no column {path!r} to take as {column}; there are {', '.join(features)}.{told}"
            )
    found = dict(renames)
    taken = set(renames.values())
    for exact in (True, False):
        for column, aliases in _ALIASES.items():
            for alias in aliases[:1] if exact else aliases:
                if (
                    column not in found
                    and alias in features
                    and alias not in taken
                    and _fits(column, alias, features[alias])
                ):
                    found[column] = alias
                    taken.add(alias)
    pictures = [each for each, kind in features.items() if isinstance(kind, datasets.Image) and each not in taken]
    if "image" not in found and len(pictures) == 1:
        found["image"] = pictures[0]
    others = {each: each for each in features if each not in found.values() and not each.startswith("__")}
    if "caption" not in found and _fits("label", "number", features.get("number")):
        found["caption"] = "number"  # what a picture of a number says
    return found | {column: path for column, path in others.items() if column not in found}


def _fits(column: str, alias: str, kind: Any) -> bool:
    """Whether a column of this type can be what its name says (``labels`` is one number here and a list there)."""
    listed = isinstance(kind, (datasets.List, datasets.LargeList, list)) or hasattr(kind, "shape")
    number = isinstance(kind, datasets.ClassLabel) or (
        isinstance(kind, datasets.Value) and not kind.dtype.startswith(("binary", "large_binary"))
    )
    if column in ("label", "subject"):
        return number
    if column in ("boxes", "labels", "tokens", "signal"):
        return listed
    if column == "mask":
        path = alias.startswith("mask") and getattr(kind, "dtype", "").endswith("string")
        return listed or isinstance(kind, datasets.Image) or _holds_bytes(kind) or path
    if column == "image":
        return (
            listed or isinstance(kind, datasets.Image) or _holds_bytes(kind) or getattr(kind, "dtype", "") == "string"
        )
    if column == "caption":
        return getattr(_innermost(kind), "dtype", "").endswith("string")
    return True


def _holds_bytes(kind: Any) -> bool:
    return "bytes" in kind if isinstance(kind, dict) else getattr(kind, "dtype", "") in ("binary", "large_binary")


def _feature(features: Mapping[str, Any], path: str) -> Any:
    """The type of a column, or of a part of a structure; ``None`` where there is none."""
    if path in features:
        return features[path]
    kind: Any = features
    for step in path.split("."):
        kind = _innermost(kind) if not isinstance(kind, Mapping) else kind
        kind = kind.get(step) if isinstance(kind, Mapping) else None
    return kind


def _innermost(kind: Any) -> Any:
    while isinstance(kind, (datasets.List, datasets.LargeList, list)):
        kind = kind[0] if isinstance(kind, list) else kind.feature
    return kind


def _located(value: Any, folder: Path | None) -> Any:
    """An image given as a path starts at the table's folder; as an address, it is fetched; of several, the first."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Mapping, bytes)):
        value = value[0]
    if isinstance(value, Mapping) and not value.get("bytes") and value.get("path"):
        value = value["path"]
    if isinstance(value, str) and "://" in value:
        try:
            with fsspec.open(value, "rb") as file:
                return file.read()  # type: ignore[union-attr]
        except OSError as error:
            raise Unreadable(f"{value} cannot be opened ({error})") from error
    return folder / value if isinstance(value, str) and folder else value


def _plain(value: Any) -> Any:
    """Numbers and lists of numbers as tensors; all else as it is."""
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if isinstance(value, list) and value:
        try:
            return torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            return value
    return value


def _check(sample: Mapping[str, Any]) -> None:
    if "image" in sample and "mask" in sample and sample["image"].shape[-2:] != sample["mask"].shape[-2:]:
        sizes = [f"{each.shape[-2]}×{each.shape[-1]}" for each in (sample["image"], sample["mask"])]
        raise Unreadable(f"the image is {sizes[0]} and its mask {sizes[1]}")
    if "boxes" in sample and "labels" in sample and len(sample["boxes"]) != len(sample["labels"]):
        raise Unreadable(f"it has {len(sample['boxes'])} boxes and {len(sample['labels'])} labels")
