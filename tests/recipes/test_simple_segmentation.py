"""The recipe of fuss-free segmentation: measures, masks of pictures of any size, other data, conversion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import isthmus
from isthmus.bounds import check_fields
from isthmus.codec import Codec, UserError
from isthmus.codec.published import convert
from isthmus.data import load
from isthmus.data.builtin.cues import FAR, cue_scenes
from isthmus.decoders.ffnet_head import released
from isthmus.engine import Run, Training
from isthmus.objectives.segmentation import Segmentation
from isthmus.recipes import simple_segmentation
from isthmus.recipes.simple_segmentation import Config
from isthmus.report.figures import palette
from isthmus.tasks import applying, dense

BRIEF = Training(steps=3, batch_size=4, lr=1e-3)
SMALL: dict[str, Any] = {
    "images": 12,
    "test_images": 6,
    "divisor": 16,
    "training": BRIEF,
    "field": False,
    "cues": False,
}


def _checked(config: Config) -> None:
    check_fields(config)
    simple_segmentation.check(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(**SMALL)
    with Run.quick(tmp_path_factory.mktemp("masks"), name="simple-segmentation", config=config) as run:
        simple_segmentation.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_measures_and_draws(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = trained[1]["metrics"]
    assert 0 <= metrics["miou"]["value"] <= 1
    assert {"classes", "examples"} <= {figure["name"] for figure in trained[1]["figures"]}


def test_apply_masks_pictures_of_any_size(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    image = load("scenes:90", "test")[0]["image"].permute(1, 2, 0).numpy()
    Image.fromarray(image[:70, :53]).save(tmp_path / "a.png")
    written = applying.apply(trained[0], [tmp_path / "a.png"], tmp_path / "out", simple_segmentation.answer)
    assert [path.name for path in written] == ["answers.json", "a-mask.png", "a-overlay.png"]
    entry = json.loads(written[0].read_text())[str(tmp_path / "a.png")]
    mask = np.array(Image.open(written[1]))
    assert mask.shape == (70, 53)
    assert mask.max() < len(entry["classes"]) == len(entry["palette"])
    assert sum(entry["share"].values()) == pytest.approx(1, abs=1e-2)
    assert entry["share"].keys() == {entry["classes"][value] for value in np.unique(mask)}


def test_takes_other_encoders_and_ignores_a_class(tmp_path: Path) -> None:
    config = Config(**{**SMALL, "data": "random:40", "encoder": "resnet10t", "ignore": 3, "size": (40, 40)})
    with Run.quick(tmp_path, name="simple-segmentation", config=config) as run:
        simple_segmentation.run(config, run)
    assert "miou" in json.loads((run.dir / "report.json").read_text())["metrics"]


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_encoders_of_one_size_segment_pictures_of_any(encoder: str, tmp_path: Path) -> None:
    training = Training(steps=1, batch_size=2, lr=1e-3)
    config = Config(**{**SMALL, "images": 4, "test_images": 2, "encoder": encoder, "training": training})
    with Run.quick(tmp_path / "run", name="simple-segmentation", config=config) as run:
        simple_segmentation.run(config, run)
    Image.new("RGB", (71, 33)).save(tmp_path / "a.png")
    written = applying.apply(run.dir, [tmp_path / "a.png"], tmp_path / "out", simple_segmentation.answer)
    with Image.open(written[1]) as mask:
        assert mask.size == (71, 33)


def test_classes_are_named_by_the_source_or_counted_in_every_mask(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    named = isthmus.load(trained[0]).labels
    assert named is not None
    assert named[:2] == ["ground", "circle"]
    masks = [np.zeros((4, 4), np.uint8) for _ in range(300)]
    masks[201][0, 0] = 5  # one pixel of one picture
    pictures = [Image.new("RGB", (4, 4))] * 300
    rows = {"image": pictures, "mask": [Image.fromarray(mask) for mask in masks]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    config = Config(data=f"parquet:{tmp_path}/train.parquet", images=0, test_images=0)
    with Run.quick(tmp_path / "run", name="simple-segmentation", config=config) as run:
        assert dense.open(config, run).names == list("012345")


def test_one_class_is_a_binary_mask() -> None:
    codec = released("ffnet46NS_CCC_mobile", classes=1)
    objective = Segmentation(codec.encoder, codec.decoder)  # type: ignore[arg-type]
    images, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    mask[:, 8:] = 1
    loss = objective.eval()({"image": images, "mask": mask}, torch.Generator())
    assert loss.outputs["logits"].shape == (2, 2, 32, 32)
    single = loss.outputs["logits"][:, 1]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(single, mask.float())
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0, 64)}, "--size is"),
        ({"divisor": 40}, "--divisor must be 1 to 32"),
        ({"smallest": 2.0}, "--smallest is"),
        ({"images": -1}, "--images is at least 0"),
        ({"size": (32, 32), "training": Training(steps=1, batch_size=1)}, "batch norm needs two"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = Config(**{**SMALL, "field": True, **changes})
    if "training" not in changes:
        with pytest.raises(UserError, match=message):
            _checked(config)
        return
    quick = Run.quick(tmp_path, name="simple-segmentation", config=config)
    with quick as run, pytest.raises(UserError, match=message):
        simple_segmentation.run(config, run)
    assert not json.loads((run.dir / "report.json").read_text())["metrics"]


def test_far_cues_are_far_and_classes_follow_them() -> None:
    scenes = cue_scenes(6, 96, 0, "train")
    again = cue_scenes(6, 96, 0, "train")
    assert torch.equal(scenes.data["image"], again.data["image"])  # type: ignore[arg-type]
    for index in range(6):
        sample = scenes[index]
        red = sample["image"][0].float() - sample["image"][2].float()
        places = (red.abs() > 120).nonzero().float()
        centre = places.mean(0)
        assert (red[red.abs() > 120].mean() > 0) == (index % 2 == 0)
        discs = (sample["mask"] > 0).nonzero().float()
        if len(discs):
            assert (discs - centre).norm(dim=1).min() > FAR - 2
            assert sample["mask"].max() == 1 + index % 2
    with pytest.raises(ValueError, match="at least 96"):
        cue_scenes(2, 64, 0, "train")


def test_basic_blocks_see_further(tmp_path: Path) -> None:
    with Run.quick(tmp_path, name="simple-segmentation") as run:
        simple_segmentation._fields(run, size=193, tries=1)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert metrics["field_ratio"]["value"] > 1
    assert metrics["field_parameters_ratio"]["value"] < 1


def test_the_objective_ignores_and_refuses_classes() -> None:
    codec = released("ffnet46NS_CCC_mobile", classes=3)
    objective = Segmentation(codec.encoder, codec.decoder, ignore=9)  # type: ignore[arg-type]
    images, mask = torch.rand(2, 3, 32, 32), torch.full((2, 32, 32), 9)
    mask[:, :4] = 1
    loss = objective({"image": images, "mask": mask}, torch.Generator())
    other = mask.clone()
    other[:, 20:] = 9
    assert torch.isfinite(loss.loss)
    with pytest.raises(ValueError, match="masks hold classes 1 to 7; the decoder has 3"):
        objective({"image": images, "mask": mask.where(mask == 1, 7)}, torch.Generator())
    assert objective({"image": images, "mask": torch.full((2, 32, 32), 9)}, torch.Generator()).loss == 0


def test_published_checkpoints_become_codecs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = released("ffnet46NS_CCC_mobile").eval()
    official: dict[str, torch.Tensor] = {}
    for key, tensor in codec.state_dict().items():
        if key.startswith("encoder.model."):
            parts = key.removeprefix("encoder.model.").split(".")
            bare = f"layer{parts[1]}.{parts[3]}.{'.'.join(parts[4:])}" if "blocks" in key else ".".join(parts[-2:])
            official[f"backbone_model.{bare}"] = tensor
            continue
        parts = key.removeprefix("decoder.").split(".")
        if parts[0] == "last":
            official[f"head.layers.3.last_layer.{'.'.join(parts[1:])}"] = tensor
        elif parts[1] == "adapters":
            official[f"head.layers.0.adapter_conv.{parts[2]}.layers.{'.'.join(parts[3:])}"] = tensor
        else:
            level = (4, 8, 16, 32)[int(parts[2]) + (parts[1] == "up")]
            tail = "_up" if parts[1] == "up" else ("" if level == 4 else "_sm")
            official[f"head.layers.1.fam_{level}{tail}.layers.{'.'.join(parts[3:])}"] = tensor
    torch.save(official, tmp_path / "ffnet46NS_CCC_cityscapes_state_dict_quarts.pth")
    path = tmp_path / "ffnet46NS_CCC_cityscapes_state_dict_quarts.pth"
    made = convert(path, tmp_path / "out.safetensors", name="ffnet46NS_CCC_mobile")
    images = torch.rand(1, 3, 64, 96)
    assert torch.equal(Codec.from_pretrained(made)(images).prediction, codec(images).prediction)
    with pytest.raises(UserError, match="does not fit ffnet46NS_CBB_mobile"):
        convert(path, tmp_path / "other", name="ffnet46NS_CBB_mobile")


def test_overlap_counts_pixels_and_leaves_out_classes_that_no_mask_holds() -> None:
    table = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    found = dense.overlap(table)
    assert found.each[:2] == pytest.approx([6 / 9, 3 / 6])
    assert np.isnan(found.each[2])
    assert found.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert found.pixel_accuracy == 9 / 12


def test_the_moving_average_is_what_is_measured_and_kept(tmp_path: Path) -> None:
    config = Config(**{**SMALL, "training": dataclasses.replace(BRIEF, ema=0.5)})
    with Run.quick(tmp_path, name="simple-segmentation", config=config) as run:
        simple_segmentation.run(config, run)
    averaged = torch.load(run.dir / "checkpoints" / "segmenter.result.pt", weights_only=True)["ema"]
    weights = isthmus.load(run.dir).model.state_dict()
    assert all(torch.equal(averaged[name], tensor) for name, tensor in weights.items() if name in averaged)
    assert averaged.keys() & weights.keys()


def test_colours_of_classes_differ() -> None:
    colours = palette(60)
    assert colours[0] == [0, 0, 0]
    assert len({tuple(colour) for colour in colours}) == 60
