"""A run says how its sources were understood and what of them could not be read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from isthmus.data import Memory
from isthmus.engine import Run, Training
from isthmus.engine.evaluate import evaluate
from isthmus.engine.fit import fit
from isthmus.engine.probing import probe
from isthmus.objectives.classification import Classification


def source(bad: dict[int, tuple[str, str]]) -> Memory:
    images = torch.arange(12 * 3 * 16).reshape(12, 3, 4, 4) % 256
    dataset = Memory("mine", {"image": images.byte(), "label": torch.arange(12) % 2}, bad=bad)
    dataset.notes = ["Folders say the part of the data: 12 for train."]
    return dataset


def scaled(batch, generator=None):
    return {**batch, "image": batch["image"].float()}


def test_what_was_left_out_stands_once_in_the_log_and_in_the_report(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with Run.quick(tmp_path) as run:
        dataset = source({3: ("a.png", "the file is empty")})
        for phase in ("first", "second"):
            fit(run, phase, Classification(network), dataset, Training(steps=2, batch_size=4), scaled)
        held_out = source({0: ("b.png", "is no image"), 1: ("a.png", "the file is empty")})
        evaluate(run, network, held_out, {"loss": lambda predicted, batch: predicted.sum(1)}, scaled)
    notes = json.loads((run.dir / "report.json").read_text())["notes"]
    left_out = "2 samples could not be read and were left out: a.png: the file is empty; b.png: is no image."
    assert notes == ["mine: Folders say the part of the data: 12 for train.", left_out]
    log = (run.dir / "log.txt").read_text()
    assert [log.count(note) for note in notes] == [1, 1]


class _Level(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


class _Head(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        return self.linear(levels[0].flatten(1))


def test_a_probe_starts_from_a_readable_sample(tmp_path: Path) -> None:
    dataset = source({number: (f"{number}.png", "the file is empty") for number in range(3)})
    with Run.quick(tmp_path) as run:
        probe(
            run,
            "probe",
            _Level(),
            lambda level: _Head(level[0].numel()),
            dataset,
            Training(steps=2, batch_size=4),
            scaled,
        )
