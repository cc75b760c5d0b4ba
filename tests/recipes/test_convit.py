"""ConViT's recipe: comparisons on few images, locality over training, classifying pictures, published files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.encoders.images.convit import GPSA, ConViT
from isthmus.engine import Run, Training
from isthmus.recipes import _image_classification as shared
from isthmus.recipes import convit
from isthmus.recipes._image_classification import Augmentation
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


def test_apply_classifies_pictures(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    test = load("digits", "test", ("image", "label"))
    paths, labels = [], []
    for i in range(20):
        sample = test[i]
        paths.append(tmp_path / f"{i}.png")
        labels.append(str(int(sample["label"])))
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(paths[-1])
    (tmp_path / "note.txt").write_text("no picture")
    written = convit.apply(trained[0], [*paths, tmp_path / "note.txt"], tmp_path / "out")
    assert len(written) == 21
    assert all(path.stat().st_size for path in written)
    told = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert sum(told[str(p)]["class"] == label for p, label in zip(paths, labels, strict=True)) >= 6, "chance is 2"
    assert max(told[str(paths[0])]["probability"].values()) <= 1
    assert "skipped" in told[str(tmp_path / "note.txt")]
    with pytest.raises(UserError, match="none of the inputs is an image"):
        convit.apply(trained[0], [tmp_path / "note.txt"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((trained[0] / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no network\.safetensors; run the recipe to its end"):
        convit.apply(tmp_path / "empty", paths, tmp_path / "out")


def test_timm_loads_the_network(trained: tuple[Path, dict[str, Any]]) -> None:
    text = next(a["text"] for a in trained[1]["artifacts"] if a["name"] == "network")
    assert "convit_tiny" in text
    call = text.partition(": ")[2].replace(repr(shared.NETWORK), repr(str(trained[0] / shared.NETWORK)))
    network: Any = eval(call, {"timm": timm})
    saved = load_file(trained[0] / shared.NETWORK)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in network.state_dict().items())
    assert sum(isinstance(m, GPSA) for m in ConViT.from_timm(network).modules()) == 1


def test_published_checkpoint_is_converted(tmp_path: Path) -> None:
    network = timm.create_model("convit_tiny", num_classes=3)
    torch.save({"model": network.state_dict(), "epoch": 299}, tmp_path / "convit_tiny.pth")
    out = convit.convert(tmp_path / "convit_tiny.pth", tmp_path / "out.safetensors")
    with safe_open(out, "pt") as file:
        told = file.metadata()
    again = timm.create_model(told["timm"], **json.loads(told["arguments"]), checkpoint_path=str(out))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    for content, message in (
        ({"model": {"head.weight": torch.zeros(3, 9)}}, "fits none of convit_tiny"),
        ({"model": 3}, "holds no network; a checkpoint of ConViT"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match=message):
            convit.convert(tmp_path / "other.pth", tmp_path / "x")
    with pytest.raises(UserError, match="no PyTorch checkpoint that can be read safely"):
        convit.convert(tmp_path / "absent.pth", tmp_path / "x")


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


def test_subsets_of_seeds_do_not_overlap_and_repeat_where_a_batch_needs_more() -> None:
    source = load("digits", "train", ("image", "label"))
    slices = [shared.subset(source, 400, seed, stride=400) for seed in range(3)]
    taken = [{int(sample["index"]) for sample in part.samples(range(400))} for part in slices]
    assert len(set.union(*taken)) == 1200
    few = shared.subset(source, 100, 1, stride=400)
    assert {int(s["index"]) for s in few.samples(range(100))} < taken[1]
    assert len(shared.subset(source, 0.1, 0)) == 126
    assert len(shared.subset(source, 10, 0, at_least=25)) == 25
    for number in (0, 2000):
        with pytest.raises(UserError, match="1257 training images"):
            shared.subset(source, number, 0)


def test_augmented_training_and_classes_without_names(tmp_path: Path) -> None:
    augmented, plain = shared.transforms(16, 10, Augmentation(0.5, 2, True, 0.2, 1.0), smoothing=0.1, crop_pct=0.8)
    batch = {"image": torch.rand(4, 3, 20, 24), "label": torch.arange(4), "index": torch.arange(4)}
    mixed = augmented(dict(batch), torch.Generator().manual_seed(0))
    assert mixed["image"].shape == (4, 3, 16, 16)
    assert mixed["label"].shape == (4, 10)
    assert torch.equal(plain(dict(batch), torch.Generator())["label"], batch["label"])
    digits = load("digits", "train", ("image", "label"))
    digits.classes = None
    assert shared.class_names(digits) == [str(i) for i in range(10)]
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    with pytest.raises(UserError, match="has no labels"):
        shared.class_names(load(f"folder:{tmp_path / 'pictures'}", "train", ("image",)))


def test_descending_numbers_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="ascending"),
        Run.quick(tmp_path, name="convit", config=Config()) as run,
    ):
        convit.run(Config(images=(400, 100)), run)
