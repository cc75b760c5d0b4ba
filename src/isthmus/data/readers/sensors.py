"""Sensors of an MNE recording: which are read, where they sit on a flat cap, and in which unit they are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError

MISSING = -0.1  # both coordinates of a sensor that is not there
UNITS = {"mag": 1e15, "grad": 1e13, "eeg": 1e6}
"""What a value of MNE is multiplied by, a kind of channel: fT, fT/cm and µV, as MNE shows them."""


def pick(info: Any, bads: bool = False) -> list[int]:
    """MEG channels without references, or EEG where there are none; those marked as bad only if asked for.

    Raises:
        UserError: there are neither.
    """
    import mne

    pick_types: Any = mne.pick_types
    exclude = [] if bads else "bads"
    for kind in ({"meg": True, "ref_meg": False}, {"meg": False, "eeg": True}):
        if len(picks := pick_types(info, **kind, exclude=exclude)):
            return [int(number) for number in picks]
    raise UserError("the recording has neither MEG nor EEG channels" + (" that are not marked as bad." * (not bads)))


def units(info: Any, picks: Sequence[int]) -> Tensor:
    """The factor of every channel ``(C, 1)``, float32; see :data:`UNITS`."""
    import mne

    return torch.tensor([[UNITS[mne.channel_type(info, number)]] for number in picks])


def positions(info: Any, picks: Sequence[int]) -> Tensor:
    """Places of channels on the flattened cap, stretched to [0, 1] over all of the cap: ``(C, 2)``.

    They are those of MNE's layout where it knows the channels by name, and else come from the places that the recording
    holds, whatever its channels are called. (-0.1, -0.1) where a place is unknown. Bad channels belong to the cap.

    Raises:
        UserError: no place is known.
    """
    import mne

    kind = {mne.channel_type(info, number) for number in picks}
    cap = _all_of(info, "eeg" in kind)
    places = _by_name(info, cap)
    if len(places) < len(cap):
        measured = _by_place(info, cap)
        places = measured if len(measured) > len(places) else places
    if not any(number in places for number in picks):
        raise UserError(
            "MNE finds no layout for these channels, and the recording holds no places of them; set a montage, or give "
            ".npz with positions."
        )
    flat = torch.as_tensor(np.array(list(places.values())), dtype=torch.float32)
    low, high = flat.amin(0), flat.amax(0)
    stretched = torch.where(high > low, (flat - low) / (high - low).clamp_min(1e-12), torch.full_like(flat, 0.5))
    known = dict(zip(places, stretched, strict=True))
    return torch.stack([known.get(number, torch.full((2,), MISSING)) for number in picks])


def _all_of(info: Any, eeg: bool) -> list[int]:
    import mne

    pick_types: Any = mne.pick_types
    return [int(number) for number in pick_types(info, meg=not eeg, eeg=eeg, ref_meg=False, exclude=[])]


def _by_name(info: Any, cap: Sequence[int]) -> dict[int, np.ndarray]:
    """Places in MNE's own layout, by the names of the channels."""
    import mne

    find_layout: Any = mne.channels.find_layout
    try:
        layout = find_layout(info, exclude=[])
    except (RuntimeError, ValueError, KeyError, IndexError):
        layout = None
    if layout is None:
        return {}
    known = dict(zip(layout.names, layout.pos, strict=True))
    names = [info["ch_names"][number] for number in cap]
    if not all(name in known for name in names) and len(set(map(_clean, names))) == len(names):
        known = {_clean(name): place for name, place in known.items()}  # some systems add a number behind a dash
        names = list(map(_clean, names))
    found = {number: known[name][:2] for number, name in zip(cap, names, strict=True) if name in known}
    return {number: place for number, place in found.items() if np.isfinite(place).all()}


def _clean(name: str) -> str:
    return name.partition("-")[0].replace(" ", "")


def _by_place(info: Any, cap: Sequence[int]) -> dict[int, np.ndarray]:
    """Places in space, seen from the middle of the head and laid flat: as far from the centre as they are from the
    vertex."""
    rows = {number: np.asarray(info["chs"][number]["loc"][:3], float) for number in cap}
    rows = {number: place for number, place in rows.items() if np.isfinite(place).all() and place.any()}
    if not rows or len({tuple(place) for place in rows.values()}) < min(2, len(rows)):
        return {}
    space = np.stack(list(rows.values()))
    rays = space - _middle(space)
    angle = np.arctan2(np.hypot(rays[:, 0], rays[:, 1]), rays[:, 2])
    around = np.arctan2(rays[:, 1], rays[:, 0])
    flat = angle[:, None] * np.stack([np.cos(around), np.sin(around)], 1)
    return dict(zip(rows, flat, strict=True))


def _middle(space: np.ndarray) -> np.ndarray:
    """The centre of the sphere on which sensors lie best; below a cap that is nearly flat."""
    centred = space - space.mean(0)
    size = float(np.abs(centred).max()) or 1.0
    left = np.concatenate([2 * centred / size, np.ones((len(space), 1))], 1)
    if len(space) >= 4 and np.linalg.matrix_rank(left, tol=1e-3) == 4:
        middle = np.linalg.lstsq(left, (np.square(centred) / size**2).sum(1), rcond=None)[0][:3] * size
        if np.linalg.norm(middle) < 20 * size:
            return middle + space.mean(0)
    return space.mean(0) - np.array([0.0, 0.0, 2 * size])
