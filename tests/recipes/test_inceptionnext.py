"""InceptionNeXt's recipe: networks that differ in the mixer, the mixer's cost, classifying, published files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open

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
    with pytest.raises(UserError, match="choose from inception, 7x7, 3x3, identity"):
        inceptionnext.check(Config(mixers=mixers))


def test_paper_setting_is_the_published_network() -> None:
    config = Config.paper()
    with torch.device("meta"):
        network = inceptionnext._network(config, config.mixers[0], 1000)
        assert sum(p.numel() for p in network.parameters()) == 28_055_680
        assert list(network.state_dict()) == list(timm.create_model("inception_next_tiny").state_dict())
    assert sum(isinstance(m, InceptionDWConv2d) for m in network.modules()) == 18


def test_published_checkpoints_are_converted(tmp_path: Path) -> None:
    network = timm.create_model("inception_next_atto", num_classes=3)
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "atto.pth")
    out = inceptionnext.convert(tmp_path / "atto.pth", tmp_path / "atto.safetensors")
    with safe_open(out, "pt") as file:
        assert file.metadata()["timm"] == "inception_next_atto"
    ablation = timm.create_model("convnext_tiny_k3_par1_8", num_classes=3)
    official = {}
    for key, value in ablation.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.fc", "head")
        official[key.replace("head.norm", "norm")] = value
    torch.save({"model": official}, tmp_path / "k3.pth")
    out = inceptionnext.convert(tmp_path / "k3.pth", tmp_path / "k3.safetensors")
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert told["timm"] == "convnext_tiny_k3_par1_8"
    again = timm.create_model(told["timm"], **json.loads(told["arguments"]), checkpoint_path=str(out))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ablation.state_dict().items())
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="fits none of inception_next_atto"):
        inceptionnext.convert(tmp_path / "other.pth", tmp_path / "x")
