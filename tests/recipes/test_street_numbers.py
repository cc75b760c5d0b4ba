"""The recipe of street numbers: measures, the operating point, reading pictures, other sources and encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from isthmus import saved
from isthmus.bounds import check_fields
from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.transforms.numbers import Digits
from isthmus.engine import Run, Training
from isthmus.recipes import street_numbers
from isthmus.recipes.street_numbers import Config
from isthmus.tasks import applying

SMALL: dict[str, Any] = {"images": 120, "test_images": 60, "widths": (6, 8), "strides": (2, 2), "dense": (16,)}
BRIEF = Training(steps=4, batch_size=30, lr=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(**SMALL, training=BRIEF)
    with Run.quick(tmp_path_factory.mktemp("numbers"), name="street-numbers", config=config) as run:
        street_numbers.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_measures_readers_and_their_confidence(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    assert {"accuracy", "accuracy_shallow", "accuracy_eleven", "coverage_at_98", "calibration_error"} <= metrics.keys()
    assert metrics["gain_over_shallow"] == pytest.approx(metrics["accuracy"] - metrics["accuracy_shallow"])
    assert metrics["coverage_at_90"] >= metrics["coverage_at_98"]
    assert {"coverage", "examples"} <= {figure["name"] for figure in trained[1]["figures"]}
    facts = saved.load(trained[0]).facts
    assert facts["accuracy"] == 0.98
    assert facts["threshold"] > 0


def test_apply_reads_pictures_of_any_size(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    image = load("street-numbers:50x90", "test")[3]["image"].permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[:20, :20, 0]).save(tmp_path / "grey.png")
    files = [tmp_path / name for name in ("a.png", "grey.png")]
    written = applying.apply(trained[0], files, tmp_path / "out", street_numbers.answer)
    found = json.loads(written[0].read_text())
    for name in files:
        entry = found[str(name)]
        assert entry["number"] is None or entry["number"].isdigit() or entry["number"] == ""
        assert 0 <= entry["probability"] <= 1
        assert 0 <= entry["calibrated"] <= 1
        assert isinstance(entry["confident"], bool)


def test_takes_boxes_crops_and_a_timm_encoder(tmp_path: Path) -> None:
    config = Config(
        data="street-numbers:40x60",
        encoder="resnet10t",
        size=(32, 32),
        resize=(36, 36),
        boxes=True,
        max_digits=5,
        images=40,
        test_images=20,
        dense=(16,),
        eleven=False,
        training=Training(steps=2, batch_size=10, lr=1e-3),
    )
    with Run.quick(tmp_path, name="street-numbers", config=config) as run:
        street_numbers.run(config, run)
    assert "accuracy" in json.loads((run.dir / "report.json").read_text())["metrics"]
    inputs = saved.load(run.dir).inputs
    assert (inputs.size, inputs.stretched) == ((32, 32), (36, 36))
    squeezed = inputs.transform()({"image": torch.rand(1, 3, 80, 40)}, torch.Generator())["image"]
    assert squeezed.shape == (1, 3, 32, 32)


def test_folders_named_by_numbers_do_as_labels(tmp_path: Path) -> None:
    for name in ("07", "142"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 12)).save(tmp_path / name / "a.png")
    dataset = load(f"folder:{tmp_path}", "all", ("image", "label"))
    batch = Digits(dataset.classes)(dataset.fetch([0, 1]), torch.Generator())
    assert [number.tolist() for number in batch["labels"]] == [[0, 7], [1, 4, 2]]
    with pytest.raises(UserError, match="'cat' is no number"):
        Digits(["cat"])({"label": torch.tensor([0])}, torch.Generator())


def test_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (20, 12)).save(tmp_path / "plain" / "a.png")
    with pytest.raises(UserError, match="--accuracy is above 0 and at most 1"):
        check_fields(Config(accuracy=98))
    with pytest.raises(UserError, match="smaller than the window"):
        street_numbers.check(Config(resize=(64, 8)))
    with pytest.raises(UserError, match="deep"):
        street_numbers.check(Config(strides=(2,)))
    with (
        Run.quick(tmp_path, name="street-numbers") as run,
        pytest.raises(UserError, match="no labels, caption or label"),
    ):
        street_numbers.run(Config(data=f"folder:{tmp_path / 'plain'}"), run)


def test_training_ends_when_patience_does(tmp_path: Path) -> None:
    training = Training(steps=40, batch_size=10, lr=1.0, patience=1, evaluate_every=2)
    config = Config(**SMALL, shallow=False, eleven=False, training=training)
    with Run.quick(tmp_path, name="street-numbers", config=config) as run:
        street_numbers.run(config, run)
    record = json.loads((run.dir / "report.json").read_text())
    assert len(record["curves"]["deep/evaluate/loss"]["x"]) < 20


def test_the_published_boxes_of_svhn_are_left_top_width_height() -> None:
    """The hub's full numbers carry boxes in COCO's form; read as corners they would cut other places out."""
    assert "boxes_format=xywh" in Config.paper().data


def test_an_encoder_of_one_size_is_made_for_the_window(tmp_path: Path) -> None:
    training = Training(steps=1, batch_size=4, lr=1e-3)
    config = Config(**{**SMALL, "images": 8, "test_images": 8}, encoder="vit_tiny_patch16_224", training=training)
    with Run.quick(tmp_path / "run", name="street-numbers", config=config) as run:
        street_numbers.run(config, run)
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    written = applying.apply(run.dir, [tmp_path / "a.png"], tmp_path / "out", street_numbers.answer)
    assert "number" in json.loads(written[0].read_text())[str(tmp_path / "a.png")]
