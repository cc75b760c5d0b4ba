"""Bytes → pixels, for the image files that people have: any mode, any bit depth, rotated by EXIF, transparent."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from isthmus.data.dataset import Unreadable

#: File name endings that count as images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"


def decode_image(source: bytes | Path) -> Tensor:
    """An encoded image → uint8 ``(3, H, W)``.

    EXIF orientation is applied; grey becomes three equal channels; 16-bit is scaled to 8-bit; transparency is laid over
    white; CMYK and palettes are converted; of an animation the first frame is taken.

    Raises:
        Unreadable: no image, a truncated one, or one without a meaning as colours.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise Unreadable(f"cannot be opened ({error.strerror or error})") from error
    quick = _decode_plain_jpeg(data)
    if quick is not None:
        return quick
    with _opened(data) as image:
        return to_tensor(_rgb(image))


def decode_mask(source: bytes | Path) -> Tensor:
    """An encoded mask → int64 ``(H, W)``; pixel values, or palette positions, are the class numbers.

    Raises:
        Unreadable: no image, a truncated one, or colours instead of class numbers.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise Unreadable(f"cannot be opened ({error.strerror or error})") from error
    with _opened(data) as image:
        pixels = np.asarray(image)
    if pixels.ndim == 3:
        if (pixels[..., 1:3] != pixels[..., :1]).any():
            raise Unreadable("the mask holds colours; it must hold one class number a pixel (grey or palette)")
        pixels = pixels[..., 0]
    if not np.issubdtype(pixels.dtype, np.integer) and pixels.dtype != np.bool_:
        raise Unreadable("the mask holds real numbers; it must hold one class number a pixel")
    return torch.from_numpy(pixels.astype(np.int64))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture → uint8 ``(3, H, W)`` that owns its memory."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def as_image(value: Any) -> Tensor:
    """Whatever a table's cell holds for an image (bytes, path, ``{"bytes", "path"}``, array, PIL) → ``(3, H, W)``."""
    if isinstance(value, dict):
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    if isinstance(value, (bytes, bytearray)):
        return decode_image(bytes(value))
    if isinstance(value, (str, Path)):
        return decode_image(Path(value))
    if isinstance(value, Image.Image):
        return to_tensor(_rgb(value))
    if value is None:
        raise Unreadable("the cell is empty")
    return _from_array(np.asarray(value))


def as_mask(value: Any) -> Tensor:
    """Whatever a table's cell holds for a mask → int64 ``(H, W)``."""
    if isinstance(value, dict):
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    if isinstance(value, (bytes, bytearray)):
        return decode_mask(bytes(value))
    if isinstance(value, (str, Path)):
        return decode_mask(Path(value))
    if value is None:
        raise Unreadable("the cell is empty")
    array = np.asarray(value)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise Unreadable(
            f"the mask is an array of shape {array.shape} and type {array.dtype}; it must be (H, W) integers"
        )
    return torch.from_numpy(array.astype(np.int64))


def resize_exactly(picture: Image.Image, size: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Bicubic, antialiased resize of an 8-bit picture, or of its ``box`` (left, top, right, bottom), to a square.

    Pillow computes this in fixed-point integers: the result is the same on every machine.
    """
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _opened(data: bytes) -> Image.Image:
    """Open and decode completely, so that a truncated file is found out here."""
    if not data:
        raise Unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise Unreadable("is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"is too large ({error})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, … on damaged files
        raise Unreadable(f"does not decode ({error})") from error
    return image


def _decode_plain_jpeg(data: bytes) -> Tensor | None:
    """The three-times-faster decoder for JPEGs that ask for no special care; ``None`` for all others.

    Complete baseline grey or RGB files without EXIF only: what is left gives the very pixels that Pillow gives, and a
    file that is damaged goes to Pillow, which notices.
    """
    if not data.startswith(_JPEG_START) or not data.endswith(_JPEG_END) or b"Exif\0" in data[:65536]:
        return None
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
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _from_deep(np.asarray(image))
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


def _from_deep(pixels: np.ndarray) -> Image.Image:
    """Grey of 16 or 32 bits or floating point → RGB: 16-bit values are divided by 257, floats in [0, 1] times 255."""
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
            raise Unreadable("its floating-point pixels lie outside [0, 1] and [0, 255]")
        grey = np.rint(pixels * 255) if pixels.max() <= 1 else np.rint(pixels)
    else:
        wide = pixels.astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise Unreadable("its pixels lie outside the 16-bit range")
        eight_bit = pixels.dtype.itemsize >= 4 and wide.max() <= 255
        grey = wide if eight_bit else (wide * 255 + 32767) // 65535
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _from_array(array: np.ndarray) -> Tensor:
    """An image as numbers, ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with one, three or four channels."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise Unreadable(f"an array of shape {array.shape} is no image; it must be (H, W), (H, W, C) or (C, H, W)")
    if array.dtype != np.uint8:
        if array.ndim == 2:
            return to_tensor(_from_deep(array))
        return torch.cat([_from_array(array[..., c])[:1] for c in range(3)])
    return to_tensor(_rgb(Image.fromarray(array)))
