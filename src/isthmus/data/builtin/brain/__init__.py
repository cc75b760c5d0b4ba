"""``brain``: simulated people look at things while their magnetic fields are recorded; the truth is known.

``load("brain", needs=("signal", "latent"))`` gives a trial a sample; ``brain?subjects=1&trials=200`` sizes it. Training
stimuli differ from subject to subject; test stimuli are seen by all, ``repeats`` times each. Who sees what is the same
on every machine; latents, signals and pictures come from torch's normal numbers and matrix products, so that they are
the same up to rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.codec import UserError
from isthmus.data.builtin.brain.fmri import FMRISettings
from isthmus.data.builtin.brain.meg import MEGSettings
from isthmus.data.builtin.brain.simulator import BrainSimulator, Truth
from isthmus.data.builtin.brain.stimuli import Stimuli, draw, pictures
from isthmus.data.dataset import Memory, pick_needs
from isthmus.data.splits import PARTS, check_split
from isthmus.layers.random import derive_seed

__all__ = ["BrainData", "BrainSimulator", "FMRISettings", "MEGSettings", "Stimuli", "Truth", "draw", "load", "pictures"]

COLUMNS = ("signal", "subject", "label", "latent", "low", "stimulus", "positions", "image")
_UNSEEN = 20  # categories that training leaves out


class BrainData(Memory):
    """Trials in memory, and how they were recorded.

    Attributes:
        times: seconds from the onset of every sample of a window, ``(T,)``.
        rate: samples a second.
        layout: sensor positions ``(C, 2)`` in [0, 1].
        geometry: of the sensors.
        simulator: the brains that were recorded; ``simulator.truth`` is the truth.
    """

    def __init__(self, name: str, data: dict[str, Any], simulator: BrainSimulator, categories: int) -> None:
        super().__init__(name, data, COLUMNS, [f"category {i}" for i in range(categories)])
        settings = simulator.meg_settings
        self.simulator, self.times, self.rate = simulator, settings.times, settings.rate
        self.layout, self.geometry = simulator.recorder.helmet.layout, simulator.recorder.helmet.name


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    subjects: int = 4,
    trials: int = 700,
    stimuli: int = 60,
    repeats: int = 4,
    categories: int = 100,
    features: int = 16,
    unseen: int = 0,
    energy: float = 0.0,
    spread: float = 0.2,
    picture: int = 24,
    sensors: int = 46,
    rate: float = 40.0,
    start: float = -0.1,
    stop: float = 0.7,
    jitter: float = 0.03,
    widen: float = 1.6,
    evoked: float = 0.35,
    induced: float = 1.5,
    noise: float = 1.5,
    signal: float = 0.2,
    geometry: str = "auto",
    name: str = "brain",
) -> BrainData:
    """Simulated MEG.

    Args:
        split: ``train`` holds ``trials`` a subject, each of another stimulus; ``val`` a fifth as many; ``test``
            ``repeats`` of ``stimuli`` that all subjects see.
        needs: columns; ``signal`` ``(C, T)``, ``subject``, ``label`` (the category), ``latent`` ``(F,)``, ``low``
            ``(5,)``, ``stimulus`` (its number), ``positions`` ``(C, 2)``, ``image`` (what was seen).
        seed: of brains, stimuli and trials.
        subjects, trials, stimuli, repeats, categories, features: sizes.
        unseen: 1 takes the test stimuli from categories that training has not.
        energy, spread: see :class:`BrainSimulator`.
        picture: side of the pictures.
        sensors, rate, start, stop, jitter, widen, evoked, induced, noise, signal, geometry: see :class:`MEGSettings`.

    Raises:
        UserError: impossible sizes.
    """
    asked = pick_needs(name, needs, COLUMNS)
    if min(subjects, trials, stimuli, repeats, categories, features, picture) < 1 or unseen not in (0, 1):
        raise UserError(f"{name}: sizes must be 1 or more, and unseen 0 or 1.")
    try:
        numbers = [float(v) for v in (energy, spread, rate, start, stop, jitter, evoked, induced, noise, signal, widen)]
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from error
    energy, spread, rate, start, stop, jitter, evoked, induced, noise, signal, widen = numbers
    if not (rate > 0 and start < 0 < stop and round((stop - start) * rate) > 1):
        raise UserError(
            f"{name}: the window must begin before 0 s and end after it, got {start} to {stop} s at {rate} Hz."
        )
    meg = MEGSettings(
        sensors=sensors, rate=rate, start=start, stop=stop, jitter=jitter, evoked=evoked, induced=induced,
        noise=noise, signal=signal, widen=widen, geometry=geometry,
    )  # fmt: skip
    try:
        simulator = BrainSimulator(subjects, features, energy, _seeded("anatomy", seed), spread=spread, meg=meg)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error

    held = max(1, trials // 5)
    whole = subjects * (trials + held) + stimuli
    exemplars = -(-whole // categories)
    # Categories that training leaves out are drawn with the others, so that they differ from them as those do.
    every = draw(
        categories + _UNSEEN, exemplars, features, torch.Generator().manual_seed(derive_seed("brain", "pool", seed))
    )
    order = torch.randperm(categories * exemplars, generator=_seeded("order", seed))
    wanted = check_split(name, split)
    columns: dict[str, list[torch.Tensor]] = {column: [] for column in asked}
    for part in PARTS if wanted == ["all"] else wanted:
        if part == "test":
            if unseen:
                chosen = torch.randperm(_UNSEEN * exemplars, generator=_seeded("unseen", seed))[:stimuli]
                chosen = chosen + categories * exemplars
                if len(chosen) < stimuli:
                    raise UserError(f"{name}: there are {len(chosen)} stimuli of unseen categories, not {stimuli}.")
            else:
                chosen = order[-stimuli:]
            number = chosen.repeat(subjects * repeats)
            subject = torch.arange(subjects).repeat_interleave(stimuli * repeats)
        else:
            each = trials if part == "train" else held
            begin = 0 if part == "train" else subjects * trials
            number = order[begin : begin + subjects * each]
            subject = torch.arange(subjects).repeat_interleave(each)
        seen = every.take(number)
        made = {"subject": subject, "label": seen.category, "latent": seen.latent, "low": seen.low, "stimulus": number}
        if "signal" in asked:
            made["signal"] = simulator.meg(seen.latent, subject, seen.low, _seeded(part, unseen, seed))
        if "positions" in asked:
            made["positions"] = simulator.recorder.helmet.layout.expand(len(number), -1, -1)
        if "image" in asked:
            made["image"] = pictures(seen, picture)
        for column in asked:
            columns[column].append(made[column])
    data = {column: parts[0] if len(parts) == 1 else torch.cat(parts) for column, parts in columns.items()}
    return BrainData(name, data, simulator, categories + _UNSEEN)


def _seeded(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed("brain", *key))
