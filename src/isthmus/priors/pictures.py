"""A picture as exact 8-bit planes and whatever else makes it look as it does, to and from Pillow."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from isthmus.codec import UserError

#: Pillow's modes that are kept, with how many planes each has. Their place in this list is written into files.
MODES = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 1}
#: Most values of a picture: pixels times planes.
LARGEST = 2**28
#: Most bytes of what a picture has beside its pixels, as they are packed.
LARGEST_EXTRAS = 2**24
_PARTS = 100_000  # of one, by which PNG counts gamma and chromaticities
_INCH = 0.0254  # metres


@dataclass
class Picture:
    """One picture.

    Attributes:
        mode: of :data:`MODES`.
        planes: ``(H, W, P)`` uint8: grey, colours, alpha, or numbers of palette entries.
        extras: ``palette``, ``icc_profile`` and ``exif`` as bytes, ``transparency`` of a palette as bytes or a number;
            as PNG counts them ``gamma``, ``srgb`` (rendering intent), ``chromaticity`` (8 numbers) and ``density``
            (dots across and down, and 1 where they are per metre, 0 where only their ratio is known).
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
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file; give a picture.")
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
        UserError: a mode with more than 8 bits or without a place in PNG files, no pixels, or more than there is room
            for.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise UserError(_too_deep(name))
    if image.mode == "PA" or (image.mode == "P" and (image.palette is None or image.palette.mode != "RGB")):
        image = image.convert("RGBA")
    if image.mode not in MODES:
        raise UserError(f"{name} has the colour mode {image.mode}, which .pcz does not keep; convert it to RGB first.")
    if not image.width * image.height:
        raise UserError(f"{name} is {image.width}x{image.height}: there are no pixels.")
    info = image.info
    extras: dict[str, Any] = {
        key: bytes(info[key]) for key in ("icc_profile", "exif") if isinstance(info.get(key), bytes) and info[key]
    }
    extras |= _png_facts(info)
    transparency = info.get("transparency")
    if image.mode == "P":
        extras["palette"] = bytes(image.getpalette("RGB") or [])
        if isinstance(transparency, (bytes, int)):
            extras["transparency"] = transparency
    elif transparency is not None and image.mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    if image.width * image.height * MODES[image.mode] > LARGEST:
        planes = MODES[image.mode]
        raise UserError(
            f"{name} has {image.width}x{image.height} pixels of {planes}; .pcz holds up to {LARGEST} values."
        )
    if len(_plain(extras)) > LARGEST_EXTRAS:
        raise UserError(f"{name} has a colour profile or EXIF of more than .pcz holds ({LARGEST_EXTRAS // 2} bytes).")
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
    _tell_png_facts(picture.extras, image.info)
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
    data, facts = file.getvalue(), _png_facts(image.info)
    chunks = b""
    if "chromaticity" in facts:
        chunks += _chunk(b"cHRM", struct.pack(">8I", *facts["chromaticity"]))
    if "gamma" in facts:
        chunks += _chunk(b"gAMA", struct.pack(">I", facts["gamma"]))
    if "srgb" in facts:
        chunks += _chunk(b"sRGB", bytes([facts["srgb"]]))
    if "density" in facts:
        chunks += _chunk(b"pHYs", struct.pack(">IIB", *facts["density"]))
    return data[:_IHDR_END] + chunks + data[_IHDR_END:]


_IHDR_END = 33  # the signature and the first chunk of every PNG


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_facts(info: dict[Any, Any]) -> dict[str, Any]:
    """What Pillow tells of gAMA, sRGB, cHRM and pHYs, as whole numbers; nonsense is left out."""
    found: dict[str, Any] = {}
    gamma = _whole([info.get("gamma")], _PARTS)
    if gamma is not None:
        found["gamma"] = gamma[0]
    if info.get("srgb") in range(256) and not info.get("icc_profile"):
        found["srgb"] = int(info["srgb"])
    chromaticity = _whole(info.get("chromaticity"), _PARTS)
    if chromaticity is not None and len(chromaticity) == 8:
        found["chromaticity"] = chromaticity
    for key, unit, scale in (("dpi", 1, 1 / _INCH), ("aspect", 0, 1)):
        density = _whole(info.get(key), scale)
        if density is not None and len(density) == 2 and min(density) > 0:
            found["density"] = [*density, unit]
            break
    return found


def _tell_png_facts(extras: dict[str, Any], info: dict[Any, Any]) -> None:
    """The inverse of :func:`_png_facts`."""
    if "gamma" in extras:
        info["gamma"] = extras["gamma"] / _PARTS
    if "srgb" in extras:
        info["srgb"] = extras["srgb"]
    if "chromaticity" in extras:
        info["chromaticity"] = tuple(each / _PARTS for each in extras["chromaticity"])
    if "density" in extras:
        across, down, unit = extras["density"]
        info["dpi" if unit else "aspect"] = (across * _INCH, down * _INCH) if unit else (across, down)


def _whole(values: Any, scale: float) -> list[int] | None:
    """Numbers times ``scale``, rounded, if they are numbers that fit a PNG."""
    if not isinstance(values, (list, tuple)) or not values:
        return None
    try:
        found = [round(float(value) * scale) for value in values]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return found if all(0 <= value < 2**31 for value in found) else None


def pack_extras(extras: dict[str, Any]) -> bytes:
    """Extras as bytes; none where there are none."""
    return zlib.compress(_plain(extras), 9) if extras else b""


def _plain(extras: dict[str, Any]) -> bytes:
    plain = {key: {"hex": value.hex()} if isinstance(value, bytes) else value for key, value in extras.items()}
    return json.dumps(plain, sort_keys=True).encode()


def unpack_extras(data: bytes, mode: str) -> dict[str, Any]:
    """The inverse of :func:`pack_extras`, for a picture of this mode.

    Raises:
        UserError: they hold something else, or more than :data:`LARGEST_EXTRAS` bytes.
    """
    extras: dict[str, Any] = {}
    if data:
        plain = json.loads(inflate(data, LARGEST_EXTRAS))
        extras = {key: bytes.fromhex(each["hex"]) if isinstance(each, dict) else each for key, each in plain.items()}
    for key, value in extras.items():
        if key not in _EXTRAS or not _EXTRAS[key](value):
            raise UserError(f"its {key[:20]!r} is none")
        if key in ("palette", "transparency") and mode != "P":
            raise UserError(f"{key} does not go with the mode {mode}")
    if mode == "P" and "palette" not in extras:
        raise UserError("there is no palette")
    return extras


def inflate(data: bytes, most: int) -> bytes:
    """What deflate made of at most ``most`` bytes.

    Raises:
        UserError: it is more, cut short, or followed by something else.
    """
    stream = zlib.decompressobj()
    found = stream.decompress(data, most + 1)
    if len(found) > most or not stream.eof or stream.unused_data:
        raise UserError(f"deflated data are not {most} bytes or fewer")
    return found


def _is_count(value: Any, below: int = 2**31) -> bool:
    return type(value) is int and 0 <= value < below


def _are_counts(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_count, value))


_EXTRAS: dict[str, Callable[[Any], bool]] = {
    "palette": lambda value: isinstance(value, bytes) and len(value) <= 768 and len(value) % 3 == 0,
    "transparency": lambda value: (isinstance(value, bytes) and len(value) <= 256) or _is_count(value, 256),
    "icc_profile": lambda value: isinstance(value, bytes),
    "exif": lambda value: isinstance(value, bytes),
    "gamma": _is_count,
    "srgb": lambda value: _is_count(value, 256),
    "chromaticity": lambda value: _are_counts(value, 8),
    "density": lambda value: _are_counts(value, 3) and value[0] > 0 and value[1] > 0 and value[2] < 2,
}
"""What each extra may be."""


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
