"""Settings of a phase are checked when they are made, and give the right lengths and schedules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from isthmus.codec import UserError
from isthmus.engine import Run, RunOptions, Training
from isthmus.engine.fit import fit
from tests.engine.jobs import pictures


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "either steps or epochs"),
        ({"steps": 5, "epochs": 2}, "either steps or epochs"),
        ({"steps": 0}, "steps is at least 1, got 0"),
        ({"steps": 5, "lr": -1.0}, "lr is above 0"),
        ({"steps": 5, "lr": float("nan")}, "lr is above 0, got nan"),
        ({"steps": 5, "weight_decay": -0.1}, "weight_decay is at least 0"),
        ({"steps": 5, "warmup_steps": 2, "warmup_epochs": 1.0}, "warmup_steps or warmup_epochs"),
        ({"steps": 5, "ema": 1.0}, "ema is above 0 and below 1"),
        ({"steps": 5, "layer_decay": 1.5}, "layer_decay is above 0 and at most 1"),
        ({"steps": 5, "betas": (0.9, 1.0)}, "betas is at least 0 and below 1"),
        ({"steps": 5, "schedule": "cosin"}, "schedule must be cosine"),
        ({"steps": 5, "milestones": (3,)}, "milestones go with"),
        ({"steps": 5, "schedule": "multistep"}, "milestones go with"),
        ({"steps": 5, "batch_size": 10, "accumulate": 3}, "cannot be cut into 3"),
        ({"steps": 5, "clip": 0.0}, "clip is above 0"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Training(**settings)


def test_epochs_count_whole_batches() -> None:
    training = Training(epochs=3, batch_size=32, warmup_epochs=1)
    assert training.length(100) == 9
    assert training.schedule_for(100, 9).warmup_steps == 3
    with pytest.raises(UserError, match="fewer than one batch of 32"):
        training.length(20)
    with pytest.raises(UserError, match="give steps instead"):
        training.length(None)


def test_a_capped_schedule_keeps_its_shape() -> None:
    settings = {"schedule": "multistep", "milestones": (60, 120, 160), "gamma": 0.2}
    training = Training(epochs=200, batch_size=10, warmup_epochs=10, **settings)
    whole, capped = training.schedule_for(100, 2000), training.schedule_for(100, 200)
    assert whole.milestones == (600, 1200, 1600)
    assert capped.milestones == (60, 120, 160)
    assert capped.warmup_steps == 10
    assert [capped.at(step)[0] for step in (50, 100, 199)] == [whole.at(step)[0] for step in (500, 1000, 1990)]


def test_the_flag_that_mends_it_is_named(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Config:
        pretrain_it: Training = Training(epochs=2, batch_size=200)
        probe: Training = Training(steps=5, batch_size=64, warmup_steps=9)

    config = Config()
    for training, sentence in (
        (config.pretrain_it, "fewer than one batch of 200; lower --pretrain-it.batch-size"),
        (config.probe, "lower --probe.warmup-steps or --probe.warmup-epochs, or train longer"),
        (Training(epochs=2, batch_size=300), "lower batch_size"),
    ):
        with Run.quick(tmp_path / str(training.batch_size), config=config) as run, pytest.raises(UserError) as refused:
            fit(run, "train", nn.Linear(1, 1), pictures(96), training)
        assert sentence in str(refused.value)


def test_a_warm_up_must_end_before_the_phase() -> None:
    with pytest.raises(UserError, match="warm-up of 8 steps must be shorter than the phase of 8"):
        Training(steps=8, warmup_steps=8).schedule_for(None, 8)
    assert Training(steps=8, warmup_steps=7).schedule_for(None, 1).at(0)[0] > 0


@pytest.mark.parametrize("name", ["devices", "max_steps", "log_every", "save_every"])
def test_options_of_the_run_are_checked_too(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is at least 1, got 0"):
        RunOptions(**{name: 0})
