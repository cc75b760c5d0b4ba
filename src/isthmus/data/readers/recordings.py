"""``meg:PATH``: recordings that people have: MNE's ``.fif`` (epochs or continuous), ``.npz`` and ``.npy``.

``meg:subject1-epo.fif`` or ``meg:data/*-epo.fif`` (each file is one recording, of one subject). ``.npz`` files hold
``signal`` ``(N, C, T)`` and any of ``times`` or ``rate`` and ``start``, ``positions`` ``(C, 2)``, ``subject``,
``label``, ``latent`` ``(N, F)``, ``stimulus``, ``image`` (paths, or uint8 ``(N, 3, H, W)``) and ``split`` (train, val
or test). Epochs may carry the same names as columns of their metadata. Subjects, labels and stimuli may be words; those
of several files are numbered together. In Python, :func:`from_epochs` takes an ``mne.Epochs`` object.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError
from isthmus.data.dataset import Memory, pick_needs
from isthmus.data.readers.mne_recordings import from_epochs, read_fif
from isthmus.data.readers.recording import EXTRAS, NUMBERED, Recording, read_columns
from isthmus.data.readers.sensors import MISSING
from isthmus.data.splits import divide, row_fractions

SUFFIXES = (".fif", ".fif.gz", ".npz", ".npy")


def read(path: str | Path, start: float = -0.5, stop: float = 1.0) -> Recording:
    """One file as trials.

    Args:
        path: ``.fif`` of epochs or continuous data, ``.npz`` or ``.npy`` ``(N, C, T)``.
        start, stop: window around the events of continuous data, seconds; without events it stays in one piece.

    Raises:
        UserError: another kind of file, a damaged one, or arrays that do not fit each other.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no recording {path}.")
    kind = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if kind is None:
        raise UserError(f"{path} is no recording that can be read; known are {', '.join(SUFFIXES)}.")
    recording = read_fif(path, start, stop) if kind.startswith(".fif") else _read_arrays(path, kind)
    if not bool(torch.isfinite(recording.signal).all()):
        wrong = int((~torch.isfinite(recording.signal)).flatten(1).any(1).sum())
        raise UserError(f"{path}: {wrong} of {len(recording.signal)} trials have NaN or infinite samples; drop those.")
    return recording


def _read_arrays(path: Path, kind: str) -> Recording:
    try:
        loaded = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if kind == ".npz" else {"signal": loaded}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or holds objects instead of numbers ({error}).") from error
    except Exception as error:  # zipfile has errors of its own
        raise UserError(f"{path} cannot be read ({error}).") from error
    signal = arrays.get("signal")
    if signal is None or signal.ndim != 3 or 0 in signal.shape or signal.dtype.kind not in "fiu":
        found = "no signal" if signal is None else f"a signal of shape {signal.shape} and type {signal.dtype}"
        raise UserError(f"{path} must hold numbers (trials, channels, samples) called signal; it has {found}.")
    count, channels, length = signal.shape
    if "times" in arrays:
        times = torch.as_tensor(arrays["times"], dtype=torch.float32)
    else:
        rate, begin = float(arrays.get("rate", 1.0)), float(arrays.get("start", 0.0))
        times = begin + torch.arange(length) / (rate if rate > 0 else 1.0)
    positions = torch.as_tensor(arrays.get("positions", np.full((channels, 2), 0.5)), dtype=torch.float32)
    if times.shape != (length,) or positions.shape != (channels, 2):
        raise UserError(
            f"{path}: times must be ({length},) and positions ({channels}, 2), got {tuple(times.shape)} and "
            f"{tuple(positions.shape)}."
        )
    extras = {name: arrays[name] for name in EXTRAS if name in arrays}
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else None
    columns, words = read_columns(extras, count, str(path))
    if classes is not None and "label" in columns and "label" not in words:
        if not 0 <= int(columns["label"].min()) <= int(columns["label"].max()) < len(classes):
            raise UserError(f"{path}: classes has {len(classes)} names, which is too few for its labels.")
        words["label"] = classes
    signal = torch.as_tensor(signal, dtype=torch.float32)
    return Recording(signal, times, positions, columns, words.get("label", classes), words)


__all__ = ["MISSING", "SUFFIXES", "Recording", "Recordings", "from_epochs", "load", "read"]


class Recordings(Memory):
    """Trials of one or several recordings, see :func:`load`.

    Attributes:
        times, rate, layout: of the windows; the layout of the first file.
        people: names of the subjects: the words, or the files where these say nothing.
    """

    def __init__(
        self,
        name: str,
        data: dict[str, Any],
        columns: Sequence[str],
        first: Recording,
        people: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name, data, columns, first.classes)
        self.times, self.rate, self.layout, self.people = first.times, first.rate, first.positions, people


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    path: str,
    start: str = "-0.5",
    stop: str = "1.0",
    rate: str = "",
    name: str = "meg",
) -> Recordings:
    """Trials of every file that ``path`` (a file, a folder or a pattern) names; each file is a subject unless it says.

    Where the files do not say by ``split``, a tenth each is for ``val`` and ``test``, by a hash of the stimuli, so that
    none of them is met on both sides, or of the trials where stimuli are unknown. Files with fewer sensors are padded
    with missing ones; all are brought to the times of the first, at ``rate`` samples a second where it is given.
    """
    files = sorted(glob.glob(path)) or [path]
    if os.path.isdir(path):
        files = sorted(str(p) for p in Path(path).iterdir() if p.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"{name}: the folder {path} holds no {', '.join(SUFFIXES)}.")
    try:
        window, hertz = (float(start), float(stop)), float(rate or 0)
    except ValueError as error:
        told = f"got {start!r}, {stop!r} and {rate!r}"
        raise UserError(f"{name}: start and stop are seconds, rate samples a second; {told}.") from error
    if not window[0] < window[1] or not 0 <= hertz < float("inf"):
        raise UserError(f"{name}: start must lie before stop and rate be above 0, got {start}, {stop} and {rate}.")
    found = [_with_images(file, read(file, *window), "image" in needs) for file in files]
    for file, recording in zip(files, found, strict=True):
        if recording.continuous:
            raise UserError(f"{file} is continuous and has no events to cut trials at; give epochs.")
    first = found[0]
    if hertz:
        begin, end = float(first.times[0]), float(first.times[-1])
        first = first.at(begin + torch.arange(int((end - begin) * hertz + 1e-4) + 1) / hertz)
    found, people = _together(name, [first, *found[1:]])
    if all("subject" not in recording.columns for recording in found):
        people = tuple(Path(file).name for file in files)
    first = found[0]
    found = [first, *(other.at(first.times) for other in found[1:])]
    sensors = max(r.signal.shape[1] for r in found)
    columns: dict[str, list[Any]] = {}
    for number, recording in enumerate(found):
        count, pad = len(recording.signal), sensors - recording.signal.shape[1]
        places = torch.cat([recording.positions, torch.full((pad, 2), MISSING)])
        own = {
            "subject": torch.full((count,), number),
            **recording.columns,
            "signal": torch.nn.functional.pad(recording.signal, (0, 0, 0, pad)),
            "positions": places.expand(count, -1, -1),
        }
        for column, values in own.items():
            columns.setdefault(column, []).append(values)
    whole = {c: _joined(parts) for c, parts in columns.items() if len(parts) == len(found)}
    asked = pick_needs(name, needs, tuple(whole))
    trials, told = len(whole["signal"]), whole.get("split")
    if told is None and "split" in columns:
        raise UserError(f"{name}: some files say which split their trials are of and others do not; let all say it.")
    kinds = whole["stimulus"].unique() if told is None and "stimulus" in whole else torch.empty(0)
    if len(kinds) >= 3:  # a part of its own for each
        own = divide([None] * len(kinds), split, row_fractions(name, len(kinds)))
        chosen = torch.isin(whole["stimulus"], kinds[torch.as_tensor(own)]).nonzero()[:, 0].numpy()
    else:
        chosen = divide(told or [None] * trials, split, row_fractions(name, trials))
    rows = torch.as_tensor(chosen)
    data = {c: whole[c][rows] if isinstance(whole[c], Tensor) else [whole[c][i] for i in chosen] for c in asked}
    return Recordings(name, data, tuple(whole), first, people)


def _with_images(file: str, recording: Recording, asked: bool) -> Recording:
    """Paths of images as they stand, or beside the recording; what was asked for has to be there."""
    paths = recording.columns.get("image")
    if not isinstance(paths, list):
        return recording
    found = [path if os.path.exists(path) else str(Path(file).parent / path) for path in paths]
    if asked:
        for trial, path in enumerate(found):
            if not os.path.exists(path):
                told = f"its column image names {paths[trial]!r} for trial {trial}"
                raise UserError(f"{file}: {told}, and there is no such file, nor beside it.")
    return replace(recording, columns={**recording.columns, "image": found})


def _together(name: str, found: Sequence[Recording]) -> tuple[list[Recording], tuple[str, ...] | None]:
    """Number the words of all recordings as one list, and name the subjects where they are words."""
    found, people = list(found), None
    for column in NUMBERED:
        lists = [r.words.get(column) for r in found if column in r.columns]
        words = [each for each in lists if each is not None]
        if not words:
            continue
        if len(words) < len(lists):
            raise UserError(f"{name}: {column} is words in some files and numbers in others; use one kind.")
        union = words[0] if len(set(words)) == 1 else tuple(sorted(set().union(*words)))
        for place, r in enumerate(found):
            if column in r.columns:
                moved = torch.tensor([union.index(word) for word in r.words[column]])[r.columns[column]]
                classes = union if column == "label" else r.classes
                found[place] = replace(r, columns={**r.columns, column: moved}, classes=classes)
        people = union if column == "subject" else people
    return found, people


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [word for part in parts for word in part]
