"""A person's files as samples of tasks of several modalities: pictures, sounds, arrays, tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.data.builtin.series import read_csv
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.readers.headers import read_file as content
from isthmus.data.readers.sounds import SOUND_SUFFIXES, at_least, decode_sound
from isthmus.data.transforms import CenterCrop, Compose, Normalize, Resize
from isthmus.data.transforms.augmentation import IMAGENET

#: Task → the files that are read for it.
SUFFIXES = {
    "image": IMAGE_SUFFIXES,
    "audio": SOUND_SUFFIXES,
    "video": (".npy",),
    "points": (".npy",),
    "series": (".csv", ".npy"),
    "forecast": (".csv",),
}


def read_file(name: str, task: Any, shape: Sequence[int], path: Path) -> Tensor:
    """A file as a batch of one for the task.

    Args:
        name: of the task.
        task: its settings, see :mod:`isthmus.tasks.modalities.settings`.
        shape: of the samples that were trained on.
        path: the file.

    Raises:
        Unreadable: it is no such file, or has another shape than what was trained on.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES[name]:
        raise Unreadable(f"the {name} task reads {', '.join(SUFFIXES[name])}")
    if name == "image":
        transform = Compose([Resize(task.size), CenterCrop(task.size), Normalize(*IMAGENET)])
        batch = {"image": decode_image(path)[None].float() / 255}
        return transform(batch, torch.Generator())["image"]
    if name == "audio":
        wave = decode_sound(path, task.rate)
        if len(wave) < (least := int(task.rate * task.window)):
            raise Unreadable(f"it has {len(wave)} samples at {task.rate} a second; one moment takes {least}")
        return at_least(wave, shape[0])[None]
    values = _read_array(path) if suffix == ".npy" else _read_table(path)
    if name == "points":
        if values.ndim != 2 or values.shape[1] != 3 or len(values) < 4:
            raise Unreadable(f"an array of points is (P, 3) with at least 4 of them, not {tuple(values.shape)}")
        centred = values - values.mean(0)
        return (centred / centred.norm(dim=1).max().clamp_min(1e-9))[None]
    if name == "video":
        values = values.movedim(-1, 1) if values.ndim == 4 and values.shape[-1] == 3 else values
        if values.ndim != 4 or list(values.shape[:2]) != list(shape[:2]):
            raise Unreadable(f"a clip is ({shape[0]}, {shape[1]}, H, W), not {tuple(values.shape)}")
        values = nn.functional.interpolate(values, tuple(shape[2:]), mode="bilinear", antialias=True)
        return values[None] / (255 if values.max() > 1 else 1)
    values = values[None] if values.ndim == 1 else values
    length = task.length if name == "forecast" else shape[1]
    if values.ndim != 2 or values.shape[0] != shape[0] or values.shape[1] < length:
        raise Unreadable(
            f"a file of {shape[0]} series of at least {length} steps is needed, this is {_size_of(values)}"
        )
    return values[None, :, -length:]


def _read_array(path: Path) -> Tensor:
    try:
        values = np.load(io.BytesIO(content(path)), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise Unreadable(f"it is no array of NumPy ({error})") from error
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values) or not np.isfinite(values).all():
        raise Unreadable("the array must hold finite numbers")
    return torch.from_numpy(values.astype(np.float32))


def _read_table(path: Path) -> Tensor:
    """``(columns, rows)``."""
    try:
        return torch.from_numpy(read_csv(path)[0].T.astype(np.float32))
    except UserError as error:
        raise Unreadable(str(error)) from error


def _size_of(values: Tensor) -> str:
    return f"{values.shape[0]} of {values.shape[1]}" if values.ndim == 2 else f"an array {tuple(values.shape)}"
