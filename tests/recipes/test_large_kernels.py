"""The large-kernel recipe: fields of trained networks, shape against texture, use on pictures, published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.encoders.images.unireplknet import UniRepLKNet
from isthmus.engine import Run, Training
from isthmus.recipes import large_kernels
from isthmus.recipes.large_kernels import Config
from isthmus.tasks import shape_bias

SHORT = Training(steps=60, batch_size=32, lr=8e-3, weight_decay=0.05, warmup_steps=5)
TINY = Config(
    data="digits:16",
    networks=("large", "twin"),
    size=16,
    widths=(8, 16, 16, 24),
    training=SHORT,
    field_data="digits:64",
    field_size=64,
    field_images=3,
    cue_images=32,
    cue_training=Training(steps=2, batch_size=16),
    test_images=150,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with Run.quick(tmp_path_factory.mktemp("large_kernels"), name="large-kernels", config=TINY) as run:
        large_kernels.run(TINY, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_fields_accuracy_and_cues_are_compared(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    assert metrics["accuracy_large"] > 0.25, "chance is 0.1"
    assert metrics["accuracy_over_small_kernels"] == pytest.approx(metrics["accuracy_large"] - metrics["accuracy_twin"])
    for scale in ("raw", "relative"):
        ratio = metrics[f"{scale}_area_large"] / metrics[f"{scale}_area_twin"]
        assert metrics[f"{scale}_area_over_twin"] == pytest.approx(ratio)
    assert metrics["shape_bias_gain"] == pytest.approx(metrics["shape_bias_large"] - metrics["shape_bias_twin"])
    assert metrics["merge_gap"] < 1e-4
    figures = {figure["name"] for figure in trained[1]["figures"]}
    assert {"fields", "shares", "accuracies", "confusion", "examples", "cues"} == figures


def test_the_sheets_networks_have_its_parameters() -> None:
    counts = {"large": 179_900, "twin": 139_132, "deep": 229_664}
    for name, count in counts.items():
        network = large_kernels.make_network(Config(), name, 8)
        assert sum(p.numel() for p in network.parameters()) == count


def test_shape_and_texture_agree_in_training_and_never_where_the_bias_is_measured() -> None:
    for agree in (True, False):
        drawn = shape_bias.cues(16, "test", 0, agree, 200)
        batch = drawn.fetch(range(200))
        fill = batch["factors"][:, drawn.factor_names.index("fill")]
        assert bool(((fill == batch["label"]) == agree).all())
        assert len(set(fill.tolist())) == len(set(batch["label"].tolist())) == 4


class Oracle(nn.Module):
    """Goes by the shape of even pictures, by the texture of odd ones, by neither of every fifth."""

    def __init__(self, drawn: Any) -> None:
        super().__init__()
        batch = drawn.fetch(range(len(drawn)))
        fill = batch["factors"][:, drawn.factor_names.index("fill")]
        decided = torch.where(torch.arange(len(drawn)) % 2 == 0, batch["label"], fill)
        both = torch.stack([batch["label"], fill], 1)
        neither = torch.tensor([next(c for c in range(4) if c not in row) for row in both.tolist()])
        self.decided = torch.where(torch.arange(len(drawn)) % 5 == 0, neither, decided)
        self.place = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decided = self.decided[self.place : self.place + len(x)]
        self.place += len(x)
        return nn.functional.one_hot(decided, 4).float()


def test_shape_bias_is_the_share_among_decisions_for_either(tmp_path: Path) -> None:
    drawn = shape_bias.cues(16, "test", 0, False, 300)
    with Run.quick(tmp_path) as run:
        predicted, shape, fill = shape_bias._decisions(run, Oracle(drawn), drawn, None)
    assert shape_bias.shape_bias(predicted, shape, fill) == pytest.approx((0.5, 0.8))
    assert shape_bias.shape_bias(predicted, predicted, fill) == pytest.approx((1.0, 1.0), abs=1)
    nothing = torch.full_like(predicted, 9)
    assert shape_bias.shape_bias(nothing, shape, fill) == (0.0, 0.0)


def test_apply_classifies_pictures_and_measures_the_field_on_them(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    test = load("digits:16", "test", ("image", "label"))
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(test[i]["image"].permute(1, 2, 0).numpy()).resize((20 + i, 16)).save(paths[-1])
    (tmp_path / "note.txt").write_text("no picture")
    written = large_kernels.apply(trained[0], [*paths, tmp_path / "note.txt"], tmp_path / "out")
    assert {path.name for path in written} >= {"answers.json", "field.json", "field.png"}
    assert all(path.stat().st_size for path in written)
    found = json.loads((tmp_path / "out" / "field.json").read_text())
    assert found["images"] == 3
    assert 0 < found["raw"]["0.5"]["share_of_picture"] <= 1
    assert found["raw"]["0.2"]["side"] <= found["raw"]["0.5"]["side"]
    with pytest.raises(UserError, match="none of the inputs can be used"):
        large_kernels.apply(trained[0], [tmp_path / "note.txt"], tmp_path / "out")


def test_networks_of_timm_are_measured_as_they_are(tmp_path: Path) -> None:
    config = Config(
        networks=("resnet10t", "vit_tiny_patch16_224"),
        weights="random",
        size=64,
        field_data="digits:32",
        field_size=96,
        field_images=2,
    )
    with Run.quick(tmp_path, name="large-kernels", config=config) as run:
        large_kernels.run(config, run)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert metrics["rms_radius_vit_tiny_patch16_224"]["value"] > 0
    assert not any("accuracy" in name for name in metrics)
    with pytest.raises(UserError, match="trained none"):
        large_kernels.apply(run.dir, [], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": ()}, "at least one"),
        ({"networks": ("large", "large")}, "different names"),
        ({"networks": ("large", "repleknet_31b")}, "timm has no model 'repleknet_31b'. Nearest: replknet"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        large_kernels.check(Config(**change))


def test_published_settings() -> None:
    config = Config.paper()
    with torch.device("meta"):
        network = large_kernels.make_network(config, "replknet_31b", 1000)
        small = large_kernels.make_network(config, "replknet_13b", 1000)
    assert sum(p.numel() for p in network.parameters()) == 79_864_168
    assert {m.kernel_size for m in small.modules() if isinstance(m, nn.Conv2d)} == {
        (1, 1), (3, 3), (5, 5), (13, 13)
    }  # fmt: skip
    assert isinstance(large_kernels.make_network(Config(), "large", 8), UniRepLKNet)
