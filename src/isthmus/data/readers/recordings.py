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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError, extra
from isthmus.data.dataset import Memory, pick_needs
from isthmus.data.splits import PARTS, divide, row_fractions

SUFFIXES = (".fif", ".fif.gz", ".npz", ".npy")
MISSING = -0.1  # both coordinates of a sensor that is not there
_EXTRAS = ("subject", "label", "latent", "stimulus", "image", "low", "split")
_NUMBERED = ("subject", "label", "stimulus")


@dataclass(frozen=True)
class Recording:
    """Trials of one recording.

    Attributes:
        signal: float32 ``(N, C, T)``.
        times: ``(T,)`` seconds from the onset.
        positions: ``(C, 2)`` in [0, 1]; (-0.1, -0.1) where a sensor's place is unknown.
        columns: what is known of every trial: label, latent, stimulus, image, subject.
        classes: names of the labels.
        words: what the numbers of a column stand for, where it held words.
        continuous: the whole is one stretch of time and not trials.
    """

    signal: Tensor
    times: Tensor
    positions: Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continuous: bool = False

    @property
    def rate(self) -> float:
        """Samples a second."""
        return (len(self.times) - 1) / float(self.times[-1] - self.times[0])

    def at(self, times: Tensor) -> Recording:
        """The same trials sampled at other times, low-passed before where those are further apart.

        Raises:
            UserError: the recording does not reach that far.
        """
        if len(times) == len(self.times) and torch.allclose(times, self.times, atol=1e-4):
            return replace(self, times=times)
        step = float(times[1] - times[0])
        if float(times[0]) < float(self.times[0]) - step or float(times[-1]) > float(self.times[-1]) + step:
            raise UserError(
                f"the recording covers {self.times[0]:.3f} to {self.times[-1]:.3f} s, and {times[0]:.3f} to "
                f"{times[-1]:.3f} s are needed; cut longer epochs."
            )
        from scipy.signal import resample_poly

        ratio = Fraction(1 / step / self.rate).limit_denominator(1000)
        signal, at = self.signal.numpy(), self.times.double().numpy()
        if ratio < 1:  # fewer samples: what lies above the new Nyquist frequency has to go first
            ends = signal[..., :1]  # the filter takes what is outside for zero
            signal = resample_poly(signal - ends, ratio.numerator, ratio.denominator, axis=-1, padtype="line") + ends
            at = at[0] + np.arange(signal.shape[-1]) / (self.rate * float(ratio))
        place = np.interp(times.double().numpy(), at, np.arange(len(at)))
        low = np.clip(place.astype(int), 0, len(at) - 2)
        share = (place - low).astype(np.float32)
        mixed = signal[..., low] * (1 - share) + signal[..., low + 1] * share
        return replace(self, signal=torch.from_numpy(np.ascontiguousarray(mixed, np.float32)), times=times)


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
    recording = _read_fif(path, start, stop) if kind.startswith(".fif") else _read_arrays(path, kind)
    if not bool(torch.isfinite(recording.signal).all()):
        wrong = int((~torch.isfinite(recording.signal)).flatten(1).any(1).sum())
        raise UserError(f"{path}: {wrong} of {len(recording.signal)} trials have NaN or infinite samples; drop those.")
    return recording


def from_epochs(epochs: Any) -> Recording:
    """An ``mne.Epochs`` object; its magnetometers and gradiometers, or its EEG where it has none.

    Sensors that MNE's layout does not know get the missing place. Event names become labels; the metadata's columns
    ``stimulus``, ``image``, ``subject``, ``latent`` and ``split`` are taken along.
    """
    picks = _picks(epochs.info)
    signal = torch.tensor(epochs.get_data(picks=picks, copy=False), dtype=torch.float32)
    names = {code: name for name, code in epochs.event_id.items()}
    classes = sorted(names.values())
    columns: dict[str, Any] = {"label": torch.tensor([classes.index(names[code]) for code in epochs.events[:, 2]])}
    if epochs.metadata is not None:
        columns |= {name: epochs.metadata[name].tolist() for name in _EXTRAS if name in epochs.metadata}
    numbered, words = _columns(columns, len(signal), "the epochs")
    return Recording(
        _scaled(signal),
        torch.tensor(epochs.times, dtype=torch.float32),
        sensor_positions(epochs.info, picks),
        numbered,
        words.setdefault("label", tuple(classes)),
        words,
    )


def _picks(info: Any) -> list[int]:
    """MEG channels without references, or EEG where there are none."""
    import mne

    pick: Any = mne.pick_types
    for kind in ({"meg": True, "ref_meg": False}, {"meg": False, "eeg": True}):
        if len(picks := pick(info, **kind)):
            return [int(number) for number in picks]
    raise UserError("the recording has neither MEG nor EEG channels.")


def sensor_positions(info: Any, picks: Sequence[int]) -> Tensor:
    """Places of MNE's channels in its own flat layout, stretched to [0, 1]: ``(C, 2)``; (-0.1, -0.1) where unknown."""
    import mne

    positions = torch.full((len(picks), 2), MISSING)
    try:
        layout = mne.channels.find_layout(info)
    except (RuntimeError, ValueError):
        layout = None
    if layout is None:
        raise UserError("MNE finds no layout for these channels; set a montage, or give .npz with positions.")
    known = {
        name.partition("-")[0].replace(" ", ""): place for name, place in zip(layout.names, layout.pos, strict=True)
    }
    found = [
        (row, known.get(info["ch_names"][pick].partition("-")[0].replace(" ", ""))) for row, pick in enumerate(picks)
    ]
    places = [(row, place[:2]) for row, place in found if place is not None]
    if not places:
        raise UserError("MNE's layout names none of these channels; give .npz with positions.")
    rows = [row for row, _ in places]
    flat = torch.as_tensor(np.array([place for _, place in places]), dtype=torch.float32)
    low, high = flat.amin(0), flat.amax(0)
    positions[rows] = torch.where(high > low, (flat - low) / (high - low).clamp_min(1e-12), torch.full_like(flat, 0.5))
    return positions


def _read_fif(path: Path, start: float, stop: float) -> Recording:
    mne = extra("mne", "brain")
    try:
        try:
            return from_epochs(mne.read_epochs(path, preload=True, verbose="ERROR"))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raw = mne.io.read_raw_fif(path, preload=True, verbose="ERROR")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a foreign reader fails in many ways
        raise UserError(f"{path} is no .fif of epochs or continuous data that MNE can read ({error}).") from error
    try:
        events = mne.find_events(raw, verbose="ERROR")
        names = None
    except ValueError:
        events, names = mne.events_from_annotations(raw, verbose="ERROR")
    if len(events):
        epochs = mne.Epochs(
            raw, events, names, start, stop, baseline=None, preload=True, verbose="ERROR", event_repeated="drop"
        )
        if len(epochs):
            return from_epochs(epochs)
    picks = _picks(raw.info)
    signal = torch.tensor(raw.get_data(picks=np.array(picks)), dtype=torch.float32)[None]
    times = torch.tensor(raw.times, dtype=torch.float32)
    return Recording(_scaled(signal), times, sensor_positions(raw.info, picks), continuous=True)


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
    extras = {name: arrays[name] for name in _EXTRAS if name in arrays}
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else None
    columns, words = _columns(extras, count, str(path))
    if classes is not None and "label" in columns and "label" not in words:
        if not 0 <= int(columns["label"].min()) <= int(columns["label"].max()) < len(classes):
            raise UserError(f"{path}: classes has {len(classes)} names, which is too few for its labels.")
        words["label"] = classes
    signal = torch.as_tensor(signal, dtype=torch.float32)
    return Recording(signal, times, positions, columns, words.get("label", classes), words)


def _columns(given: Mapping[str, Any], count: int, where: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Numbers as tensors, words as lists, each with an entry for every trial; and the words that became numbers."""
    columns: dict[str, Any] = {}
    words: dict[str, tuple[str, ...]] = {}
    for name, values in given.items():
        array = np.asarray(values)
        if array.ndim == 0:
            array = np.full(count, array)
        if len(array) != count:
            raise UserError(f"{where}: there are {count} trials, and {name} has {len(array)} entries.")
        if array.dtype.kind in "US":
            columns[name] = [str(word) for word in array]
        elif array.dtype.kind == "O":
            columns[name] = torch.as_tensor(np.stack([np.asarray(row, np.float32) for row in array]))
        else:
            columns[name] = torch.as_tensor(array)
    for name in _NUMBERED:
        if isinstance(columns.get(name), list):
            words[name] = tuple(sorted(set(columns[name])))
            place = {word: number for number, word in enumerate(words[name])}
            columns[name] = torch.tensor([place[word] for word in columns[name]])
        elif name in columns:
            columns[name] = columns[name].long()
    if unknown := set(columns.get("split", ())) - set(PARTS):
        raise UserError(f"{where}: split says {sorted(map(str, unknown))[0]!r}; it may say {', '.join(PARTS)}.")
    return columns, words


def _scaled(signal: Tensor) -> Tensor:
    """Tesla and volt as numbers near one: powers of ten that leave the ratios of channels alone."""
    size = float(signal.abs().median())
    return signal * 10.0 ** -round(np.log10(size)) if size > 0 else signal


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
    found = [read(file, *window) for file in files]
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


def _together(name: str, found: Sequence[Recording]) -> tuple[list[Recording], tuple[str, ...] | None]:
    """Number the words of all recordings as one list, and name the subjects where they are words."""
    found, people = list(found), None
    for column in _NUMBERED:
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
