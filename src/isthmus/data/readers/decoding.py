"""Bytes → pixels, for the image files that people have: any mode, any bit depth, rotated by EXIF, transparent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isthmus.data.dataset import Unreadable
from isthmus.data.readers.headers import check_size, decoded, orientation, plain_jpeg, read_file, turn

#: File name endings that count as images.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp"),
    *(".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)


def decode_image(source: bytes | Path) -> Tensor:
    """An encoded image → uint8 ``(3, H, W)``.

    EXIF orientation is applied; grey becomes three equal channels; 16-bit is scaled to 8-bit; transparency is laid over
    white; CMYK and palettes are converted; of an animation the first frame is taken.

    Raises:
        Unreadable: no regular file, no image, a truncated or too large one, or one without a meaning as colours.
    """
    data = read_file(source) if isinstance(source, Path) else source
    quick = _decode_plain_jpeg(data)
    if quick is not None:
        return quick
    with decoded(data) as image:
        return to_tensor(_rgb(image))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture → uint8 ``(3, H, W)`` that owns its memory."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def as_image(value: Any) -> Tensor:
    """Whatever a table's cell holds for an image (bytes, path, ``{"bytes", "path"}``, array, PIL) → ``(3, H, W)``."""
    value = file_in(value)
    if isinstance(value, (bytes, Path)):
        return decode_image(value)
    if isinstance(value, Image.Image):
        return to_tensor(_rgb(value))
    return _from_array(np.asarray(value))


def file_in(value: Any) -> Any:
    """The bytes or the path that a table's cell holds for a file; what it holds else comes back as it is.

    Raises:
        Unreadable: the cell is empty.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, str) and not value):
        raise Unreadable("the cell is empty")
    return Path(value) if isinstance(value, str) else bytes(value) if isinstance(value, bytearray) else value


def resize_exactly(picture: Image.Image, size: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Bicubic, antialiased resize of an 8-bit picture, or of its ``box`` (left, top, right, bottom), to a square.

    Pillow computes this in fixed-point integers: the result is the same on every machine.
    """
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _decode_plain_jpeg(data: bytes) -> Tensor | None:
    """The three-times-faster decoder for JPEGs that ask for no special care; ``None`` for all others.

    Complete baseline grey or RGB files without EXIF only: what is left gives the very pixels that Pillow gives, and a
    file that is damaged goes to Pillow, which notices.
    """
    size = plain_jpeg(data)
    if size is None:
        return None
    check_size(*size)
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    assert isinstance(pixels, Tensor)  # one file in, one tensor out
    if pixels.shape[0] == 1:
        return pixels.repeat(3, 1, 1)
    return pixels if pixels.shape[0] == 3 else None


def _rgb(image: Image.Image) -> Image.Image:
    image = turn(image, orientation(image))
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise Unreadable(f"its colour mode {image.mode} has no conversion to RGB") from error


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Numbers of any kind → uint8, by one guess for the whole picture.

    Truth values become 0 and 255, floats up to 1 are multiplied by 255, 16-bit numbers divided by 257. Other floats,
    and integers of 8, 32 and 64 bits up to 255, are what they are.
    """
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels.astype(np.float64)
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
            raise Unreadable("its floating-point pixels lie outside [0, 1] and [0, 255]")
        return np.rint(pixels * 255 if pixels.max() <= 1 else pixels).astype(np.uint8)
    if not np.issubdtype(pixels.dtype, np.integer):
        raise Unreadable(f"its pixels are of type {pixels.dtype}; they must be numbers")
    if pixels.min() < 0 or pixels.max() > 65535:
        raise Unreadable("its pixels lie outside the 16-bit range")
    if pixels.dtype.itemsize != 2 and pixels.max() <= 255:
        return pixels.astype(np.uint8)
    return ((pixels.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def _from_array(array: np.ndarray) -> Tensor:
    """An image as numbers, ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with one, three or four channels."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise Unreadable(f"an array of shape {array.shape} is no image; it must be (H, W), (H, W, C) or (C, H, W)")
    return to_tensor(_rgb(Image.fromarray(np.ascontiguousarray(_eight_bits(array)))))
