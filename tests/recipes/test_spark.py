"""The recipe of SparK from pictures to a checkpoint that timm loads, at the smallest size."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import isthmus
from isthmus.bounds import check_fields
from isthmus.codec import UserError
from isthmus.codec.published import convert
from isthmus.decoders.spark_unet import SparKUNet
from isthmus.encoders.backbone import Backbone, reductions_within
from isthmus.engine.run import Run
from isthmus.engine.training import Training
from isthmus.objectives import spark as official
from isthmus.objectives import spark_files
from isthmus.objectives.spark import SparK
from isthmus.recipes import spark
from isthmus.recipes.spark import Config
from isthmus.tasks import applying, pretraining

TINY = Config(
    data="photos:64?count=48&include=chelsea,coffee",
    encoder="test_resnet",
    width=32,
    pretrain=Training(steps=2, batch_size=4, lr=1e-3),
    finetune=Training(steps=2, batch_size=4, lr=1e-3, layer_decay=0.7),
    labels_per_class=3,
)


def _run(config: Config, folder: Path, **options) -> Path:
    check_fields(config)
    spark.check(config)
    with Run.quick(folder, name="spark", config=config, **options) as run:
        spark.run(config, run)
    return run.dir


def _record(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with everything that the claims compare; the speed is measured on a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spark, "_speed", functools.partial(spark._speed, name="test_resnet", size=96))
        config = dataclasses.replace(TINY, comparisons="on")
        return _run(config, tmp_path_factory.mktemp("spark"))


def _picture(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    pixels = torch.rand(height // 8, width // 8, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.mul(255).byte().numpy()).resize(size).save(path)


def _flat_folder(path: Path, count: int = 14) -> Path:
    path.mkdir()
    for number in range(count):
        _picture(path / f"{number:02}.jpg", (96 + 8 * number, 80))
    return path


# ------------------------------------------------------------------------------------------------------ a whole run


def test_it_measures_what_the_claims_ask_for(finished: Path) -> None:
    metrics = {name: metric["value"] for name, metric in _record(finished)["metrics"].items()}
    assert metrics["leak"] == 0
    assert metrics["tile_error"] < 1e-5
    assert metrics["filled_excess"] <= 0
    assert metrics["filled_dense"] > 0.5
    gain = 1 - metrics["heldout_loss"] / metrics["heldout_loss_coarsest"]
    assert metrics["hierarchy_gain"] == pytest.approx(gain, abs=1e-6)
    assert metrics["tile_speedup"] > 0
    assert {"accuracy_spark", "accuracy_scratch", "accuracy_zeroed"} <= metrics.keys()


def test_the_encoder_is_a_checkpoint_that_timm_loads(finished: Path) -> None:
    kept = isthmus.load(finished)
    objective = kept.model
    assert kept.inputs.size == (64, 64)
    line = next(
        a["text"] for a in json.loads((finished / "report.json").read_text())["artifacts"] if a["name"] == "encoder"
    )
    trunk = {n: t for n, t in objective.encoder.model.state_dict().items() if not n.startswith("fc.")}
    for classes in (10, 3, 0):
        call = line.partition(": ")[2].replace("num_classes=10", f"num_classes={classes}")
        loaded = eval(call, {"timm": timm})
        assert loaded.num_classes == classes
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in trunk.items())
    timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(finished / "encoder.safetensors"))
    timm.create_model(
        "test_resnet", num_classes=2, checkpoint_path=str(finished / "kept" / "classifier" / "model.safetensors")
    )


def test_it_draws_reconstructions(finished: Path) -> None:
    assert (finished / "figures" / "reconstructions.png").is_file()


def test_the_fine_tuned_network_is_kept_with_what_it_is_fed(finished: Path) -> None:
    kept = isthmus.load(finished / "kept" / "classifier")
    assert kept.labels is not None
    assert len(kept.labels) == kept.model.num_classes == 2
    assert kept.inputs.mean == (0.5, 0.5, 0.5), "as this network's own configuration says"


def test_it_hides_parts_of_pictures_of_any_shape_and_predicts_them(finished: Path, tmp_path: Path) -> None:
    _picture(tmp_path / "wide.jpg", (200, 100))
    _picture(tmp_path / "tall.png", (64, 160))
    inputs = [tmp_path / name for name in ("wide.jpg", "tall.png")]
    answers, *written = applying.apply(finished, inputs, tmp_path / "out", spark.answer)
    assert [path.name for path in written] == ["wide-spark.png", "tall-spark.png"]
    for path, shape in zip(written, ((3 * 128 + 2 * 4, 64), (3 * 64 + 2 * 4, 160)), strict=True):
        with Image.open(path) as picture:
            assert picture.size == shape
    found = json.loads(answers.read_text())[str(inputs[0])]
    assert found["patch"] == 16
    assert found["loss_of_patch_variance"] > 0
    again = applying.apply(finished, inputs[:1], tmp_path / "again", spark.answer)
    assert again[1].read_bytes() == written[0].read_bytes()


def test_it_goes_on_from_the_encoder_of_another_run(finished: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, init=str(finished / "encoder.safetensors"), comparisons="off")
    with Run.quick(tmp_path) as run:
        started = spark._objective(config, pretraining.open(config, run), (4, 8, 16))
    before = isthmus.load(finished).model
    for name, tensor in before.encoder.model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(started.encoder.model.state_dict()[name], tensor)


def test_resuming_a_finished_run_repeats_nothing(finished: Path) -> None:
    before = _record(finished)["metrics"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spark, "_speed", lambda run: None)
        config = dataclasses.replace(TINY, comparisons="on")
        _run(config, finished.parent, resume=True)
    after = _record(finished)["metrics"]
    for name in ("heldout_loss", "heldout_loss_coarsest", "accuracy_spark", "accuracy_zeroed"):
        assert after[name]["value"] == before[name]["value"]


def test_a_folder_of_pictures_without_labels_is_pretrained_and_nothing_else(tmp_path: Path) -> None:
    folder = _flat_folder(tmp_path / "pictures")
    (folder / "05.jpg").write_bytes((folder / "05.jpg").read_bytes()[:200])
    config = dataclasses.replace(TINY, data=f"folder:{folder}", size=64)
    run_dir = _run(config, tmp_path)
    record = _record(run_dir)
    assert (run_dir / "encoder.safetensors").is_file()
    assert not [name for name in record["metrics"] if name.startswith("accuracy")]
    assert any("no labels" in note for note in record["notes"])


def test_unreadable_pictures_are_counted_and_named(tmp_path: Path) -> None:
    folder = _flat_folder(tmp_path / "pictures", 12)
    for number in range(12):
        if number % 2:
            (folder / f"{number:02}.jpg").write_bytes(b"not a picture")
    config = dataclasses.replace(TINY, data=f"folder:{folder}", size=64)
    notes = _record(_run(config, tmp_path))["notes"]
    assert any("samples could not be read and were left out" in note and "01.jpg" in note for note in notes)


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("size", "levels"), [(224, (4, 8, 16, 32)), (128, (4, 8, 16, 32)), (64, (4, 8, 16)), (32, (4, 8))]
)
def test_scales_leave_four_patches_a_side(size: int, levels: tuple[int, ...]) -> None:
    assert reductions_within(TINY.encoder, size) == levels


def test_images_without_room_for_patches_are_refused() -> None:
    with pytest.raises(UserError, match=r"images of 8 pixels.*--size 16"):
        reductions_within(TINY.encoder, 8)


def test_paper_settings_are_the_published_ones(tmp_path: Path) -> None:
    paper = Config.paper()
    assert paper.pretrain.lr == pytest.approx(3.2e-3)
    assert (paper.pretrain.weight_decay, paper.pretrain.weight_decay_end) == (0.04, 0.2)
    assert (paper.pretrain.warmup_from, paper.pretrain.final_lr_ratio) == (0.005, 0.001)
    with Run.quick(tmp_path) as run:
        task = pretraining.open(dataclasses.replace(TINY, size=224), run)
        objective = spark._objective(paper, task, reductions_within(paper.encoder, 224))
    assert objective.patch == 32
    head = sum(p.numel() for p in objective.encoder.model.fc.parameters())
    assert sum(p.numel() for p in objective.parameters()) - head == 52_921_835


def test_a_few_steps_of_the_published_setting_are_a_tryout_in_small_batches(tmp_path: Path) -> None:
    large = dataclasses.replace(Config.paper().pretrain, batch_size=4096)
    config = dataclasses.replace(TINY, pretrain=large, finetune=Config.paper().finetune, comparisons="off")
    metrics = _record(_run(config, tmp_path, max_steps=1))["metrics"]
    assert {"heldout_loss", "accuracy_spark", "accuracy_scratch"} <= metrics.keys()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder": "resnet5O"}, "timm has no model 'resnet5O'. Nearest"),
        ({"encoder": "vit_tiny_patch16_224", "levels": (16,), "size": 224}, "no sparse form"),
        ({"ratio": 1.5}, "--ratio is"),
        ({"ratio": 0.99}, "at least one has to be visible and one hidden"),
        ({"size": 72}, "whole number of 16-pixel patches"),
        ({"levels": (4, 64)}, "has levels of reduction"),
        ({"width": 30}, "has to be a multiple of 4"),
        ({"init": "missing.pth"}, "there is no file missing.pth"),
        ({"data": "folder:missing"}, "missing"),
        ({"data": "photo:64"}, "Nearest: photos"),
    ],
)
def test_mistakes_are_told_before_training(changes: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=sentence):
        _run(dataclasses.replace(TINY, **changes), tmp_path)
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.suffix == ".safetensors"]
    assert not left


# --------------------------------------------------------------------------------------------- published checkpoints


def _published(tmp_path: Path) -> tuple[SparK, dict]:
    torch.manual_seed(1)
    encoder = Backbone("test_resnet")
    objective = SparK(encoder, SparKUNet(encoder.feature_info, 64), ratio=0.75).eval()
    for module in objective.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    state = official.to_official(objective.state_dict())
    config = {"mask_ratio": 0.75, "sbn": True, "sparse_encoder.input_size": 96, "dense_decoder.width": 64}
    torch.save({"module": {**state, "imn_m": torch.zeros(1, 3, 1, 1), "config": config}}, tmp_path / "full.pth")
    trunk = {n.removeprefix("sparse_encoder.sp_cnn."): t for n, t in state.items() if "sp_cnn" in n}
    torch.save({"module": trunk}, tmp_path / "backbone.pth")
    return objective, trunk


def test_published_files_are_converted_both_ways(tmp_path: Path) -> None:
    objective, trunk = _published(tmp_path)
    convert(tmp_path / "full.pth", tmp_path / "spark.safetensors", "spark", encoder="test_resnet")
    again, size = spark_files.load_pretrained(tmp_path)
    assert (size, again.ratio) == (96, 0.75)
    image, visible = torch.rand(1, 3, 96, 96), torch.eye(3, dtype=torch.bool)[None]
    with torch.no_grad():
        assert torch.equal(again.predict(image, visible), objective.predict(image, visible))

    convert(tmp_path / "spark.safetensors", tmp_path / "back.pth", "spark")
    first, back = (torch.load(tmp_path / name, weights_only=True)["module"] for name in ("full.pth", "back.pth"))
    assert back.pop("config")["mask_ratio"] == 0.75
    assert back["norm_black"].shape == (1, 3, 96, 96)
    first.pop("config")
    assert all(torch.equal(first[name], back[name]) for name in first if name != "imn_m")

    convert(tmp_path / "backbone.pth", tmp_path / "encoder.safetensors", "spark", encoder="test_resnet")
    path = str(tmp_path / "encoder.safetensors")
    loaded = timm.create_model("test_resnet", checkpoint_path=path, num_classes=0).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trunk.items())


def test_what_a_run_keeps_is_written_in_the_published_form(finished: Path, tmp_path: Path) -> None:
    convert(finished / "kept" / "spark" / "model.safetensors", tmp_path / "back.pth", "spark")
    config = torch.load(tmp_path / "back.pth", weights_only=True)["module"]["config"]
    assert (config["mask_ratio"], config["sparse_encoder.input_size"]) == (0.6, 64)


@pytest.mark.parametrize("name", ["resnet101", "convnext_small"])
def test_published_encoders_are_recognised_by_their_shapes(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    published = official.backbone_to_official({n: t for n, t in state.items() if not n.startswith(("fc.", "head."))})
    assert spark_files.guess_encoder(official.backbone_from_official(published), Path("x.pth")) == name


def test_damaged_and_foreign_files_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    _published(tmp_path)
    (tmp_path / "short.pth").write_bytes((tmp_path / "full.pth").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    out = tmp_path / "out.safetensors"
    for name, sentence in {
        "short.pth": "cut short",
        "list.pth": "holds no network",
        "foreign.pth": "no published SparK encoder",
        "absent.pth": "there is no checkpoint",
    }.items():
        with pytest.raises(UserError, match=sentence):
            convert(tmp_path / name, out, "spark")
    with pytest.raises(UserError, match="does not fit ResNet"):
        convert(tmp_path / "backbone.pth", out, "spark", encoder="resnet10t")
    assert not out.exists()
