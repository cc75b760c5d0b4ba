"""The recipe of LinearScopes: measures, pictures, explaining a person's pictures, a timm model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from isthmus import saved
from isthmus.bounds import check_fields
from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.inputs import Inputs
from isthmus.engine import Run, Training
from isthmus.recipes import linearscope
from isthmus.recipes.linearscope import Config
from isthmus.tasks import applying

BRIEF = Training(steps=3, batch_size=16, optimizer="adam", lr=2e-3)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(width=4, looked_at=12, triplets=3, training=BRIEF, super_resolution=BRIEF)
    with Run.quick(tmp_path_factory.mktemp("scope"), name="linearscope", config=config) as run:
        linearscope.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_measures_exactness_and_what_biases_do(trained_run: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained_run[1]["metrics"].items()}
    assert metrics["fidelity"] < 1e-5
    assert metrics["rows_error"] < 1e-4
    assert metrics["derivative_over_ratio"] > 100
    assert metrics["accuracy_bias_free"] == metrics["accuracy_bias_free_without_r"]
    assert metrics["residual_share_super_resolution"] > 0
    assert {"votes", "filters", "super_resolution", "autoencoder"} <= {f["name"] for f in trained_run[1]["figures"]}


def test_apply_explains_pictures(trained_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    image = load("digits:20", "test")[3]["image"].permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "a.png")
    written = applying.apply(trained_run[0], [tmp_path / "a.png"], tmp_path / "out", linearscope.answer)
    assert [path.name for path in written] == ["answers.json", "a-answer.png"]
    entry = json.loads(written[0].read_text())[str(tmp_path / "a.png")]
    assert entry["logit"] == pytest.approx(entry["from_pixels"] + entry["from_constants"], abs=1e-4)
    assert entry["from_constants"] == pytest.approx(sum(entry["constants_by_layer"].values()), abs=1e-4)


def test_looks_into_a_timm_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=10)
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    config = Config(encoder="resnet10t", checkpoint=str(tmp_path / "mine.safetensors"), size=32, looked_at=2)
    with Run.quick(tmp_path, name="linearscope", config=config) as run:
        linearscope.run(config, run)
    assert json.loads((run.dir / "report.json").read_text())["metrics"]["fidelity_classifier"]["value"] < 1e-5
    assert not run.phases
    assert saved.load(run.dir).inputs == Inputs.of(network, (32, 32))  # as it was trained: mean, deviation, crop
    (tmp_path / "mine.safetensors").unlink()  # the run keeps what apply needs
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    written = applying.apply(run.dir, [tmp_path / "grey.png"], tmp_path / "out", linearscope.answer)
    assert json.loads(written[0].read_text())[str(tmp_path / "grey.png")]["class"] in map(str, range(10))


def test_a_network_of_other_classes_is_looked_into_without_accuracies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3)
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    config = Config(encoder="resnet10t", checkpoint=str(tmp_path / "mine.safetensors"), size=32, looked_at=1)
    with Run.quick(tmp_path, name="linearscope", config=config) as run:
        linearscope.run(config, run)
    report = json.loads((run.dir / "report.json").read_text())
    assert "fidelity_classifier" in report["metrics"]
    assert "accuracy" not in report["metrics"]


def test_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size must be even"):
        linearscope.check(Config(size=7))
    linearscope.check(Config(size=7, encoder="resnet10t"))
    with pytest.raises(UserError, match="give --encoder"):
        linearscope.check(Config(checkpoint="x.pth"))
    wrong: dict[str, Any] = {"gates": "melt", "width": 0, "triplets": 0, "looked_at": -1, "size": -2}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is (one of refuse, freeze|at least [01])"):
            check_fields(Config(**{name: value}))
    with Run.quick(tmp_path, name="linearscope") as run, pytest.raises(UserError, match="there is no checkpoint"):
        linearscope.run(Config(encoder="resnet10t", checkpoint="none.pth"), run)
