"""MetaMixer's recipe: networks that differ in the token mixer, merging, classifying, published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.codec import UserError
from isthmus.engine import Run, Training
from isthmus.recipes import metamixer
from isthmus.recipes.metamixer import Config
from isthmus.tasks import applying


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(
        data="digits:16",
        size=16,
        depths=(1, 1),
        dims=(16, 24),
        mixers=("ffnified", "attention", "pooling"),
        training=Training(steps=60, batch_size=32, lr=4e-3, weight_decay=0.05, warmup_steps=5),
        latency_size=32,
        rounds=1,
        series="series?count=40",
        history=24,
        horizon=12,
        forecasting=Training(steps=3, batch_size=8, lr=1e-3),
        test_images=200,
    )
    with Run.quick(tmp_path_factory.mktemp("metamixer"), name="metamixer", config=config) as run:
        metamixer.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_networks_differ_in_their_mixer(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    assert metrics["accuracy_ffnified"] > 0.5, "chance is 0.1"
    for other in ("attention", "pooling"):
        difference = metrics["accuracy_ffnified"] - metrics[f"accuracy_{other}"]
        assert metrics[f"accuracy_over_{other}"] == pytest.approx(difference)
    assert metrics["merging_error"] < 1e-5
    ratio = metrics["latency_ffnified"] / metrics["latency_attention"]
    assert metrics["latency_ratio_to_attention"] == pytest.approx(ratio)
    assert metrics["forecast_mse"] > 0
    assert {"mixers", "latency", "confusion", "examples", "forecast"} == {
        figure["name"] for figure in trained[1]["figures"]
    }


def test_apply_classifies_pictures_and_forecasts_tables(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The columns may stand in any order among others, in any unit."""
    names = [f"series {i}" for i in range(7)]
    rows = [[str(hour), *(f"{1000 + i + hour % 24}" for i in range(7))] for hour in range(30)]
    (tmp_path / "load.csv").write_text("\n".join(",".join(row) for row in [["hour", *names], *rows]))
    (tmp_path / "short.csv").write_text("a,b\n1,2\n3,4\n")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    inputs = [tmp_path / name for name in ("a.png", "load.csv", "short.csv")]
    written = applying.apply(trained[0], inputs, tmp_path / "out", metamixer.answer)
    found = json.loads(written[0].read_text())
    assert found[str(inputs[0])]["class"] in {str(i) for i in range(10)}
    assert found[str(inputs[1])]["files"] == ["load-answer.png", "load-forecast.csv"]
    forecast = (tmp_path / "out" / "load-forecast.csv").read_text().splitlines()
    assert forecast[0].split(",") == names
    assert len(forecast) == 1 + 12
    assert all(900 < float(cell) < 1100 for line in forecast[1:] for cell in line.split(","))
    reason = "has 2 rows of a, b; the forecaster reads the last 24 of series 0, series 1"
    assert reason in found[str(inputs[2])]["skipped"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(mixers=("ffnified", "mlp")), "no mixer 'mlp'; choose from ffnified, attention, hybrid"),
        (Config(mixers=()), "no mixer to compare; name one in mixers, or a network in encoder"),
        (Config(encoder="metamixer_ffnet_9", data="digits:32"), "timm has no model 'metamixer_ffnet_9'. Nearest"),
        (Config(depths=(1, 1, 1)), "one of each a stage"),
        (Config(mlp_ratio=0), "ratio 0 leaves no channel"),
    ],
)
def test_what_cannot_be_is_refused(config: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        metamixer.check(config)


def test_any_network_of_timm_is_trained_alone(tmp_path: Path) -> None:
    for name in ("metamixer_ffnet_1", "resnet10t", "vit_tiny_patch16_224"):
        config = Config(
            encoder=name,
            data="random:32",
            test_images=8,
            latency_size=64,
            rounds=1,
            drop_path=0.1 if name.startswith("meta") else 0.0,
            training=Training(steps=1, batch_size=4),
        )
        with Run.quick(tmp_path / name, name="metamixer", config=config) as run:
            metamixer.run(config, run)
        metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
        assert {f"accuracy_{name}", f"parameters_{name}", "merging_error"} <= set(metrics)
        assert metrics["merging_error"]["value"] < 1e-5


def test_paper_setting_is_the_published_network() -> None:
    config = Config.paper()
    with torch.device("meta"):
        (make,) = metamixer._makers(config).values()
        assert sum(p.numel() for p in make(1000).parameters()) == 27_208_408
    assert config.training.ema == 0.9995
    assert (config.size, config.training.epochs, config.augmentation.mixup) == (256, 300, 0.2)
