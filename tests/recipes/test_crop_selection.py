"""The recipe of crop selection: measures, pictures, a person's own network, and pictures of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import isthmus
from isthmus.codec import UserError
from isthmus.data import Memory, evaluation_batches, load
from isthmus.encoders.images.patch_net import PatchNet
from isthmus.engine import Run, Training
from isthmus.recipes import crop_selection
from isthmus.recipes.crop_selection import Config
from isthmus.robustness.shifts import EIGHT, view
from isthmus.tasks import applying, selected_crops

SMALL = {"view": 30, "crop": 16, "middle_crop": 20, "wide_crop": 24, "data": "textures:32", "test_images": 24}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config = Config(**SMALL, images=60, training=Training(steps=3, batch_size=20, lr=1e-3))
    with Run.quick(tmp_path_factory.mktemp("crops"), name="crop-selection", config=config) as run:
        crop_selection.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_measures_every_way_to_answer(trained_run: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained_run[1]["metrics"].items()}
    for way in ("centre", "selected", "selected_wide", "selected_by_mean", "averaged", "antialiased"):
        assert {f"accuracy_{way}", f"flips_{way}", f"fooled_{way}"} <= metrics.keys()
        assert 0 <= metrics[f"flips_{way}"] <= metrics[f"fooled_{way}"] <= 1
    assert metrics["cyclic_flips_selected"] == 0.0
    assert metrics["accuracy_lost"] == pytest.approx(metrics["accuracy_centre"] - metrics["accuracy_selected"])
    assert {"pareto", "theory", "views"} <= {figure["name"] for figure in trained_run[1]["figures"]}


def test_apply_says_where_the_crop_is(trained_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    image = load("textures:40", "test")[3]["image"].permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[:10, :10]).save(tmp_path / "small.png")
    files = [tmp_path / name for name in ("a.png", "small.png")]
    written = applying.apply(trained_run[0], files, tmp_path / "out", crop_selection.answer)
    assert [path.name for path in written] == ["answers.json", "a-answer.png"]
    found = json.loads(written[0].read_text())
    assert 0 <= found[str(files[0])]["crop"]["top"] <= 24
    assert isinstance(found[str(files[0])]["stable"], bool)
    assert "smaller than the crop" in found[str(files[1])]["skipped"]


def test_a_photograph_is_seen_as_the_run_sees_it(trained_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pixels = torch.nn.functional.interpolate(load("textures:64", "test")[5]["image"][None].float(), (96, 160)).byte()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    written = applying.apply(trained_run[0], [tmp_path / "photo.png"], tmp_path / "out", crop_selection.answer)
    found = json.loads(written[0].read_text())[str(tmp_path / "photo.png")]
    config = Config(**SMALL)
    data = Memory("photo", {"image": pixels})
    prepared = next(evaluation_batches(data, 1, transform=selected_crops.source(config.view)))["image"]
    assert prepared.shape == (1, 3, 32, 32)
    robust = crop_selection._selecting(config, isthmus.load(trained_run[0]).model, 16)
    with torch.no_grad():
        logits = [robust(view(prepared, 30, shift))[0] for shift in ((0, 0), *EIGHT)]
    assert found["probability"] == pytest.approx(float(logits[0].softmax(0).max()), abs=1e-4)
    assert found["stable"] == (len({int(each.argmax()) for each in logits}) == 1)
    top, left = robust.select(view(prepared, 30)).offset[0].tolist()
    assert found["crop"] == {"top": 3 * (top + 1), "left": 32 + 3 * (left + 1), "size": 48}, "in pixels of the picture"


def test_takes_a_persons_own_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=8).state_dict(), tmp_path / "mine.safetensors")
    config = Config(**SMALL, encoder="resnet10t", checkpoint=str(tmp_path / "mine.safetensors"), size=32)
    with Run.quick(tmp_path, name="crop-selection", config=config) as run:
        crop_selection.run(config, run)
    report = json.loads((run.dir / "report.json").read_text())
    assert not run.phases, "nothing is trained"
    assert "fooled_selected" in report["metrics"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "x.pth"}, "give --encoder"),
        ({"crop": 40}, "must lie below --view 30"),
        ({"crop": 29}, "two pixels more"),
        ({"encoder": "vit_tiny_patch16_224"}, r"does not take pictures of 16×16 pixels .* give --size"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        crop_selection.check(Config(**{**SMALL, **changes}))


def test_a_network_of_other_classes_is_refused_and_pixels_are_normalised_as_it_wants(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "mine.safetensors")
    config = Config(**SMALL, encoder="resnet10t", checkpoint=str(tmp_path / "mine.safetensors"), size=32)
    with (
        Run.quick(tmp_path, name="crop-selection", config=config) as run,
        pytest.raises(UserError, match="is for 3 classes"),
    ):
        crop_selection.run(config, run)
    half = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert crop_selection._selecting(config, half, 16).mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert crop_selection._inputs(config, PatchNet(2)).mean == (0.485, 0.456, 0.406)


def test_the_twin_has_as_many_parameters() -> None:
    plain, twin = PatchNet(8), PatchNet(8, antialiased=True)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in twin.parameters())
    assert plain(torch.rand(2, 3, 48, 48)).shape == twin(torch.rand(2, 3, 48, 48)).shape == (2, 8)
