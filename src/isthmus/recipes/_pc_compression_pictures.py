"""The second half of ``pc_compression``: a circuit of patches for pictures, and other formats on the same pictures."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.codec import UserError, load_weights, save_weights
from isthmus.data import Dataset
from isthmus.priors.circuit import HCLT
from isthmus.priors.lifting import decorrelate, residuals
from isthmus.priors.pcz import PictureCoder

MODEL = "pictures.safetensors"


class Measured(NamedTuple):
    """What a format makes of pictures."""

    bits: list[float]  # of every picture's file, a dimension
    encode: float  # megabytes of pixels a second
    decode: float
    exact: int  # pictures that came back to the last bit


class Format(NamedTuple):
    """A way to write a picture and to read it back."""

    encode: Callable[[Image.Image], bytes]
    decode: Callable[[bytes], Image.Image]


def patches(dataset: Dataset, size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` patches of residuals ``(N, size·size·3)`` and what is observed of them, from all pictures alike.

    Patches lie where a coder cuts them. Pictures without colour have the green plane only.
    """
    each = -(-count // len(dataset))
    found, there = [], []
    for index in range(len(dataset)):
        picture = dataset[index]["image"].permute(1, 2, 0).numpy()
        if min(picture.shape[:2]) < size:
            raise UserError(f"{dataset.name} has pictures of {picture.shape[:2]} pixels; patches take {size} a side.")
        planes = decorrelate(picture)
        grey = bool((planes[..., 1:] == 128).all())
        height, width = (n // size * size for n in planes.shape[:2])
        cut = residuals(planes)[:height, :width].reshape(height // size, size, width // size, size, 3)
        cut = cut.transpose(0, 2, 1, 3, 4).reshape(-1, size * size * 3)
        chosen = torch.randperm(len(cut), generator=generator)[:each]
        found.append(torch.from_numpy(cut)[chosen])
        there.append(torch.tensor([True, not grey, not grey]).repeat(size * size).expand(len(chosen), -1))
    order = torch.randperm(sum(map(len, found)), generator=generator)[:count]
    return torch.cat(found)[order].long(), torch.cat(there)[order]


def others() -> dict[str, Format]:
    """Lossless formats to compare with; JPEG XL and zstd where they are installed."""
    Image.init()
    found = {
        "png": _pillow("PNG", optimize=True),
        "webp": _pillow("WEBP", lossless=True, quality=100, method=6),
        "jpeg2000": _pillow("JPEG2000", irreversible=False),
    }
    if "JXL" in Image.SAVE:
        found["jpegxl"] = _pillow("JXL", lossless=True, effort=7)
    try:
        import zstandard
    except ImportError:
        return found

    def unpack(data: bytes) -> Image.Image:
        width, height = np.frombuffer(data[:8], "<u4")
        return Image.frombytes("RGB", (int(width), int(height)), zstandard.decompress(data[8:]))

    def pack(image: Image.Image) -> bytes:
        return np.array(image.size, "<u4").tobytes() + zstandard.ZstdCompressor(level=19).compress(image.tobytes())

    return {**found, "zstd": Format(pack, unpack)}


def measure(pictures: Sequence[Image.Image], fmt: Format) -> Measured:
    """Write and read every picture."""
    bits, exact, seconds, size = [], 0, [0.0, 0.0], 0
    for picture in pictures:
        begin = time.perf_counter()
        data = fmt.encode(picture)
        middle = time.perf_counter()
        back = fmt.decode(data)
        seconds = [seconds[0] + middle - begin, seconds[1] + time.perf_counter() - middle]
        pixels = picture.tobytes()
        size += len(pixels)
        bits.append(8 * len(data) / len(pixels))
        exact += back.size == picture.size and back.mode == picture.mode and back.tobytes() == pixels
    encode, decode = (size / 1e6 / max(s, 1e-9) for s in seconds)
    return Measured(bits, encode, decode, exact)


def save(circuit: HCLT, patch: int, path: Path) -> None:
    """The circuit with what makes a coder of it."""
    facts = {"parents": circuit.parents, "latents": circuit.latents, "patch": patch, "pseudocount": circuit.pseudocount}
    save_weights(circuit, path, {"circuit": json.dumps(facts)})


def load(path: Path, threads: int | None = None) -> PictureCoder:
    """The coder of a file of :func:`save`.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        with safe_open(str(path), "pt") as file:
            facts = json.loads((file.metadata() or {})["circuit"])
        circuit = HCLT(facts["parents"], 256, facts["latents"], facts["pseudocount"])
        patch = int(facts["patch"])
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path.parent} has no readable {path.name}; run the recipe to its end first, and not with --photos none."
        ) from error
    load_weights(circuit, path)
    return PictureCoder(circuit, patch, threads=threads)


def _pillow(name: str, **options: object) -> Format:
    def encode(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, name, **options)
        return file.getvalue()

    def decode(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image

    return Format(encode, decode)
