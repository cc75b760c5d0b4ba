"""What is known of an image file before it is decoded: that it is a file, its size, how its picture is turned."""

from __future__ import annotations

import contextlib
import io
import stat
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from isthmus.data.dataset import Unreadable

#: Pixels of the largest picture that is decoded, in every format; Pillow's own limit.
MOST_PIXELS = 178_956_970

_JPEG_START = b"\xff\xd8"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """Width and height as they are stored, and the EXIF orientation, 1 to 8, with which the picture is shown."""

    width: int
    height: int
    orientation: int = 1

    def turned(self, boxes: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` in xyxy pixels of the stored picture → of the picture that is shown."""
        left, top, right, bottom = boxes.unbind(1)
        if self.orientation in (2, 3, 7, 8):  # mirrored from left to right, before columns become rows
            left, right = self.width - right, self.width - left
        if self.orientation in (3, 4, 6, 7):
            top, bottom = self.height - bottom, self.height - top
        corners = (top, left, bottom, right) if self.orientation >= 5 else (left, top, right, bottom)
        return torch.stack(corners, 1)


def read_file(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        Unreadable: there is none, it may not be read, or it is a folder, a pipe or a device, which might never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unreadable("is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be opened ({error.strerror or error})") from error


def opened(data: bytes) -> Image.Image:
    """A picture whose header is read and whose size is allowed; nothing is decoded yet.

    Raises:
        Unreadable: no image that Pillow knows, or one that is too large.
    """
    if not data:
        raise Unreadable("the file is empty")
    size = _jpeg_size(data)
    if size is not None:
        check_size(*size)
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise Unreadable("is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"is too large ({error})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, … on damaged files
        raise Unreadable(f"does not decode ({error})") from error
    check_size(*image.size)
    return image


def decoded(data: bytes) -> Image.Image:
    """:func:`opened` and decoded completely, so that a truncated file is found out here."""
    image = opened(data)
    try:
        image.load()
    except Exception as error:  # see above
        raise Unreadable(f"does not decode ({error})") from error
    return image


def header(data: bytes) -> Header:
    """Size and orientation of an encoded picture, which is not decoded."""
    if (size := plain_jpeg(data)) is not None:
        return Header(*size)
    image = opened(data)
    width, height, turned = *image.size, orientation(image)
    if image.format == "TIFF" and turned >= 5:  # Pillow tells the size of the turned picture
        width, height = height, width
    return Header(width, height, turned)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none."""
    value = 1
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _TURNS else 1


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """A stored picture as its EXIF orientation shows it."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def check_size(width: int, height: int) -> None:
    """Refuse what would fill the memory.

    Raises:
        Unreadable: more than :data:`MOST_PIXELS`.
    """
    if width * height > MOST_PIXELS:
        raise Unreadable(f"is too large ({width} × {height} pixels; {MOST_PIXELS} in all are decoded)")


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a complete JPEG without EXIF; ``None`` for everything else."""
    return _jpeg_size(data) if data.endswith(b"\xff\xd9") and b"Exif\0" not in data[:65536] else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """What the frame header of a JPEG says; the segments before it are stepped over."""
    if not data.startswith(_JPEG_START):
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[place + i : place + i + 2]) for i in (5, 7))
            return (width, height) if width and height else None
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4])
    return None
