"""Several processes on one global batch give the weights of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.engine import jobs

# Batch norm sees a process's own share (torch synchronises it on GPUs only), dropout differs between processes.
SETTINGS = {"steps": 24, "norm": "group", "dropout": 0.0, "ema": None}
FLAGS = ["--steps", "24", "--norm", "group", "--dropout", "0"]


def _check(whole: Path, shared: Path) -> None:
    one, two = jobs.outcome(whole), jobs.outcome(shared)
    assert set(one) == set(two) == {"first.result.pt", "second.result.pt"}
    for name in one:
        for key, value in one[name]["model"].items():
            torch.testing.assert_close(two[name]["model"][key], value, rtol=0, atol=1e-5)
        losses = [outcome[name]["curves"]["loss"] for outcome in (one, two)]
        for (step, loss), (other_step, other_loss) in zip(*losses, strict=True):
            assert step == other_step
            assert abs(loss - other_loss) < 1e-5


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    jobs.job(tmp_path / "whole", **SETTINGS)
    said = _run("tests.engine.jobs", str(tmp_path / "shared"), *FLAGS, "--devices", "2")
    _check(tmp_path / "whole", tmp_path / "shared")
    assert "Warning" not in said


@pytest.mark.slow
def test_torchrun_starts_the_processes_itself(tmp_path: Path) -> None:
    jobs.job(tmp_path / "whole", **SETTINGS)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _run(*launcher, "-m", "tests.engine.jobs", str(tmp_path / "shared"), *FLAGS)
    _check(tmp_path / "whole", tmp_path / "shared")


@pytest.mark.slow
def test_shares_of_a_model_give_the_weights_of_the_whole(tmp_path: Path) -> None:
    jobs.job(tmp_path / "whole", optimizer="adamw", **SETTINGS)
    flags = [*FLAGS, "--optimizer", "adamw", "--save-every", "5", "--devices", "2"]
    _run("tests.engine.jobs", str(tmp_path / "shared"), *flags, "--strategy", "fsdp")
    _check(tmp_path / "whole", tmp_path / "shared")
