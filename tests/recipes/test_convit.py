"""ConViT's recipe: comparisons on few images, locality over training, classifying pictures, published files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import isthmus
from isthmus.codec import UserError
from isthmus.data.transforms.augmentation import IMAGENET
from isthmus.encoders.images.convit import GPSA, ConViT
from isthmus.engine import Run, Training
from isthmus.recipes import convit
from isthmus.recipes.convit import Config

SHORT = Training(steps=120, batch_size=32, lr=4e-3, weight_decay=0.05, warmup_steps=5, clip=1.0, evaluate_every=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(images=(40, 0.2), depth=2, local=1, training=SHORT)
    with Run.quick(tmp_path_factory.mktemp("convit"), name="convit", config=config) as run:
        convit.run(dataclasses.replace(config, images=(0.02, 200)), run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_compares_both_networks_on_every_number_of_images(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    for number in ("0_02", "200"):
        gain = metrics[f"accuracy_convit_{number}"] - metrics[f"accuracy_vit_{number}"]
        assert metrics[f"gain_{number.replace('_', '.')}_images"] == pytest.approx(gain)
    assert metrics["gain_lost_with_images"] == pytest.approx(metrics["gain_0.02_images"] - metrics["gain_200_images"])
    assert metrics["accuracy_convit_200"] > 0.25, "chance is 0.1"
    assert metrics["offset_share"] > 0.95
    figures = {figure["name"] for figure in trained[1]["figures"]}
    assert {"sample_efficiency", "locality", "gates", "heads", "confusion", "examples"} <= figures


def test_locality_is_followed_from_the_start(trained: tuple[Path, dict[str, Any]]) -> None:
    curves = json.dumps(trained[1]["curves"])
    assert "convit_200/evaluate/distance_0" in curves
    assert "convit_200/evaluate/gate_0" in curves
    assert '"vit_200/evaluate/distance_1' in curves
    assert '"vit_200/evaluate/gate_0' not in curves
    over = convit._over_training({"gate_0": 0.73}, {"evaluate/gate_0": [(30, 0.7), (60, 0.6)]})
    assert over == {"gate_0": [(0.0, 0.73), (30, 0.7), (60, 0.6)]}


@pytest.mark.parametrize("heads", [1, 4, 9, 16])
def test_offsets_are_told_right_and_wrong(heads: int) -> None:
    layer = GPSA(4 * heads, heads)
    assert convit.offset_share(layer) == 1
    if heads > 1:
        layer.pos_proj.weight.data[:, :2] *= -1  # the sign of δ swapped
        assert convit.offset_share(layer) < 0.7


def test_paper_setting_is_the_published_network() -> None:
    config = Config.paper()
    with torch.device("meta"):
        network = convit._network(config, config.local, 1000)
        twin = convit._network(config, 0, 1000)
    assert sum(p.numel() for p in network.parameters()) == 27_777_322
    assert 0 < 27_777_322 - sum(p.numel() for p in twin.parameters()) < 1000, "gates and positions only"


def test_descending_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="ascending"):
        convit.check(Config(images=(400, 100)))


def test_the_kept_network_is_loaded_with_what_it_was_measured_with(trained: tuple[Path, dict[str, Any]]) -> None:
    saved = isthmus.load(trained[0])
    assert isinstance(saved.model, ConViT)
    assert sum(isinstance(module, GPSA) for module in saved.model.modules()) == 1
    assert saved.inputs.mean == Config().mean != IMAGENET[0]
    assert saved.labels == [str(i) for i in range(10)]
