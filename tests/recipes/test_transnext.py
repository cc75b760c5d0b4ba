"""TransNeXt's recipe: its comparisons are fair, its measures mean what they say, and its network is of use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import isthmus
import isthmus.encoders
from isthmus.codec import UserError
from isthmus.encoders.images.aggregated_attention import AggregatedAttention, CosineAttention
from isthmus.encoders.images.attention_halves import PooledAttention, WindowAttention, fix_scale
from isthmus.encoders.images.transnext import TransNeXt
from isthmus.engine import Run, Training
from isthmus.recipes import transnext
from isthmus.recipes.transnext import Config
from isthmus.tasks.classification import DEIT

FEW = Training(steps=2, batch_size=16, lr=2e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(images=32, test_images=24, sizes=(48,), training=FEW)
    with Run.quick(tmp_path_factory.mktemp("transnext"), name="transnext", config=config) as run:
        transnext.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_everything_that_the_claims_are_about_is_measured(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    parts = [metrics["accuracy_window_32"], metrics["accuracy_pooled_32"]]
    assert metrics["gain_over_parts"] == pytest.approx(metrics["accuracy_32"] - max(parts))
    fixed = metrics["accuracy_fixed_scale_32"] - metrics["accuracy_fixed_scale_48"]
    assert metrics["loss_saved_48"] == pytest.approx(fixed - metrics["accuracy_32"] + metrics["accuracy_48"])
    assert (metrics["covered_share"], metrics["window_cells"], metrics["sharpest_in_window"]) == (1, 9, 1)
    assert {"sizes", "sensitivity", "confusion", "examples"} <= {figure["name"] for figure in trained[1]["figures"]}


def test_networks_that_are_compared_have_the_same_number_of_parameters(trained: tuple[Path, dict[str, Any]]) -> None:
    counts = [e["value"] for name, e in trained[1]["metrics"].items() if name.startswith("parameters_")]
    assert len(counts) == 4
    assert max(counts) <= 1.001 * min(counts)


def test_fixed_scale_is_that_of_training_at_every_size() -> None:
    free, fixed = (transnext._network(Config(), 8).eval() for _ in range(2))
    fixed.load_state_dict(free.state_dict())
    fix_scale(fixed, 32)
    counts = [m.fixed_count for m in fixed.modules() if isinstance(m, CosineAttention)]
    assert counts == [9 + 16, 9 + 16, 16, 16]
    grids = free.grids(96, 96)
    assert int(free.stages[0].blocks[0].attn.count(grids[0]).max()) == 9 + 144
    with torch.no_grad():
        x = torch.randn(1, 3, 96, 96)
        assert not torch.allclose(free(x), fixed(x))


@pytest.mark.parametrize("kind", [WindowAttention, PooledAttention])
def test_halves_see_what_their_names_say(kind: type[AggregatedAttention]) -> None:
    torch.manual_seed(0)
    layer, grid = kind(24, 1), transnext._network(Config(), 8).grids(32, 32)[0]
    for parameter in layer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    seen = transnext.sensitivity(layer, torch.randn(2, 16, 16, 24), grid) > 0
    assert int(seen.sum()) == (9 if kind is WindowAttention else 256)
    assert seen[7:10, 7:10].all()


def test_published_setting_takes_a_step(tmp_path: Path) -> None:
    paper = Config.paper()
    assert (paper.training.epochs, paper.training.batch_size, paper.training.lr) == (300, 1024, 1e-3)
    assert paper.training.lr * paper.training.warmup_from == pytest.approx(1e-6)
    assert paper.training.lr * paper.training.final_lr_ratio == pytest.approx(1e-5)
    assert paper.eval_split == "val", "ImageNet's test labels are not public"
    assert paper.augmentation == DEIT
    config = dataclasses.replace(paper, data="scenes?space=easy", size=64, sizes=(), encoder="transnext_micro")
    config = dataclasses.replace(config, images=8, test_images=8, training=dataclasses.replace(FEW, batch_size=8))
    with Run.quick(tmp_path, name="transnext", config=config, max_steps=1) as run:
        transnext.run(config, run)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert "accuracy_64" in metrics
    assert "gain_over_parts" not in metrics
    assert isinstance(isthmus.load(run.dir).model, TransNeXt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"encoder": "resnet18"}, "'resnet18' is no TransNeXt"), ({"pooling": (4, 2)}, "pooling|sr_ratios")],
)
def test_networks_that_cannot_be_built_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        transnext.check(Config(**changes))
