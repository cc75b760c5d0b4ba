"""A run that is killed, interrupted or cut short ends where an undisturbed one ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.codec import UserError
from isthmus.engine import Interrupted, Run, Training
from isthmus.engine.fit import fit
from tests.conftest import ROOT
from tests.engine import jobs

SAVE_EVERY = 3


def _child(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    jobs.job(out, **options)


def _kill_and_resume(tmp_path: Path, kills: int, steps: int) -> int:
    """Kill a run ``kills`` times while it trains, then let it end; returns how many times it really died."""
    # A server that has imported everything already forks each run in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.jobs"])
    chance, died = random.Random(0), 0
    for attempt in range(10 * kills):
        options = {"steps": steps, "resume": attempt > 0, "save_every": SAVE_EVERY}
        process = context.Process(target=_child, args=(tmp_path / "killed", options))
        process.start()
        if died < kills:
            begun = tmp_path / "killed" / "checkpoints"
            while process.is_alive() and not any(begun.glob("*.pt")):
                time.sleep(0.002)
            process.join(0.05 + chance.random() * 0.5)
            if process.is_alive():
                process.kill()
                died += 1
        process.join()
        if (tmp_path / "killed" / "finished.json").exists():
            break
    assert (tmp_path / "killed" / "finished.json").exists()
    return died


def _compare(tmp_path: Path, steps: int) -> None:
    jobs.job(tmp_path / "whole", steps=steps, save_every=SAVE_EVERY)
    whole, killed = jobs.outcome(tmp_path / "whole"), jobs.outcome(tmp_path / "killed")
    assert set(whole) == {"first.result.pt", "second.result.pt"}
    assert jobs.same(whole, killed)
    for phase in ("first", "second"):
        curves = [(tmp_path / name / "scalars" / f"{phase}.csv").read_text() for name in ("whole", "killed")]
        assert sorted(curves[0].splitlines()) == sorted(curves[1].splitlines())
    left = [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert sorted(left) == ["first.result.pt", "second.result.pt"]


def test_three_kills_leave_no_trace(tmp_path: Path) -> None:
    assert _kill_and_resume(tmp_path, kills=3, steps=200) == 3
    _compare(tmp_path, steps=200)


@pytest.mark.slow
def test_ten_kills_leave_no_trace(tmp_path: Path) -> None:
    assert _kill_and_resume(tmp_path, kills=10, steps=1500) == 10
    _compare(tmp_path, steps=1500)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_leaves_a_resumable_run(tmp_path: Path, number: signal.Signals) -> None:
    class Raise(jobs.Denoise):
        """Sends the signal to its own process in the middle of step 20."""

        calls = 0

        def forward(self, *arguments: Any) -> Any:
            self.calls += 1
            if self.calls == 21:
                os.kill(os.getpid(), number)
            return super().forward(*arguments)

    training = Training(steps=40, batch_size=16, lr=0.01)
    with pytest.raises(Interrupted) as stopped, Run.quick(tmp_path) as run:
        fit(run, "train", Raise(), jobs.pictures(), training)
    assert stopped.value.code == 130
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["train.step000000021.pt"]
    assert f"isthmus run quick --resume --out {tmp_path / 'run'}" in (tmp_path / "run/log.txt").read_text()
    assert json.loads((tmp_path / "run/report.json").read_text())["status"] == "interrupted"

    with Run.quick(tmp_path, resume=True) as run:
        resumed = fit(run, "train", jobs.Denoise(), jobs.pictures(), training)
    with Run.quick(tmp_path / "whole") as run:
        whole = fit(run, "train", jobs.Denoise(), jobs.pictures(), training)
    assert jobs.same(resumed.objective.state_dict(), whole.objective.state_dict())
    assert resumed.curves == whole.curves


def test_an_interrupted_command_exits_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.jobs", str(tmp_path / "run"), "--steps", "100000"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/scalars/first.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert any((tmp_path / "run/checkpoints").glob("first.step*.pt"))


def _train(tmp_path: Path, steps: int = 12, **options: Any) -> Any:
    with Run.quick(tmp_path, **options) as run:
        return fit(run, "train", jobs.Denoise(), jobs.pictures(), Training(steps=steps, batch_size=16, lr=0.01))


def _stopped(tmp_path: Path) -> Path:
    """A run that failed in its tenth step, with checkpoints after three and six steps (and one after nine)."""

    class Fails(jobs.Denoise):
        calls = 0

        def forward(self, *arguments: Any) -> Any:
            self.calls += 1
            if self.calls == 10:
                raise RuntimeError("stop here")
            return super().forward(*arguments)

    with pytest.raises(RuntimeError, match="stop here"), Run.quick(tmp_path, save_every=3) as run:
        fit(run, "train", Fails(), jobs.pictures(), Training(steps=12, batch_size=16, lr=0.01))
    return tmp_path / "run/checkpoints"


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    changed = data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]
    path.write_bytes({"cut": data[: len(data) // 2], "flipped": changed, "empty": b"", "foreign": b"x" * 5000}[how])


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, how: str) -> None:
    folder = _stopped(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["train.step000000006.pt", "train.step000000009.pt"]
    _damage(folder / "train.step000000009.pt", how)
    resumed = _train(tmp_path, resume=True)
    log = (tmp_path / "run/log.txt").read_text()
    assert "train.step000000009.pt" in log
    assert "Going on from train.step000000006.pt instead" in log
    whole = _train(tmp_path / "whole")
    assert jobs.same(resumed.objective.state_dict(), whole.objective.state_dict())


def test_without_a_whole_checkpoint_the_fix_is_told(tmp_path: Path) -> None:
    folder = _stopped(tmp_path)
    for path in folder.iterdir():
        _damage(path, "cut")
    with pytest.raises(UserError, match=r"Delete train.step000000009.pt, train.step000000006.pt to train"):
        _train(tmp_path, resume=True)
    for path in folder.iterdir():
        path.unlink()
    _train(tmp_path, resume=True)


def test_a_damaged_result_is_named_with_the_fix(tmp_path: Path) -> None:
    _train(tmp_path)
    _damage(tmp_path / "run/checkpoints/train.result.pt", "cut")
    with pytest.raises(UserError, match=r"train.result.pt is cut short .* Delete train.result.pt"):
        _train(tmp_path, resume=True)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("this must not run",)

    folder = _stopped(tmp_path)
    for path in folder.iterdir():
        torch.save({"identity": {}, "step": 3, "model": Evil()}, path)
    with pytest.raises(UserError, match="not a checkpoint of isthmus"):
        _train(tmp_path, resume=True)


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    _stopped(tmp_path)
    with (
        Run.quick(tmp_path, resume=True) as run,
        pytest.raises(UserError, match=r"with lr 0\.01, now it is 0\.02"),
    ):
        fit(run, "train", jobs.Denoise(), jobs.pictures(), Training(steps=12, batch_size=16, lr=0.02))
    with Run.quick(tmp_path, resume=True) as run, pytest.raises(UserError, match="does not fit this objective"):
        fit(run, "train", jobs.Denoise("group"), jobs.pictures(), Training(steps=12, batch_size=16, lr=0.01))


def test_a_finished_phase_is_loaded_and_not_repeated(tmp_path: Path) -> None:
    first = _train(tmp_path)

    class Never(jobs.Denoise):
        def forward(self, *arguments: Any) -> Any:
            raise AssertionError("trained again")

    with Run.quick(tmp_path, resume=True) as run:
        training = Training(steps=12, batch_size=16, lr=0.01)
        again = fit(run, "train", Never(), jobs.pictures(), training)
        drawn = torch.rand(3)
        with pytest.raises(UserError, match="needs a name of its own"):
            fit(run, "train", Never(), jobs.pictures(), training)
    assert jobs.same(first.objective.state_dict(), again.objective.state_dict())
    assert first.curves == again.curves
    assert not again.objective.training
    with Run.quick(tmp_path / "other") as run:
        fit(run, "train", jobs.Denoise(), jobs.pictures(), training)
        assert torch.equal(drawn, torch.rand(3))


def test_a_full_disk_leaves_the_last_checkpoint_and_a_resumable_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.engine import checkpoint

    written = 0

    class Full(checkpoint._Hashing):
        """Stands for a disk that is full in the middle of a checkpoint."""

        def write(self, data: Any) -> int:
            nonlocal written
            written += len(data)
            if written > limit:
                raise OSError(28, "No space left on device")
            return super().write(data)

    _train(tmp_path / "measure", save_every=3)
    size = (tmp_path / "measure/run/checkpoints/train.result.pt").stat().st_size
    limit = 8 * size
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_Hashing", Full)
        with pytest.raises(UserError, match=r"the disk is full; free some space and go on with --resume"):
            _train(tmp_path, save_every=3)
    left = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert left
    assert all(name.startswith("train.step") for name in left)
    resumed, whole = _train(tmp_path, resume=True), _train(tmp_path / "whole")
    assert jobs.same(resumed.objective.state_dict(), whole.objective.state_dict())
