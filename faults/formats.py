"""Mutated files of every format that is read: a sentence, or what the file still says; never a raw error."""

from __future__ import annotations

import io
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from faults.damage import mutated
from isthmus.codec.checkpoints import read_checkpoint
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import decode_image
from isthmus.data.readers.recordings import read as read_recording
from isthmus.errors import UserError
from isthmus.priors import pcz
from isthmus.priors.circuit import HCLT
from isthmus.priors.pcz import PictureCoder


def _small(mode: str) -> Image.Image:
    y, x = np.mgrid[:11, :13]
    planes = np.stack([x * 9 + y, x + y * 11, x * y % 256, 255 - x * 3], 2).astype(np.uint8)
    return Image.fromarray(planes).convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(planes)


def pcz_files(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """``.pcz`` files, some with a right checksum after the damage: never another picture."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(100, 156, (200, 12), generator=generator)
    coder = PictureCoder(HCLT.from_data(samples, 256, 2, generator=generator).fit([samples], epochs=1), 2, threads=1)
    files = []
    for mode in ("1", "L", "LA", "RGB", "RGBA", "P"):
        image = _small(mode)
        image.info |= {"dpi": (72, 72), "gamma": 0.45455, "exif": b"Exif\0\0" + bytes(20)}
        files.append((coder.compress(image), image))
    while True:
        data, image = chance.choice(files)
        damaged = mutated(data, chance)
        if chance.random() < 0.6:
            body = mutated(data[:-8], chance)
            damaged = body + pcz._checksum(body)
        if damaged == data:
            continue
        try:
            found = coder.decompress(damaged)
        except UserError:
            yield None
        except Exception as error:  # any other is a raw one
            yield _told(error)
        else:
            same = found.mode == image.mode and np.array_equal(np.asarray(found), np.asarray(image))
            yield None if same else "another picture"


def pictures(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """Pictures of eight formats, decoded."""
    files = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA"):
        for mode in ("L", "RGB"):
            file = io.BytesIO()
            _small(mode).save(file, kind)
            files.append(file.getvalue())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg tells of every damage there
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = decode_image(mutated(chance.choice(files), chance))
        except (Unreadable, UserError):
            yield None
        except Exception as error:  # any other is a raw one
            yield _told(error)
        else:
            yield None if found.dtype == torch.uint8 and found.ndim == 3 else f"a tensor {tuple(found.shape)}"


def checkpoints(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """Weights as ``torch.save`` and safetensors write them."""
    scratch.mkdir(parents=True, exist_ok=True)
    state = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.zeros(3)}
    file = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, file)
    files = {"w.pth": file.getvalue(), "w.safetensors": save(state, {"name": "w"})}
    while True:
        name = chance.choice(list(files))
        (scratch / name).write_bytes(mutated(files[name], chance))
        yield _asked(lambda name=name: read_checkpoint(scratch / name))


def arrays(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """Recordings in NumPy's formats."""
    scratch.mkdir(parents=True, exist_ok=True)
    signal = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    np.savez(scratch / "a.npz", signal=signal, rate=10.0, label=np.arange(3), subject=["a", "b", "a"])
    np.save(scratch / "a.npy", signal)
    files = {name: (scratch / name).read_bytes() for name in ("a.npz", "a.npy")}
    while True:
        name = chance.choice(list(files))
        (scratch / f"x{name}").write_bytes(mutated(files[name], chance))
        yield _asked(lambda name=name: read_recording(scratch / f"x{name}"))


def _asked(ask: object) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask()  # type: ignore[operator]
    except UserError:
        return None
    except Exception as error:  # any other is a raw one
        return _told(error)
    return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"
