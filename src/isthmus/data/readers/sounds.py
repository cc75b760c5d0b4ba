"""Bytes → mono sound at the rate that is asked for: WAV, and FLAC, MP3 and OGG where ``soundfile`` is installed."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.data.dataset import Dataset, Unreadable
from isthmus.data.readers.headers import read_file

#: File name endings that count as sounds.
SOUND_SUFFIXES = (".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff")

_MOST_SAMPLES = 2**28  # of one file: hours, and two gigabytes in float64


class Sounds(Dataset):
    """A source whose column ``audio`` holds sound files, as waves of one length: cut, or silent at the end.

    Args:
        dataset: with ``audio`` as bytes.
        rate: samples a second.
        length: samples of every wave.
    """

    def __init__(self, dataset: Dataset, rate: int, length: int) -> None:
        super().__init__(dataset.name, dataset.columns, dataset.classes)
        self.like(dataset)
        self.dataset, self.rate, self.length = dataset, rate, length
        self.skipped, self.wanted = dataset.skipped, dataset.wanted

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> dict[str, Any]:
        sample = self.dataset.read(index)
        if "audio" not in sample:
            return sample
        wave = decode_sound(sample["audio"], self.rate)
        return {**sample, "audio": at_least(wave[: self.length], self.length)}

    def identify(self, index: int) -> str:
        return self.dataset.identify(index)

    def number(self, index: int) -> int:
        return self.dataset.number(index)

    def _keep_columns(self, columns: tuple[str, ...]) -> None:
        super()._keep_columns(columns)
        self.dataset = self.dataset.select_columns(columns)


def at_least(wave: Tensor, length: int) -> Tensor:
    """``(L,)`` with silence behind it up to ``length``."""
    return nn.functional.pad(wave, (0, max(0, length - len(wave))))


def decode_sound(source: bytes | Path, rate: int) -> Tensor:
    """A sound file → float32 mono samples ``(L,)`` in [-1, 1] at ``rate`` a second.

    Raises:
        Unreadable: it is no sound file, an empty one, or one of numbers that are not finite; or it is no WAV file and
            ``soundfile`` is not installed.
    """
    data = read_file(source) if isinstance(source, Path) else source
    if not data:
        raise Unreadable("the file is empty")
    own, wave = _wav(data) if data[:4] in (b"RIFF", b"RIFX", b"RF64") else _other(data)
    if wave.size == 0:
        raise Unreadable("it holds no samples")
    wave = wave.mean(1) if wave.ndim == 2 else wave
    if not np.isfinite(wave).all():
        raise Unreadable("its samples must be finite numbers")
    if own < 1:
        raise Unreadable("it says nothing of its rate")
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        wave = resample_poly(wave, rate // common, own // common)
    return torch.from_numpy(wave.astype(np.float32))


def _wav(data: bytes) -> tuple[int, np.ndarray]:
    from scipy.io import wavfile

    try:
        rate, samples = wavfile.read(io.BytesIO(data))
    except (ValueError, EOFError, OSError, TypeError, struct.error, ZeroDivisionError) as error:
        if importlib.util.find_spec("soundfile"):  # which knows more kinds of WAV
            return _other(data)
        raise Unreadable(f"it is no WAV file that can be read ({error})") from error
    wave = samples.astype(np.float64)
    if samples.dtype == np.uint8:
        wave = (wave - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        wave = wave / -float(np.iinfo(samples.dtype).min)
    return int(rate), wave


def _other(data: bytes) -> tuple[int, np.ndarray]:
    try:
        soundfile: Any = importlib.import_module("soundfile")
    except (ImportError, OSError) as error:
        raise Unreadable(
            "it is no WAV file; for FLAC, MP3 and OGG install soundfile (pip install 'isthmus[sound]')"
        ) from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames * file.channels > _MOST_SAMPLES:
                raise Unreadable(f"is too long ({file.frames} samples of {file.channels} channels)")
            return int(file.samplerate), file.read(dtype="float64", always_2d=True)
    except (RuntimeError, ValueError, TypeError, OSError) as error:  # soundfile's own errors are RuntimeErrors
        raise Unreadable(f"it is no sound file that can be read ({' '.join(str(error).split())[:120]})") from error
