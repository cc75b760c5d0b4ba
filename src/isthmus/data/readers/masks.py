"""Masks: one class number a pixel, from grey, palette or coloured files, turned as their pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import file_in
from isthmus.data.readers.headers import Header, decoded, opened, orientation, read_file, turn

#: Class numbers end here: a larger one would ask for as many outputs of a network.
MOST_CLASSES = 65536


class Palette:
    """Colours that stand for classes.

    Args:
        colours: class number → ``(red, green, blue)``, by position.
    """

    def __init__(self, colours: Sequence[tuple[int, int, int]]) -> None:
        codes = _codes(np.array(colours, dtype=np.uint8).reshape(-1, 3))
        self._order = np.argsort(codes, kind="stable")
        self._sorted = codes[self._order]

    def numbers(self, pixels: np.ndarray) -> np.ndarray:
        """RGB ``(H, W, 3)`` uint8 → class numbers ``(H, W)``.

        Raises:
            Unreadable: a colour that stands for no class.
        """
        codes = _codes(pixels)
        place = np.searchsorted(self._sorted, codes).clip(max=len(self._sorted) - 1)
        strange = self._sorted[place] != codes
        if strange.any():
            red, green, blue = pixels[strange][0].tolist()
            raise Unreadable(f"the mask holds the colour {red} {green} {blue}, which stands for no class")
        return self._order[place]


def decode_mask(source: bytes | Path, picture: Header | None = None, palette: Palette | None = None) -> Tensor:
    """An encoded mask → int64 ``(H, W)``; pixel values, or palette positions, are the class numbers.

    Args:
        source: grey (transparency is passed over), a palette, or colours that ``palette`` knows.
        picture: what the mask belongs to. A mask without an orientation of its own that has the size of the stored
            picture is turned as the picture is.
        palette: colours → numbers.

    Raises:
        Unreadable: no image, a truncated one, or colours instead of class numbers.
    """
    data = read_file(source) if isinstance(source, Path) else source
    own = orientation(opened(data))
    with decoded(data) as image:
        if own == 1 and picture is not None and image.size == (picture.width, picture.height):
            own = picture.orientation
        elif image.format == "TIFF":  # Pillow has turned it
            own = 1
        image = turn(image, own)
        if palette is not None and image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;"):
            try:
                return torch.from_numpy(palette.numbers(np.asarray(image.convert("RGB"))))
            except Unreadable:
                if image.mode != "P":  # whose positions may be the numbers, whatever their colours
                    raise
        return _as_numbers(np.asarray(image))


def as_mask(value: Any, picture: Header | None = None, palette: Palette | None = None) -> Tensor:
    """Whatever a table's cell holds for a mask → int64 ``(H, W)``; see :func:`decode_mask`."""
    value = file_in(value)
    if isinstance(value, (bytes, Path)):
        return decode_mask(value, picture, palette)
    array = np.asarray(value)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]) and not isinstance(value, Image.Image):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2 and not isinstance(value, Image.Image):
        raise Unreadable(f"the mask is an array of shape {array.shape}; it must be (H, W)")
    return _as_numbers(array)


def is_lossy(data: bytes) -> bool:
    """Whether a file is a JPEG or a WebP whose compression changes pixels."""
    return data.startswith(b"\xff\xd8") or (data[8:12] == b"WEBP" and data[12:16] == b"VP8 ")


def _as_numbers(pixels: np.ndarray) -> Tensor:
    if pixels.ndim == 3:
        if pixels.shape[2] >= 3 and (pixels[..., 1:3] != pixels[..., :1]).any():
            raise Unreadable(
                "the mask holds colours; it must hold one class number a pixel (grey or palette), or a file such as "
                "class_dict.csv must say what its colours stand for"
            )
        pixels = pixels[..., 0]
    if np.issubdtype(pixels.dtype, np.floating) and np.isfinite(pixels).all() and (pixels == np.rint(pixels)).all():
        pixels = np.rint(pixels).astype(np.int64)
    if not np.issubdtype(pixels.dtype, np.integer) and pixels.dtype != np.bool_:
        raise Unreadable("the mask holds real numbers; it must hold one class number a pixel")
    numbers = pixels.astype(np.int64)
    if numbers.size and numbers.max() >= MOST_CLASSES:
        raise Unreadable(f"the mask holds {numbers.max()}; class numbers are below {MOST_CLASSES}")
    return torch.from_numpy(numbers)


def _codes(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    return (red << 16) | (green << 8) | blue
