"""InceptionNeXt's recipe: networks that differ in the mixer, the mixer's cost, classifying, published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from isthmus.cli.flags import check
from isthmus.codec import UserError
from isthmus.encoders.images.inceptionnext import InceptionDWConv2d
from isthmus.engine import Run, Training
from isthmus.recipes import inceptionnext
from isthmus.recipes.inceptionnext import Config

SMALL: dict[str, Any] = {"depths": (1, 1), "dims": (16, 24), "mlp_ratios": (2, 2), "rounds": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(
        data="digits:16",
        size=16,
        mixers=("3x3", "inception", "identity"),
        training=Training(steps=150, batch_size=32, lr=4e-3, weight_decay=0.05, warmup_steps=5),
        test_images=200,
        **SMALL,
    )
    with Run.quick(tmp_path_factory.mktemp("inceptionnext"), name="inceptionnext", config=config) as run:
        inceptionnext.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_networks_differ_in_their_mixer(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    assert metrics["accuracy_inception"] > 0.5, "chance is 0.1"
    for other in ("3x3", "identity"):
        difference = metrics["accuracy_inception"] - metrics[f"accuracy_{other}"]
        assert metrics[f"accuracy_over_{other}"] == pytest.approx(difference)
    mixers = {"3x3": (16 + 24) * 10, "inception": (2 + 3) * (10 + 12 + 12), "identity": 0}
    for name, count in mixers.items():
        assert metrics[f"parameters_{name}"] - metrics["parameters_identity"] == count
    assert {"mixers", "confusion", "examples"} == {figure["name"] for figure in trained[1]["figures"]}


def test_costs_are_recorded_beside_the_fastest_and_the_plain_7x7(tmp_path: Path) -> None:
    with Run.quick(tmp_path, name="inceptionnext", config=Config()) as run:
        inceptionnext._costs(run, 1)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    for channels in (96, 192):
        assert metrics[f"cost_ratio_{channels}_channels"]["value"] > 0
        assert metrics[f"cost_ratio_to_plain_conv2d_{channels}_channels"]["value"] > 0


@pytest.mark.parametrize("mixers", [("inception", "5x5"), ()])
def test_unknown_mixers_are_refused(mixers: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="inception, 7x7, 3x3, identity"):
        check(inceptionnext, Config(mixers=mixers))


def test_paper_setting_is_the_published_network() -> None:
    config = Config.paper()
    with torch.device("meta"):
        network = inceptionnext._network(config, config.mixers[0], 1000)
        assert sum(p.numel() for p in network.parameters()) == 28_055_680
        assert list(network.state_dict()) == list(timm.create_model("inception_next_tiny").state_dict())
    assert sum(isinstance(m, InceptionDWConv2d) for m in network.modules()) == 18
