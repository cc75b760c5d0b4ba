"""The command line: what a person types, what comes back, and what is said about a mistake.

Most tests run a recipe of a dozen lines, written into a folder that takes the place of ``isthmus/recipes``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isthmus import catalog, cli, recipes
from isthmus.catalog import Claim, System
from isthmus.cli import claiming
from isthmus.cli.completion import candidates
from isthmus.codec import UserError
from isthmus.engine.guard import Diverged

TOY = '''
"""Toy: measures its own settings, so that tests know what to expect.

More words.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.codec import UserError
from isthmus.engine import Training

needs = ("image",)
TRAINING = Training(steps=3, lr=0.1)


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    """Where pictures come from."""
    gain: float = 5.0
    """What it will measure."""
    widths: tuple[int, ...] = (8, 16)
    """Widths."""
    mode: Literal["plain", "user", "bug", "value", "part", "missing", "disk", "sleep", "silent"] = "plain"
    """What goes wrong."""
    train: Training = TRAINING
    """How it would train."""
    again: Training = TRAINING
    """How it would train again."""

    def __post_init__(self):
        if not self.widths:
            raise ValueError("widths must name at least one width.")

    @classmethod
    def paper(cls):
        return cls(gain=50.0, data="folder:imagenet", train=Training(epochs=7, betas=(0.8, 0.9)))


def run(config, run):
    if config.mode == "user":
        raise UserError("the mask hides everything; lower it.")
    if config.mode == "bug":
        raise RuntimeError("a bug\\n  on two lines")
    if config.mode == "value":
        int("a bug of ours")
    if config.mode == "part":
        from isthmus.layers.gnconv import GlobalLocalFilter
        GlobalLocalFilter(7, (2, 2))
    if config.mode == "missing":
        import shapely_is_not_here  # noqa: F401
    if config.mode == "disk":
        raise OSError(28, "No space left on device", "x.safetensors")
    if config.mode == "sleep":
        run.log("sleeping")
        time.sleep(60)
    if config.mode != "silent":
        run.metric("gain", config.gain + run.seed, published="about 5", unit="points")
    run.note("nothing was trained")
    run.artifact("weights", run.dir / "weights.txt", "for tests")
    (run.dir / "weights.txt").write_text("w")


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in inputs:
        target = out / path.name
        target.write_text(path.read_text() + (run_dir / "weights.txt").read_text())
        written.append(target)
    return written
'''

SYSTEM = System(
    99,
    "toy",
    "A Toy",
    "Nobody",
    2000,
    "lens",
    "Measures itself.",
    claims=(Claim("gain", "It gains four points.", "gain", at_least=4, published="about 5"),),
)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder in which the toy recipe is the only one that is ready."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "toy.py").write_text(textwrap.dedent(TOY))
    everything = (*catalog.systems(), SYSTEM)
    for module in (catalog, catalog.entries):
        monkeypatch.setattr(module, "systems", lambda: everything)
    monkeypatch.setattr(catalog.entries, "RECIPES", folder)
    monkeypatch.setattr(recipes, "__path__", [str(folder)])
    monkeypatch.delenv("ISTHMUS_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("isthmus.recipes.toy", None)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process: exit code, stdout, stderr."""

    def calling(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return calling


QUIET = ("--quiet", "--no-tensorboard", "--accelerator", "cpu")


def toy_run(call: Call, out: str = "runs/toy", *flags: object) -> tuple[int, str, str]:
    return call("run", "toy", "--out", out, *QUIET, *flags)


# ---------------------------------------------------------------------------------------------------- list and show


def test_list_answers_in_a_blink_and_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "isthmus.cli", "list"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begun < 2  # 0.1 s on a quiet machine; tests share theirs
    imported = set(re.findall(r"\|\s+(\S+)$", done.stderr, re.MULTILINE))
    assert "isthmus.cli" in imported
    assert not imported & {"torch", "numpy", "timm", "matplotlib", "tyro", "lightning_fabric"}
    assert "spark" in done.stdout
    assert len(re.findall(r"^\d\d  ", done.stdout, re.MULTILINE)) == 52


def test_list_as_json_has_the_promised_keys(call: Call, toy: Path) -> None:
    code, out, _ = call("list", "--json")
    assert code == 0
    found = json.loads(out)
    assert [system["number"] for system in found] == [*range(1, 53), 99]
    assert all({"number", "name", "title", "part", "ready", "claims"} <= system.keys() for system in found)
    assert found[-1]["ready"] is True
    assert found[-1]["claims"][0] | {"text": ""} == {
        "name": "gain",
        "text": "",
        "metric": "gain",
        "at_least": 4,
        "at_most": None,
        "rule": "mean",
        "published": "about 5",
        "holds": None,
        "measured": None,
    }
    _, out, _ = call("list", "--json", "--ready", "--part", "lens")
    assert [system["name"] for system in json.loads(out)] == ["toy"]


def test_show_tells_settings_and_claims(call: Call, toy: Path) -> None:
    code, out, _ = call("show", "99")
    assert code == 0
    for told in (
        "A Toy",
        "Nobody, 2000",
        "--widths",
        "8 16",
        "50.0",
        "It gains four points.",
        "gain ≥ 4",
        "not yet",
    ):
        assert told in out, told
    _, out, _ = call("show", "toy", "--json")
    found = json.loads(out)
    names = [setting["name"] for setting in found["settings"] if not setting["usual"]]
    assert names[:5] == ["data", "gain", "widths", "mode", "train.steps"]
    assert "again.lr" in names
    assert found["measured"] is None


# ------------------------------------------------------------------------------------------------------------- run


def test_a_run_measures_and_leaves_a_report(call: Call, toy: Path) -> None:
    code, out, err = toy_run(call, "runs/toy", "--gain", 4.5, "--widths", 1, 2, 3)
    assert (code, err) == (0, "")
    assert "4.5 points" in out
    assert "✓" not in out, "the settings are not those of the claims"
    assert "runs/toy/report.html" in out
    record = json.loads((toy / "runs/toy/report.json").read_text())
    assert record["config"] | {"train": {}, "again": {}} == {
        "data": "digits",
        "gain": 4.5,
        "widths": [1, 2, 3],
        "mode": "plain",
        "train": {},
        "again": {},
    }
    assert record["command"].startswith("isthmus run toy --out runs/toy")
    assert record["status"] == "finished"
    assert any("--gain, --widths changed; there are numbers" in note for note in record["notes"])
    assert record["claims"] == []


def test_a_run_needs_no_flag_at_all(call: Call, toy: Path) -> None:
    code, out, _ = call("run", "toy")
    assert code == 0
    assert "✓ It gains four points." in out
    assert "It gains four points." in (toy / "runs/toy-seed0/report.html").read_text()
    assert "runs/toy-seed0/report.html" in out


def test_a_run_prints_its_report_for_scripts(call: Call, toy: Path) -> None:
    code, out, _ = toy_run(call, "runs/toy", "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["gain"]["value"] == 5


def test_your_own_data_and_other_lengths_get_numbers_not_verdicts(call: Call, toy: Path) -> None:
    for number, flags in enumerate((("--data", "folder:mine"), ("--scale", "paper"), ("--max-steps", "1"))):
        assert toy_run(call, f"runs/{number}", *flags)[0] == 0
        record = json.loads((toy / f"runs/{number}/report.json").read_text())
        assert record["claims"] == []
        assert record["metrics"]
        assert any("claims are about" in note for note in record["notes"])


def test_the_paper_scale_takes_the_papers_settings_and_flags_still_count(call: Call, toy: Path) -> None:
    assert toy_run(call, "runs/toy", "--scale=paper", "--data", "digits")[0] == 0
    record = json.loads((toy / "runs/toy/report.json").read_text())
    assert (record["scale"], record["config"]["gain"], record["config"]["data"]) == ("paper", 50.0, "digits")


@pytest.mark.parametrize(
    ("flags", "steps", "epochs"),
    [
        (["--train.epochs", "2.5"], None, 2.5),
        (["--train.steps", "9"], 9, None),
        (["--scale", "paper", "--train.steps=9"], 9, None),
        (["--scale", "paper"], None, 7),
    ],
)
def test_a_length_in_epochs_takes_the_place_of_one_in_steps_and_back(
    call: Call, toy: Path, flags: list[str], steps: int | None, epochs: float | None
) -> None:
    assert toy_run(call, "runs/toy", *flags)[0] == 0
    record = json.loads((toy / "runs/toy/report.json").read_text())
    assert (record["config"]["train"]["steps"], record["config"]["train"]["epochs"]) == (steps, epochs)
    assert (record["config"]["again"]["steps"], record["config"]["again"]["lr"]) == (3, 0.1)


def test_a_warm_up_longer_than_a_shortened_phase_shrinks_with_it(call: Call, toy: Path) -> None:
    recipe = toy / "recipes/toy.py"
    text = recipe.read_text().replace("Training(steps=3, lr=0.1)", "Training(steps=300, lr=0.1, warmup_steps=40)")
    recipe.write_text(text)
    for number, flags, warmup in (
        (0, ["--train.steps", 20], 2),
        (1, ["--train.steps", 50], 40),
        (2, ["--train.steps=20", "--train.warmup-steps=30"], 30),
    ):
        assert toy_run(call, f"runs/{number}", *flags)[0] == 0
        config = json.loads((toy / f"runs/{number}/report.json").read_text())["config"]
        assert (config["train"]["warmup_steps"], config["again"]["warmup_steps"]) == (warmup, 40)


def test_resuming_needs_only_the_folder(call: Call, toy: Path) -> None:
    assert (
        toy_run(call, "runs/toy", "--gain", 7, "--seed", 3, "--scale", "paper", "--widths", 1, "--again.lr", 1)[0] == 0
    )
    code, out, _ = call("run", "toy", "--resume", "--out", "runs/toy")
    assert code == 0
    assert "10 points" in out
    record = json.loads((toy / "runs/toy/report.json").read_text())
    assert (record["seed"], record["scale"], record["config"]["widths"]) == (3, "paper", [1])
    assert (record["config"]["train"]["betas"], record["config"]["again"]["lr"]) == ([0.8, 0.9], 1.0)
    code, _, err = call("run", "toy", "--resume", "--out", "runs/toy", "--gain", 8)
    assert code == 2
    assert "gain" in err
    assert "Traceback" not in err


def test_help_of_a_recipe_lists_its_flags_and_teaches(call: Call, toy: Path) -> None:
    code, out, _ = call("run", "toy", "--help")
    assert code == 0
    for told in (
        "--gain",
        "--max-steps",
        "--scale {laptop,paper}",
        "What it will measure.",
        "isthmus run toy --seed 1",
    ):
        assert told in out, told


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gian", "3"], "there is no flag --gian; nearest: --gain"),
        (["--train.lrr", "3"], "there is no flag --train.lrr; nearest: --train.lr"),
        (["--train.lr", "-3"], "--train.lr is above 0, got -3.0."),
        (["--zzz"], "there is no flag --zzz; `isthmus run toy --help` lists all"),
        (["--gain", "much"], "Error parsing --gain: could not convert string to float: 'much'."),
        (["--gain"], "Missing value for argument '--gain'"),
        (["--widths"], "widths must name at least one width."),
        (["--seed", "-1"], "--seed is at least 0, got -1."),
        (["--scale", "huge"], "--scale is laptop or paper, not 'huge'."),
        (["--mode", "odd"], "invalid choice 'odd' for argument '--mode'"),
        (["--mode", "user"], "the mask hides everything; lower it."),
        (["--mode", "missing"], "this needs the package shapely_is_not_here"),
        (["--mode", "disk"], "No space left on device"),
        (["--mode", "part"], "7 channels have no two halves"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_two(call: Call, toy: Path, flags: list[str], said: str) -> None:
    code, out, err = toy_run(call, "runs/toy", *flags)
    assert code == 2, err
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("isthmus: ")
    assert out == ""


def test_a_mistake_leaves_nothing_in_the_way_of_the_corrected_command(call: Call, toy: Path) -> None:
    assert call("run", "toy", *QUIET, "--mode", "user")[0] == 2
    assert "lower it" in (toy / "runs/toy-seed0/report.html").read_text()
    assert call("run", "toy", *QUIET)[0] == 0
    assert [path.name for path in (toy / "runs").iterdir()] == ["toy-seed0"]
    assert call("run", "toy", "--resume", "--out", "runs/toy-seed0", *QUIET)[0] == 0
    assert (toy / "runs/toy-seed0/report.html").is_file()


def test_a_bug_is_shown_whole_and_leaves_the_run(call: Call, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = toy_run(call, "runs/toy", "--mode", "bug")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("isthmus: RuntimeError: a bug on two lines (a bug of isthmus")
    assert json.loads((toy / "runs/toy/report.json").read_text())["status"] == "failed"
    assert "This run failed. a bug" in (toy / "runs/toy/report.html").read_text()
    monkeypatch.setenv("ISTHMUS_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        toy_run(call, "runs/other", "--mode", "bug")


def test_an_error_that_no_person_made_is_a_bug_even_where_a_value_is_at_fault(call: Call, toy: Path) -> None:
    code, _, err = toy_run(call, "runs/toy", "--mode", "value")
    assert code == 1
    assert "invalid literal for int()" in err
    assert "Traceback" in err


def test_a_recipes_own_check_comes_before_the_folder(call: Call, toy: Path) -> None:
    def check(config: Any) -> None:
        raise UserError("--gain and --widths contradict each other.")

    recipes.load("toy").check = check  # type: ignore[attr-defined]
    assert toy_run(call)[::2] == (2, "isthmus: --gain and --widths contradict each other.\n")
    assert call("claim", "toy")[0] == 2
    assert not (toy / "runs").exists()


def test_settings_that_are_damaged_on_disk_are_named_with_their_file(call: Call, toy: Path) -> None:
    toy_run(call)
    path = toy / "runs/toy/config.json"
    whole = json.loads(path.read_text())
    for changed in (
        {"options": None},
        {"config": {**whole["config"], "train": 5}},
        {"config": {**whole["config"], "train": {"steps": "x"}}},
        {"options": {**whole["options"], "seed": -1}},
    ):
        path.write_text(json.dumps(whole | changed))
        code, _, err = call("run", "toy", "--resume", "--out", "runs/toy")
        assert code == 2, err
        assert "runs/toy/config.json" in err
        assert err.count("\n") == 1


def test_a_divergence_is_a_failed_run_that_names_its_phase(call: Call, toy: Path) -> None:
    def run(config: Any, run: Any) -> None:
        raise Diverged("pretrain: the loss is nan at step 3; this phase has no checkpoint yet.")

    recipes.load("toy").run = run  # type: ignore[attr-defined]
    code, _, err = toy_run(call)
    assert code == 1
    assert err == "isthmus: pretrain: the loss is nan at step 3; this phase has no checkpoint yet.\n"
    assert (toy / "runs/toy/report.json").is_file()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "tyo"], "no system is called 'tyo'. Nearest: toy"),
        (["run", "--seed", "1"], "name the system first"),
        (["run"], "name the system first"),
        (["run", "natra"], "natra has no recipe yet"),
        (["show", "sparc"], "Nearest: spark"),
        (["lst"], "there is no command 'lst'; nearest: list"),
        (["list", "--redy"], "there is no flag --redy; nearest: --ready"),
        (["list", "--part", "lense"], "there is no --part 'lense'; nearest: lens"),
        (["apply", "nowhere", "x"], "nowhere holds no run"),
        (["report", "nowhere"], "there is no nowhere"),
        (["report"], "there are no runs under runs/"),
        (["claim"], "name one system, or give --all"),
        (["claim", "toy", "--seeds", "1", "1"], "--seeds takes different numbers"),
        (["claim", "natra"], "natra has no recipe yet"),
        (["convert", "x.pth"], "there is no checkpoint x.pth"),
        (["convert", "x.pth", "--system", "toy"], "toy has no published checkpoint"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_every_command_explains_its_misuse(call: Call, toy: Path, command: list[str], said: str) -> None:
    code, _, err = call(*command)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_package_of_an_extra_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2.9", "faster-coco-eval>=1.6; extra == 'detection'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    assert cli._missing_package("faster_coco_eval").endswith('pip install "isthmus[detection]".')
    assert cli._missing_package("torch").endswith("pip install torch.")


def test_help_shows_examples_for_every_command(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    for command in ("list", "show", "run", "claim", "apply", "report", "convert", "completion"):
        assert command in out
        code, text, _ = call(command, "--help")
        assert code == 0
        assert f"isthmus {command}" in text.partition("examples")[2]


def wait_for(path: Path, text: str, seconds: float = 300) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if path.is_file() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{text!r} did not appear in {path}")


def test_ctrl_c_leaves_a_resumable_run_and_says_how(toy: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom isthmus import catalog, cli, recipes\n"
        "from isthmus.catalog import System\n"
        "catalog.entries.RECIPES = Path('recipes')\nrecipes.__path__ = ['recipes']\n"
        "toy = System(99, 'toy', 'Toy', 'Nobody', 2000, 'lens', 'It.')\n"
        "catalog.systems = catalog.entries.systems = lambda: (toy,)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    flags = ["--mode", "sleep", "--out", "runs/toy", "--accelerator", "cpu", "--no-tensorboard"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "run", "toy", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            wait_for(toy / "runs/toy/log.txt", "sleeping")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=150)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "isthmus run toy --resume --out runs/toy" in err
    assert "Traceback" not in err
    assert json.loads((toy / "runs/toy/report.json").read_text())["status"] == "interrupted"


# ----------------------------------------------------------------------------------------------------------- claims


@pytest.fixture
def seeds_in_process(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let ``claim`` run its seeds in this process, and note which it ran."""
    launched: list[int] = []

    def launcher(threads: int | None, accelerator: str | None) -> claiming.Launch:
        def launch(system: System, seed: int, folder: Path) -> int:
            launched.append(seed)
            resume = ["--resume"] if (folder / "config.json").is_file() else []
            return cli.main(["run", system.name, "--seed", str(seed), "--out", str(folder), *resume, *QUIET])

        return launch

    monkeypatch.setattr(claiming, "_launcher", launcher)
    return launched


def test_claim_judges_over_seeds_records_and_reuses(call: Call, toy: Path, seeds_in_process: list[int]) -> None:
    code, out, _ = call("claim", "toy", "--seeds", 0, 1, 2)
    assert code == 0
    assert "✓ holds" in out
    assert "6 ± 1" in out
    record = json.loads((toy / "results/claims/toy.json").read_text())
    assert record["format"] == "isthmus-claims"
    assert record["seeds"] == [0, 1, 2]
    assert record["verdicts"][0]["values"] == {"0": 5.0, "1": 6.0, "2": 7.0}
    assert record["verdicts"][0]["holds"] is True
    assert record["metrics"]["gain"] == {
        "values": {"0": 5.0, "1": 6.0, "2": 7.0},
        "mean": 6.0,
        "spread": 1.0,
        "unit": "points",
        "published": "about 5",
    }
    assert {"hardware", "versions", "commit", "config", "date", "seconds"} <= record.keys()
    assert seeds_in_process == [0, 1, 2]
    assert call("claim", "toy", "--seeds", 0, 1, 2, 3)[0] == 0
    assert seeds_in_process == [0, 1, 2, 3]
    _, out, _ = call("list", "--json")
    claims = json.loads(out)[-1]["claims"]
    assert (claims[0]["holds"], claims[0]["measured"]) == (True, 6.5)
    assert "✓" in call("show", "toy")[1]


def test_a_verdict_that_differs_from_the_record_is_told_and_fails(
    call: Call, toy: Path, seeds_in_process: list[int]
) -> None:
    call("claim", "toy", "--seeds", 0)
    recipe = toy / "recipes/toy.py"
    recipe.write_text(recipe.read_text().replace("gain: float = 5.0", "gain: float = 1.0"))
    shutil.rmtree(toy / "recipes/__pycache__", ignore_errors=True)
    sys.modules.pop("isthmus.recipes.toy")
    code, out, _ = call("claim", "toy", "--seeds", 0)
    assert seeds_in_process == [0, 0], "changed settings are measured anew"
    assert code == 1
    assert "recorded holds, now does not hold" in out
    assert call("claim", "toy", "--seeds", 0)[0] == 0, "the new verdict is the recorded one now"


def test_a_failed_or_silent_seed_gives_no_verdict(call: Call, toy: Path, seeds_in_process: list[int]) -> None:
    recipe = toy / "recipes/toy.py"
    text = recipe.read_text()
    for mode, said in (("bug", "ended with exit code 1"), ("silent", "recorded no metric 'gain' with seed 0")):
        recipe.write_text(text.replace('] = "plain"', f'] = "{mode}"'))
        shutil.rmtree(toy / "recipes/__pycache__", ignore_errors=True)
        sys.modules.pop("isthmus.recipes.toy", None)
        code, _, err = call("claim", "toy", "--seeds", 0)
        assert code == 1
        assert said in err
        assert not (toy / "results").exists()


def test_claim_all_measures_every_ready_system(call: Call, toy: Path, seeds_in_process: list[int]) -> None:
    code, out, _ = call("claim", "--all", "--seeds", 4, "--json")
    assert code == 0
    assert [record["system"] for record in json.loads(out[out.index("[\n") :])] == ["toy"]


def test_no_verdict_where_the_data_of_the_claims_are_not_at_hand(
    call: Call, toy: Path, seeds_in_process: list[int]
) -> None:
    recipe = recipes.load("toy")
    recipe.no_verdict = lambda config: "the claims are about real toys, which are not at hand."  # type: ignore[attr-defined]
    assert call("claim", "toy", "--seeds", 0)[::2] == (
        2,
        "isthmus: the claims are about real toys, which are not at hand.\n",
    )
    code, _, err = call("claim", "--all", "--seeds", 0)
    assert code == 0, "nothing failed"
    assert "real toys" in err
    assert not (toy / "results").exists()
    code, out, _ = toy_run(call)
    assert code == 0
    assert "real toys" in out
    assert json.loads((toy / "runs/toy/report.json").read_text())["claims"] == []


# ------------------------------------------------------------------------------------------ apply, report, convert


def test_apply_takes_files_and_folders_and_prints_what_it_wrote(call: Call, toy: Path) -> None:
    toy_run(call)
    (toy / "in").mkdir()
    for name in ("b.txt", "a.txt", ".hidden"):
        (toy / "in" / name).write_text(name)
    (toy / "one.txt").write_text("one")
    code, out, _ = call("apply", "runs/toy", "one.txt", "in")
    assert code == 0
    assert out.split() == [f"runs/toy/applied/{name}" for name in ("one.txt", "a.txt", "b.txt")]
    assert (toy / "runs/toy/applied/one.txt").read_text() == "onew"
    _, out, _ = call("apply", "runs/toy", "one.txt", "--out", "there", "--json")
    assert json.loads(out) == ["there/one.txt"]
    code, _, err = call("apply", "runs/toy", "gone.txt")
    assert (code, err) == (2, "isthmus: there is no file gone.txt.\n")
    config = (toy / "runs/toy/config.json").read_text()
    (toy / "runs/toy/config.json").write_text(config.replace('"lr": 0.1', '"lr": -0.1'))
    code, _, err = call("apply", "runs/toy", "one.txt")
    assert (code, "runs/toy/config.json" in err, "--train.lr is above 0, got -0.1" in err) == (2, True, True)
    (toy / "runs/toy/config.json").write_text(config)
    (toy / "runs/toy/finished.json").unlink()
    code, _, err = call("apply", "runs/toy", "one.txt")
    assert code == 2
    assert "isthmus run toy --resume --out runs/toy" in err


def test_report_finds_runs_and_writes_one_page(call: Call, toy: Path) -> None:
    toy_run(call, "runs/one")
    toy_run(call, "runs/two", "--seed", 1)
    code, out, _ = call("report", "runs/one", "--out", "pages/one.html")
    assert (code, out) == (0, "pages/one.html\n")
    assert call("report", "runs/one")[1] == "runs/one/report.html\n"
    code, out, _ = call("report")
    assert (code, out) == (0, "report.html\n")
    text = (toy / "report.html").read_text()
    assert "one" in text
    assert "two" in text
    assert text.count("<article") == 1


@pytest.fixture
def convertible(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy has published checkpoints, which do not tell how they are scaled; there is one, and a moving average."""
    from isthmus.codec import tables
    from isthmus.codec.published import Published

    def read(found: Any, half: bool = False, shift: float = 0.0) -> Any:
        """Turn a toy checkpoint over.

        Args:
            found: the file.
            half: in half.
            shift: added to it.
        """
        return {"x": found.state["toy.x"] / (2 if half else 1) + shift}

    module = types.ModuleType("isthmus_toy")
    module.PUBLISHED = Published(of="toy", marks=r"^toy\.", make=read)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "isthmus_toy", module)
    monkeypatch.setattr(tables, "PUBLISHED", {"toy": ("isthmus_toy",)})
    torch.save({"model": {"toy.x": torch.ones(1)}, "model_ema": {"toy.x": torch.zeros(1)}}, toy / "official.pth")
    return toy


def test_convert_passes_what_a_file_does_not_tell(call: Call, convertible: Path) -> None:
    def value(name: str) -> float:
        return float(load_file(convertible / name)["x"])

    code, out, err = call("convert", "official.pth", "--system", "toy")
    assert (code, out, value("official.safetensors")) == (0, "official.safetensors\n", 1.0)
    assert "toy: took 'model' of official.pth: 1 tensors; left out model_ema (a moving average)" in err
    code, out, _ = call("convert", "official.pth", "--out", "x", "--half", "--shift", "3")
    assert (code, out, value("x")) == (0, "x\n", 3.5)
    assert call("convert", "official.pth", "--ema", "--out", "y")[0] == 0
    assert value("y") == 0.0
    code, _, err = call("convert", "official.pth", "--system", "toy", "--hlaf")
    assert code == 2
    assert "nearest: --half" in err
    code, out, _ = call("convert", "official.pth", "--system", "toy", "--help")
    assert code == 0
    assert "--shift" in out
    code, _, err = call("convert", "official.pth", "--system", "toy", "--out", "official.pth")
    assert code == 2
    assert "would overwrite" in err
    torch.save({"other.x": torch.ones(1)}, convertible / "other.pth")
    code, _, err = call("convert", "other.pth")
    assert code == 2
    assert "name the system with --system: toy" in err
    code, _, err = call("convert", "other.pth", "--system", "toy")
    assert code == 2
    assert "no published checkpoint of toy: nothing there is named like other.x" in err
    code, _, err = call("convert", "official.pth", "--system", "vae-gan")
    assert code == 2


# ------------------------------------------------------------------------------------------------------- completion


def test_settings_are_shown_as_they_are_typed_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "unireplknet"]) == 0
    shown = capsys.readouterr().out
    settings = shown[shown.index("Settings") :]
    assert "--audio.training.milestones" in settings
    assert "10 15 20 25 30" in settings
    assert not re.search(r"lambda|Training\(|field\(|…/|\('", settings)
    words = settings.split()
    assert any(word.startswith("scenes:32?space=easy&shapes=circle,ring,cross,triangle") for word in words)
    assert cli.main(["show", "inceptionnext"]) == 0
    assert "--training.lr" in capsys.readouterr().out, "what a recipe inherits is its own"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], {"list", "run", "completion"}),
        (["sh"], {"show"}),
        (["run", ""], {"toy"}),
        (["show", "spar"], {"spark"}),
        (["run", "toy", "--ga"], {"--gain"}),
        (["run", "toy", "--train.l"], {"--train.lr", "--train.layer-decay"}),
        (["run", "toy", "--de"], {"--devices", "--deterministic"}),
        (["run", "toy", "--mode", "s"], {"sleep", "silent"}),
        (["run", "toy", "--data", "fo"], {"folder:"}),
        (["run", "toy", "--scale", ""], {"laptop", "paper"}),
        (["list", "--part", "enc"], {"encoder"}),
        (["list", "--js"], {"--json"}),
        (["convert", "x.pth", "--system", ""], {"toy"}),
        (["apply", "runs"], set()),
        (["nonsense", "x"], set()),
    ],
)
def test_words_complete_from_the_catalog_and_the_recipes(toy: Path, words: list[str], expected: set[str]) -> None:
    found = {text for text, _ in candidates(words)}
    assert expected <= found
    assert expected or not found
    assert all(text.startswith(words[-1]) for text in found)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_sound(call: Call, shell: str, tmp_path: Path) -> None:
    code, out, _ = call("completion", shell)
    assert code == 0
    assert "__complete" in out
    if shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(out)
        subprocess.run([shell, "-n", str(script)], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_a_name_through_the_script(call: Call, tmp_path: Path) -> None:
    _, out, _ = call("completion", "bash")
    (tmp_path / "isthmus").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m isthmus.cli "$@"\n')
    (tmp_path / "isthmus").chmod(0o755)
    line = "COMP_WORDS=(isthmus show spar); COMP_CWORD=2; _isthmus; printf '%s\\n' \"${COMPREPLY[@]}\""
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", f"{out}\n{line}"], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.split() == ["spark"]
