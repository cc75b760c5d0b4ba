"""A picture as exact 8-bit planes and whatever else makes it look as it does, to and from Pillow."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from isthmus.codec import UserError

#: Pillow's modes that are kept, with how many planes each has. Their place in this list is written into files.
MODES = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 1}
#: Most pixels of a picture.
LARGEST = 2**28
_BYTES = ("palette", "icc_profile", "exif")


@dataclass
class Picture:
    """One picture.

    Attributes:
        mode: of :data:`MODES`.
        planes: ``(H, W, P)`` uint8: grey, colours, alpha, or numbers of palette entries.
        extras: palette, colour profile and EXIF as bytes, ``transparency`` of a palette as bytes or a number.
    """

    mode: str
    planes: np.ndarray
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        """8 bytes that tell these pixels and extras from any others."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"{self.mode} {self.planes.shape}".encode())
        digest.update(np.ascontiguousarray(self.planes).tobytes())
        digest.update(pack_extras(self.extras))
        return digest.digest()


def read(path: Path) -> Image.Image:
    """A picture file, opened and decoded.

    Raises:
        UserError: no file, no picture, one with 16 bits a channel, or a moving one.
    """
    try:
        opened: Any = Image.open(path)
        with opened as image:
            _check_depth(path, image)
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise UserError(
                    f"{path} has {image.n_frames} frames, of which one would be kept; give single pictures."
                )
            image.load()
            return image.copy() if image.format is None else image
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError, struct.error) as error:
        raise UserError(f"{path} is no picture that can be read ({error}).") from error


def from_image(image: Image.Image, name: str = "the picture") -> Picture:
    """Planes of a Pillow image. A transparent colour becomes an alpha channel, so that pixels are what one sees.

    Raises:
        UserError: a mode with more than 8 bits or without a place in PNG files, or no pixels.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise UserError(_too_deep(name))
    if image.mode == "PA" or (image.mode == "P" and (image.palette is None or image.palette.mode != "RGB")):
        image = image.convert("RGBA")
    if image.mode not in MODES:
        raise UserError(f"{name} has the colour mode {image.mode}, which .pcz does not keep; convert it to RGB first.")
    if image.width * image.height > LARGEST:
        raise UserError(f"{name} has {image.width}x{image.height} pixels; .pcz holds up to {LARGEST}.")
    if not image.width * image.height:
        raise UserError(f"{name} is {image.width}x{image.height}: there are no pixels.")
    info = image.info
    extras: dict[str, Any] = {
        key: bytes(info[key]) for key in ("icc_profile", "exif") if isinstance(info.get(key), bytes) and info[key]
    }
    transparency = info.get("transparency")
    if image.mode == "P":
        extras["palette"] = bytes(image.getpalette("RGB") or [])
        if isinstance(transparency, (bytes, int)):
            extras["transparency"] = transparency
    elif transparency is not None and image.mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    planes = np.asarray(image.convert("L") if image.mode == "1" else image)
    return Picture(image.mode, planes.reshape(image.height, image.width, MODES[image.mode]), extras)


def to_image(picture: Picture) -> Image.Image:
    """The Pillow image of a picture."""
    mode, planes = picture.mode, picture.planes
    height, width = planes.shape[:2]
    raw = "L" if mode == "1" else mode
    image = Image.frombytes(raw, (width, height), np.ascontiguousarray(planes).tobytes())
    if mode == "P":
        image.putpalette(picture.extras["palette"], "RGB")
    if mode == "1":
        image = image.convert("1", dither=Image.Dither.NONE)
    for key in ("transparency", "icc_profile", "exif"):
        if key in picture.extras:
            image.info[key] = picture.extras[key]
    return image


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    kept = {key: image.info[key] for key in ("transparency", "icc_profile", "exif") if key in image.info}
    if image.mode == "P":
        # Pillow takes as many bits a pixel as the palette asks for; pixels beyond its end, black ones, have to fit.
        colours, named = bytes(image.getpalette("RGB") or []), 3 * (int(np.asarray(image).max()) + 1)
        if len(colours) < named:
            image = image.copy()
            image.putpalette(colours.ljust(named, b"\0"), "RGB")
    image.save(file, "PNG", **kept)
    return file.getvalue()


def pack_extras(extras: dict[str, Any]) -> bytes:
    """Extras as bytes; none where there are none."""
    if not extras:
        return b""
    plain = {key: {"hex": value.hex()} if isinstance(value, bytes) else value for key, value in extras.items()}
    return zlib.compress(json.dumps(plain, sort_keys=True).encode(), 9)


def unpack_extras(data: bytes) -> dict[str, Any]:
    """The inverse of :func:`pack_extras`."""
    if not data:
        return {}
    plain = json.loads(zlib.decompress(data))
    return {key: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value for key, value in plain.items()}


def _check_depth(path: Path, image: Image.Image) -> None:
    """Pillow reads some files of more than 8 bits a channel as if they had 8; refuse them before pixels are lost."""
    deep = image.mode in ("I", "F") or image.mode.startswith("I;")
    tile: Any = getattr(image, "tile", None)
    if image.format == "PNG":
        with open(path, "rb") as file:
            deep = deep or file.read(25)[24] == 16
    elif image.format == "TIFF":
        bits: Any = getattr(image, "tag_v2", {}).get(258, 1)
        deep = deep or max(bits if isinstance(bits, tuple) else (bits,)) > 8
    elif image.format == "SGI" and tile:
        deep = deep or tile[0][0] == "SGI16"
    elif image.format == "PPM" and tile:
        arguments = tile[0][3]
        deep = deep or (isinstance(arguments, tuple) and len(arguments) > 1 and arguments[1] != 255)
    elif image.format == "JPEG2000":
        # After the marker SIZ: 36 bytes, the number of components, and for each its depth less 1, a sign bit, two more.
        _, _, data = path.read_bytes().partition(b"\xff\x4f\xff\x51")
        count = int.from_bytes(data[36:38], "big")
        deep = deep or any(depth & 127 > 7 for depth in data[38 : 38 + 3 * count : 3])
    elif image.format == "AVIF":
        _, _, data = path.read_bytes().partition(b"av1C")
        deep = deep or (len(data) > 2 and bool(data[2] & 0x40))  # the bit that means 10 or 12 bits
    if deep:
        raise UserError(_too_deep(str(path)))


def _too_deep(name: str) -> str:
    return f"{name} does not have 8 bits a channel; .pcz holds 8-bit pictures, so convert it first, or keep it as PNG."
