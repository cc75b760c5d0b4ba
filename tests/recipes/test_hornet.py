"""HorNet's recipe: orders on noise fields, a classifier to use, published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import isthmus
from isthmus.codec import UserError
from isthmus.data import load
from isthmus.engine import Run, Training
from isthmus.recipes import hornet
from isthmus.recipes.hornet import Config
from isthmus.tasks.classification import Augmentation

SHORT = Training(steps=50, batch_size=8, optimizer="adam", lr=1e-2, final_lr_ratio=0.0, clip=5.0, evaluate_every=25)
CLASSIFY = Training(steps=50, batch_size=32, lr=5e-3, warmup_steps=5, clip=1.0)


def report(run: Run) -> dict[str, Any]:
    return json.loads((run.dir / "report.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(
        fields="fields?channels=4&count=400",
        orders=(0, 1, 2),
        width=16,
        comparison=SHORT,
        dims=(8, 16, 32, 32),
        depths=(1, 1, 1, 1),
        training=CLASSIFY,
    )
    with Run.quick(tmp_path_factory.mktemp("hornet"), name="hornet", config=config) as run:
        hornet.run(config, run)
    return run.dir, report(run)


def test_it_compares_orders_and_trains_a_classifier(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    assert metrics["gain_of_order_2"] == pytest.approx(metrics["r2_order_2"] - metrics["r2_order_1"])
    assert "gain_of_order_3" not in metrics
    assert 0.1 < metrics["r2_order_1"] < 0.6
    assert metrics["accuracy"] > 0.3, "chance is 0.1"
    figures = {figure["name"] for figure in trained[1]["figures"]}
    assert {"terms", "learning", "field", "confusion", "examples"} <= figures
    assert "order_2/evaluate/r2" in json.dumps(trained[1]["curves"])


def test_layers_have_the_parameters_of_the_comparison() -> None:
    counts = [sum(p.numel() for p in hornet.layer(order, 64).parameters()) + 17 * 64 + 65 for order in range(4)]
    assert counts == [18_607, 16_833, 20_545, 21_889]


def test_what_is_explained_is_said_term_by_term() -> None:
    batch = load("fields", "val", ("target", "terms", "mask")).fetch(range(64))
    score, shares = hornet.explained(batch["target"], batch)
    assert score == 1
    assert shares == pytest.approx([1] * 4, abs=0.2)
    half = batch["terms"][:, 0] + 0.5 * batch["terms"][:, 2]
    score, shares = hornet.explained(half, batch)
    assert shares == pytest.approx([1, 0, 0.5, 0], abs=0.2)
    wild = torch.where(batch["mask"].bool(), half, 1e6)
    assert hornet.explained(wild, batch) == (score, shares), "places at the border do not count"
    mean = batch["target"][batch["mask"].bool()].mean().expand_as(half)
    assert hornet.explained(mean, batch)[0] == pytest.approx(0, abs=1e-6)


def test_only_scored_places_are_learnt() -> None:
    loss = hornet._Regression(torch.nn.Identity())
    batch = {"signal": torch.ones(1, 1, 2, 2), "target": torch.tensor([[[3.0, 9], [1, 0]]])}
    batch["mask"] = torch.tensor([[[1, 0], [1, 0]]])
    assert float(loss(batch, torch.Generator()).loss) == 2


def test_any_network_and_filters_are_trained(tmp_path: Path) -> None:
    one = Training(steps=1, batch_size=4, ema=0.5)
    few = "digits?limit=8"
    common = {"data": few, "orders": (), "training": one, "augmentation": Augmentation(repeats=2)}
    for number, config in enumerate(
        (
            Config(**common, encoder="convnext_atto", size=32),
            Config(**common, encoder="vit_tiny_patch16_224", size=32),
            Config(**common, global_filter=True, dims=(8, 8, 16, 32), depths=(1, 1, 1, 1), drop_path=0.1),
        )
    ):
        with Run.quick(tmp_path / str(number), name="hornet", config=config) as run:
            hornet.run(config, run)
        assert set(report(run)["metrics"]) == {"accuracy", "parameters"}
        saved = isthmus.load(run.dir)
        batch = saved.inputs.transform()({"image": torch.rand(1, 3, 20, 30)}, torch.Generator())
        assert saved.model(batch["image"]).shape == (1, 10)


def test_paper_setting_is_the_published_one() -> None:
    config = Config.paper()
    assert (config.training.epochs, config.training.batch_size, config.training.clip) == (300, 4096, 100)
    assert config.training.lr * config.training.final_lr_ratio == pytest.approx(1e-6)
    with torch.device("meta"):
        assert sum(p.numel() for p in hornet._network(config, 1000).parameters()) == 22_409_512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": (1, 1)}, "different numbers from 0 on"),
        ({"orders": (4,), "width": 12}, "width 12 does not divide by 8, as order 4 needs"),
        ({"size": 4}, "4x4 pixels; the last stage of this network needs 8"),
        ({"width": 66}, "width 66 does not divide by 4, as order 3 needs"),
        ({"encoder": "hornet_tiny_8x8"}, "Nearest: hornet_tiny_7x7"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hornet.check(Config(**changes))
