"""Recordings of MNE: epochs as they are, continuous data cut around their events or left in one piece."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.codec import UserError, extra
from isthmus.data.readers.recording import EXTRAS, Recording, read_columns
from isthmus.data.readers.sensors import pick, positions, units


def from_epochs(epochs: Any, classes: tuple[str, ...] | None = None) -> Recording:
    """An ``mne.Epochs`` object; its magnetometers and gradiometers in fT and fT/cm, or its EEG in µV where it has none.

    Sensors stand where MNE's layout has them, or the recording itself. Event names become labels, numbered as in
    ``classes`` or by name; the metadata's columns ``stimulus``, ``image``, ``subject``, ``latent`` and ``split`` are
    taken along.
    """
    picks = pick(epochs.info)
    signal = torch.tensor(epochs.get_data(picks=picks, copy=False), dtype=torch.float32)
    names = {code: name for name, code in epochs.event_id.items()}
    classes = tuple(sorted(names.values())) if classes is None else classes
    columns: dict[str, Any] = {"label": torch.tensor([classes.index(names[code]) for code in epochs.events[:, 2]])}
    if epochs.metadata is not None:
        columns |= {name: epochs.metadata[name].tolist() for name in EXTRAS if name in epochs.metadata}
    numbered, words = read_columns(columns, len(signal), "the epochs")
    return Recording(
        signal * units(epochs.info, picks),
        torch.tensor(epochs.times, dtype=torch.float32),
        positions(epochs.info, picks),
        numbered,
        words.setdefault("label", classes),
        words,
    )


def read_fif(path: Path, start: float, stop: float) -> Recording:
    """A ``.fif`` of epochs or of continuous data; ``start`` and ``stop`` in seconds around its events."""
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
        return from_raw(raw, start, stop)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_raw(raw: Any, start: float = -0.5, stop: float = 1.0) -> Recording:
    """An ``mne.io.Raw`` object as trials around its events, or in one piece where it has none.

    Events are the changes of its stim channels, one sample being enough; where those say nothing, its annotations but
    those that begin with BAD or EDGE. Several annotations at one sample are a trial each.

    Raises:
        UserError: no event has the whole window, or MNE cannot tell the events.
    """
    events, names = _events(raw)
    if not len(events):
        picks = pick(raw.info)
        signal = torch.tensor(raw.get_data(picks=np.array(picks)), dtype=torch.float32)[None]
        times = torch.tensor(raw.times, dtype=torch.float32)
        return Recording(signal * units(raw.info, picks), times, positions(raw.info, picks), continuous=True)
    import mne

    parts = []
    for part in _apart(events):
        made: Any = mne.Epochs(
            raw, part, names, start, stop, baseline=None, preload=True, on_missing="ignore", verbose="ERROR"
        )
        if len(made):
            parts.append(made)
    if not parts:
        told = f"of {len(events)} events none has the whole window of {start} to {stop} s outside of bad spans"
        raise UserError(f"{told}; choose another with start= and stop=.")
    found = [from_epochs(part, tuple(sorted(names))) for part in parts]
    order = np.argsort(np.concatenate([part.events[:, 0] for part in parts]), kind="stable")
    signal = torch.cat([each.signal for each in found])[order]
    label = torch.cat([each.columns["label"] for each in found])[order]
    return replace(found[0], signal=signal, columns={"label": label})


def _events(raw: Any) -> tuple[np.ndarray, dict[str, int]]:
    """Events ``(N, 3)`` as MNE has them, and what their codes are called."""
    import mne

    events = np.zeros((0, 3), int)
    if len(mne.pick_types(raw.info, meg=False, stim=True)):
        try:
            events = mne.find_events(raw, shortest_event=1, verbose="ERROR")
        except (ValueError, RuntimeError) as error:
            raise UserError(f"its stim channels cannot be read ({error})") from error
    if len(events):
        return events, {str(code): int(code) for code in np.unique(events[:, 2])}
    try:
        events, names = mne.events_from_annotations(raw, verbose="ERROR")
    except ValueError:  # what MNE raises where all annotations are BAD or EDGE
        return events, {}
    return events, {str(name): int(code) for name, code in names.items()}


def _apart(events: np.ndarray) -> list[np.ndarray]:
    """Events in lists without two at one sample, which MNE's epochs cannot hold."""
    events = events[np.argsort(events[:, 0], kind="stable")]
    _, first, counts = np.unique(events[:, 0], return_index=True, return_counts=True)
    turn = np.arange(len(events)) - np.repeat(first, counts)
    return [events[turn == number] for number in range(int(turn.max()) + 1)]
