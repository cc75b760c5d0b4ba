"""Folders of runs: what is written, what is never overwritten, who may work in them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.codec import UserError
from isthmus.engine import Run, RunOptions, read_config
from isthmus.engine.run import launched_by_others, make_fabric
from isthmus.errors import RunFailed
from isthmus.report import read


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "digits"
    widths: tuple[int, ...] = (16, 32)


def options(**given: object) -> RunOptions:
    return RunOptions(**{"accelerator": "cpu", "quiet": True, **given})  # type: ignore[arg-type]


def test_a_run_describes_itself(tmp_path: Path) -> None:
    with Run("spark", Config(), options(out=tmp_path / "r", seed=3), command="isthmus run spark") as run:
        run.metric("accuracy", torch.tensor(0.5), published=80.6, unit="%")
        run.figure("picture", torch.rand(3, 4, 4), "noise")
        run.note("a note")
        run.log("a line")
        (run.dir / "encoder.pt").write_bytes(b"")
        run.artifact("encoder", run.dir / "encoder.pt", "for timm")
        assert not (run.dir / "finished.json").exists()
    config = read_config(tmp_path / "r")
    assert (config["name"], config["seed"], config["config"]) == ("spark", 3, {"data": "digits", "widths": [16, 32]})
    environment = json.loads((tmp_path / "r/environment.json").read_text())
    assert environment["versions"]["torch"] == version("torch")
    assert (tmp_path / "r/finished.json").exists()
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["metrics"]["accuracy"]["value"] == 0.5
    assert report["status"] == "finished"
    assert "a line" in (tmp_path / "r/log.txt").read_text()
    texts = [p.read_text() for p in (tmp_path / "r").glob("*.json") if p.name not in ("config.json", "report.json")]
    assert not any(str(Path.home()) in text or os.uname().nodename in text for text in texts)


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    with Run("spark", None, options(out=tmp_path / "r")):
        pass
    before = (tmp_path / "r/finished.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="holds a finished run; choose another --out"):
        Run("spark", None, options(out=tmp_path / "r"))
    assert (tmp_path / "r/finished.json").stat().st_mtime_ns == before
    with Run("spark", None, options(out=tmp_path / "r", resume=True)) as run:
        assert run.resumed


def test_without_out_finished_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("spark-seed0", "spark-seed0-2", "spark-seed0-3"):
        with Run("spark", None, options()) as run:
            assert run.dir == Path("runs") / expected
    with Run("spark", None, options(resume=True)) as run:
        assert run.dir.name == "spark-seed0-3"
    with Run("spark", None, options(seed=1)) as run:
        assert run.dir.name == "spark-seed1"


def test_an_unfinished_run_asks_for_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="broken"), Run("spark", None, options()):
        raise RuntimeError("broken")
    assert json.loads(Path("runs/spark-seed0/report.json").read_text())["error"] == "broken"
    with pytest.raises(UserError, match="holds an unfinished run; go on with --resume"):
        Run("spark", None, options())
    with Run("spark", None, options(resume=True)) as run:
        assert run.resumed
        assert run.dir.name == "spark-seed0"


def test_there_must_be_a_run_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run in new to go on with"):
        Run("spark", None, options(out=Path("new"), resume=True))
    with pytest.raises(UserError, match="there is no run in runs/spark-seed0 to go on with"):
        Run("spark", None, options(resume=True))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_half_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.config.json.ab").touch()
    with Run("spark", None, options(out=tmp_path / "r", resume=True)) as run:
        assert not run.resumed
        (run.dir / "figures").mkdir()
        left = [run.dir / name for name in (".report.json.x_1", "figures/.a.png.abcd1234", ".m.safetensors.12.part")]
        others = [run.dir / name for name in (".hidden", ".notes.txt", "a.json.bak")]
        for path in (*left, *others):
            path.write_text("half")
    with Run("spark", None, options(out=tmp_path / "r", resume=True)):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in others)


def test_nothing_is_deleted_when_a_run_fails(tmp_path: Path) -> None:
    def work(run: Run) -> None:
        run.log("an hour of work")
        (run.dir / "circuit.npy").write_bytes(b"work")
        raise UserError("too few leaves.")

    with pytest.raises(UserError, match="too few"), Run("spark", None, options(out=tmp_path / "r")) as run:
        work(run)
    assert (tmp_path / "r/circuit.npy").read_bytes() == b"work"
    assert "an hour of work" in (tmp_path / "r/log.txt").read_text()
    with pytest.raises(UserError, match="holds an unfinished run"):
        Run("spark", None, options(out=tmp_path / "r"))


def test_the_corrected_command_may_have_the_folder_of_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such mixer"), Run("spark", Config(), options(out=tmp_path / "r")):
        raise UserError("no such mixer.")
    with Run("spark", Config(widths=(8,)), options(out=tmp_path / "r")) as run:
        assert not run.resumed
    assert read_config(tmp_path / "r")["config"]["widths"] == [8]


def test_options_that_change_the_weights_are_not_changed_and_others_are_told(tmp_path: Path) -> None:
    with Run("spark", None, options(out=tmp_path / "r", threads=1)):
        pass
    with pytest.raises(UserError, match="with precision '32-true', now it is 'bf16-mixed'"):
        Run("spark", None, options(out=tmp_path / "r", resume=True, threads=1, precision="bf16-mixed"))
    with Run("spark", None, options(out=tmp_path / "r", resume=True, threads=2)):
        pass
    with Run("spark", None, options(out=tmp_path / "r", resume=True, threads=1)):
        pass
    notes = json.loads((tmp_path / "r/report.json").read_text())["notes"]
    assert any("Resumed with threads 2 in place of 1" in note for note in notes)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "isthmus-report", "version": 1}'])
def test_a_damaged_record_does_not_stop_a_resumed_run(tmp_path: Path, content: str) -> None:
    with Run("spark", None, options(out=tmp_path / "r")):
        pass
    (tmp_path / "r/report.json").write_text(content)
    with Run("spark", None, options(out=tmp_path / "r", resume=True)) as run:
        run.metric("accuracy", 1.0)
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["metrics"]["accuracy"]["value"] == 1
    assert "report.json" in report["notes"][0]


@pytest.mark.parametrize("content", ["", "null", '{"name": "spark"}', "[" * 100_000])
def test_a_damaged_config_is_one_sentence_with_the_file(tmp_path: Path, content: str) -> None:
    with Run("spark", None, options(out=tmp_path / "r")):
        pass
    (tmp_path / "r/config.json").write_text(content)
    with pytest.raises(UserError, match=r"r/config\.json"):
        Run("spark", None, options(out=tmp_path / "r", resume=True))


def test_a_resumed_run_records_the_command_that_made_it(tmp_path: Path) -> None:
    with Run("spark", None, options(out=tmp_path / "r"), command="isthmus run spark --lr 2"):
        pass
    with Run("spark", None, options(out=tmp_path / "r", resume=True), command="isthmus run spark --out r"):
        pass
    assert json.loads((tmp_path / "r/report.json").read_text())["command"] == "isthmus run spark --lr 2"


def test_where_another_process_is_gone_the_record_says_so(tmp_path: Path) -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3219")
    run = Run("spark", None, options(out=tmp_path / "r"))
    run.close()  # the first process died
    run.is_first, run.world = False, 2
    with pytest.raises(RunFailed, match="another process of this run ended; go on with: isthmus run spark --resume"):
        run.__exit__(RuntimeError, gone, None)
    report = read(tmp_path / "r")
    assert report["status"] == "failed"
    assert "another process" in report["error"]


def test_a_record_without_its_process_is_interrupted(tmp_path: Path) -> None:
    run = Run("spark", None, options(out=tmp_path / "r"))
    assert read(tmp_path / "r")["status"] == "running"
    run.close()  # as the system does when a process is killed
    assert read(tmp_path / "r")["status"] == "interrupted"
    with Run("spark", None, options(out=tmp_path / "r", resume=True)) as run:
        assert read(tmp_path / "r")["status"] == "running"


def test_resuming_with_other_settings_names_the_difference(tmp_path: Path) -> None:
    with Run("spark", Config(), options(out=tmp_path / "r")):
        pass
    again = {"out": tmp_path / "r", "resume": True}
    with pytest.raises(UserError, match=r"with widths \[16, 32\], now it is \[8\]"):
        Run("spark", Config(widths=(8,)), options(**again))
    with pytest.raises(UserError, match="with name 'spark', now it is 'rotnet'"):
        Run("rotnet", Config(), options(**again))
    with pytest.raises(UserError, match="with seed 0, now it is 1"):
        Run("spark", Config(), options(**again, seed=1))
    with pytest.raises(UserError, match="with max_steps None, now it is 5"):
        Run("spark", Config(), options(**again, max_steps=5))


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Run("spark", None, options(out=tmp_path))
    with pytest.raises(UserError, match="is a file"):
        Run("spark", None, options(out=tmp_path / "photo.jpg"))
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    with pytest.raises(UserError, match="holds no run"):
        read_config(tmp_path)


def test_one_process_works_in_a_folder_at_a_time(tmp_path: Path) -> None:
    run = Run("spark", None, options(out=tmp_path / "r"))
    with pytest.raises(UserError, match=f"process {os.getpid()} is working in"):
        Run("spark", None, options(out=tmp_path / "r", resume=True))
    run.close()
    Run("spark", None, options(out=tmp_path / "r", resume=True)).close()


def test_randomness_depends_on_seed_and_key_alone(tmp_path: Path) -> None:
    def draws(seed: int, *key: int | str) -> list[float]:
        with Run.quick(tmp_path / f"{seed}-{key}-{len(list(tmp_path.iterdir()))}", seed=seed) as run:
            run.seed_everything(*key)
            mine = torch.rand(2, generator=run.generator(*key)).tolist()
            return [*mine, torch.rand(()).item(), float(np.random.rand())]  # noqa: NPY002

    assert draws(0, "a", 1) == draws(0, "a", 1)
    for other in (draws(0, "a", 2), draws(0, "b", 1), draws(1, "a", 1)):
        assert all(x != y for x, y in zip(draws(0, "a", 1), other, strict=True))


def test_devices_that_are_not_there_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has them")
    with pytest.raises(UserError, match="1 devices of kind cuda on 1 nodes cannot be set up here"):
        make_fabric(options(accelerator="cuda"))


def test_counts_of_torchrun_and_slurm_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_by_others() is None
    with monkeypatch.context() as env:
        for name, value in {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}.items():
            env.setenv(name, value)
        assert launched_by_others() == (4, 2)
    with monkeypatch.context() as env:
        for name, value in {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_JOB_NAME": "train"}.items():
            env.setenv(name, value)
        assert launched_by_others() == (2, 3)
        env.setenv("SLURM_JOB_NAME", "bash")
        assert launched_by_others() is None


def test_options_import_no_torch() -> None:
    code = "import sys; from isthmus.engine import RunOptions; RunOptions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
