"""Lossless compression of pictures: samples for circuits, formats compared on the same pictures, ``.pcz`` at work."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isthmus import saved
from isthmus.codec import UserError, write_atomically
from isthmus.data import Dataset, load
from isthmus.data.inputs import Inputs
from isthmus.engine import Run
from isthmus.priors.circuit import HCLT
from isthmus.priors.lifting import decorrelate, residuals
from isthmus.priors.pcz import PictureCoder
from isthmus.priors.pictures import from_image, png, read
from isthmus.report import figures
from isthmus.tasks import applying


class SmallImages(NamedTuple):
    """Training and held-out samples ``(N, D)`` of category numbers, the grey levels those stand for, and the shape."""

    train: Tensor
    test: Tensor
    levels: Tensor
    shape: tuple[int, ...]


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


def small_images(run: Run, data: str, train_split: str, eval_split: str) -> SmallImages:
    """Images whose pixels are variables of a circuit.

    Raises:
        UserError: a stream, images of several sizes, or more than 4,096 variables.
    """
    found = []
    for split in (train_split, eval_split):
        dataset = load(data, split, ("image",), run.seed)
        if not hasattr(dataset, "__len__"):
            raise UserError(f"{data} is a stream, of which no part can be held out; use folder: or parquet:.")
        count = len(dataset) if run.options.max_steps is None else min(len(dataset), 512)
        images = [dataset[i]["image"] for i in range(count)]
        if len({tuple(image.shape) for image in images}) != 1:
            raise UserError(f"{data}: the {split} images have several sizes, or there are none; pixels are variables.")
        found.append(torch.stack(images))
    if found[0].shape[1:] != found[1].shape[1:]:
        raise UserError(f"{data}: training and held-out images differ in size; pixels are variables.")
    if all((images == images[:, :1]).all() for images in found):
        found = [images[:, :1] for images in found]
    shape = tuple(found[0].shape[1:])
    if math.prod(shape) > 4096:
        raise UserError(f"{data}: {shape} are {math.prod(shape)} variables, the most is 4096; give smaller images.")
    flat = [images.permute(0, 2, 3, 1).flatten(1).long() for images in found]
    levels = torch.cat([f.flatten() for f in flat]).unique()
    if len(levels) > 64:
        levels = torch.arange(256)
    train, test = (torch.searchsorted(levels, f) for f in flat)
    return SmallImages(train, test, levels, shape)


def compare(run: Run, coder: PictureCoder, held_out: Dataset) -> None:
    """A coder of pictures beside other formats, on every held-out picture: sizes, speed, exactness, and two charts."""
    shown = [Image.fromarray(held_out[i]["image"].permute(1, 2, 0).numpy()) for i in range(len(held_out))]
    formats = {"pcz": Format(coder.compress, coder.decompress), **others()}
    found = {name: measure(shown, fmt) for name, fmt in formats.items()}
    for name, measured in found.items():
        run.metric(f"photos_bpd_{name}", float(np.mean(measured.bits)), unit="bits per dimension")
        run.metric(f"photos_encode_{name}", measured.encode, unit="MB/s, one thread")
        run.metric(f"photos_decode_{name}", measured.decode, unit="MB/s, one thread")
    ours = found["pcz"]
    run.metric("photos_exact_share", ours.exact / len(shown))
    for name in found:
        if name != "pcz":
            run.metric(f"photos_ratio_to_{name}", float(np.mean(ours.bits) / np.mean(found[name].bits)))
    means = {name: float(np.mean(measured.bits)) for name, measured in found.items()}
    run.figure("formats", figures.bars(means, "bits per dimension", " "), "Held-out photographs, whole files.")
    pairs = {f"against {name}": list(zip(found[name].bits, ours.bits, strict=True)) for name in ("png", "webp")}
    axes = "bits per dimension of the other format", "bits per dimension of .pcz"
    run.figure("each_photo", figures.scatter(pairs, *axes), "Every photograph: our file beside those of PNG and WebP.")


def show(run: Run, circuit: HCLT, images: SmallImages) -> None:
    """Images drawn from the circuit, and lower halves drawn given the upper ones."""
    channels, height, width = images.shape
    generator = run.generator("samples")
    held_out = images.test[:10].to(run.fabric.device)
    upper = torch.zeros(height, width, channels, dtype=torch.bool)
    upper[: height // 2] = True
    completed = circuit.sample(len(held_out), generator, held_out, upper.flatten())
    rows = torch.cat([circuit.sample(10, generator), held_out, completed]).cpu()
    pixels = images.levels[rows].view(-1, height, width, channels).permute(0, 3, 1, 2).float() / 255
    names = ["drawn"] * 10 + ["held out"] * len(held_out) + ["completed"] * len(held_out)
    figure = figures.captioned(pixels.expand(-1, 3, -1, -1), names, [True] * len(names), columns=10)
    run.figure("images", figure, "Drawn from the circuit; held-out images; their lower halves drawn given the upper.")


def keep(run: Run, circuit: HCLT, patch: int) -> None:
    """Save a circuit of patches, which :func:`load_coder` makes a coder of."""
    folder = run.dir / saved.KEPT / "pictures"
    if run.is_first:
        saved.save(folder, circuit, Inputs(), facts={"patch": patch})
    run.artifact("pictures", folder, "the circuit that isthmus apply compresses pictures with")


def load_coder(run_dir: Path, threads: int | None = None) -> PictureCoder:
    """The coder of pictures that a run kept.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (run_dir / saved.KEPT).is_dir() and not (run_dir / saved.FACTS).is_file():
        raise UserError(f"{run_dir} keeps no circuit of pictures; run the recipe to its end, without --photos none.")
    kept = saved.load(run_dir)
    patch = kept.facts.get("patch")
    if not isinstance(kept.model, HCLT) or not isinstance(patch, int):
        raise UserError(f"{run_dir} keeps a model that is no circuit of pictures.")
    return PictureCoder(kept.model, patch, threads=threads)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Compress pictures to ``NAME.pcz``, and turn ``NAME.pcz`` back into ``NAME.png``.

    Inputs of the same name become ``NAME-2``, ``NAME-3`` and so on. A file that is there already is left alone where it
    holds the same picture, and never replaced by another one. ``answers.json`` says for every input how many pixels and
    bytes there are, or why it was skipped.

    Raises:
        UserError: the run has no circuit of pictures, or none of the inputs could be used: a picture has more than 8
            bits a channel, a ``.pcz`` is damaged or of another run, or a file that holds something else is in the way.
            No file is written in part.
    """
    coder = load_coder(run_dir)
    written: list[Path] = []
    found: dict[str, Any] = {}
    for path in inputs:
        try:
            found[str(path)] = _answer(coder, path, out, written)
        except UserError as error:
            found[str(path)] = {"skipped": str(error)}
    if not written:
        raise UserError(" ".join(entry["skipped"] for entry in found.values()) or "there are no inputs.")
    write_atomically(out / applying.ANSWERS, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return [out / applying.ANSWERS, *written]


def _answer(coder: PictureCoder, path: Path, out: Path, written: list[Path]) -> dict[str, Any]:
    """Write the other form of one picture beside those that are written, and tell what it came to."""
    back = path.suffix.lower() == ".pcz"
    image = coder.decompress(path.read_bytes(), str(path)) if back else read(path)
    data = png(image) if back else coder.compress(image, str(path))
    stem, number = out / path.stem, 1
    while (target := Path(f"{stem}{f'-{number}' if number > 1 else ''}{'.png' if back else '.pcz'}")) in written:
        number += 1  # another folder's picture of the same name
    if not target.exists():
        write_atomically(target, data)
    elif not target.is_file() or (target.read_bytes() != data and not (back and _shows(target, image))):
        raise UserError(f"{target} is there already and holds something else; move it, or give another --out.")
    written.append(target)
    before, after, values = path.stat().st_size, len(data), image.width * image.height * len(image.getbands())
    return {
        "file": target.name,
        "pixels": f"{image.width} x {image.height}, {image.mode}",
        "bytes": after,
        "bytes_before": before,
        "share_of_bytes_before": round(after / before, 3),
        "bits_per_dimension": round(8 * (before if back else after) / values, 3),
    }


def _shows(path: Path, image: Image.Image) -> bool:
    """Whether a file holds exactly this picture."""
    try:
        return from_image(read(path)).digest == from_image(image).digest
    except (UserError, OSError):
        return False


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
