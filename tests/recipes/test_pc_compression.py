"""The recipe of compression with circuits: what it measures, resuming, pictures to .pcz and back, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus import catalog
from isthmus.cli.flags import check
from isthmus.cli.running import applicable_claims
from isthmus.codec import UserError
from isthmus.data import load
from isthmus.engine import Run, RunOptions
from isthmus.priors.circuit import HCLT
from isthmus.priors.circuit_tree import chain
from isthmus.recipes import pc_compression
from isthmus.recipes.pc_compression import Config
from isthmus.tasks import lossless

pytest.importorskip("constriction")

TINY = Config(
    data="digits?limit=250",
    latents=3,
    tree_latents=3,
    epochs=8,
    timed=4,
    photos="photos:32?include=chelsea,brick",
    photos_train=30,
    photos_eval=3,
    patch=4,
    patches=1500,
    patch_latents=3,
    patch_epochs=3,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with Run.quick(tmp_path_factory.mktemp("pc"), name="pc-compression", config=TINY) as run:
        pc_compression.run(TINY, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in report["metrics"].items()}


def test_what_it_measures_fits_together(done: tuple[Path, dict[str, Any]]) -> None:
    found = metrics_of(done[1])
    assert found["exact_share"] == found["exact_in_one_stream"] == found["photos_exact_share"] == 1
    assert found["worst_excess_bits"] <= 0
    assert found["bpd"] == pytest.approx(found["bpd_one_stream"], abs=0.01)
    assert found["ratio_to_independent"] == pytest.approx(found["bpd"] / found["bpd_independent"])
    assert 0.5 < found["ratio_to_independent"] < 0.97
    assert found["tree_gain"] == pytest.approx(found["bpd_random_tree"] - found["bpd_chow_liu_wide"])
    assert found["saved_to_lzma"] == pytest.approx(found["bpd_lzma"] - found["bpd"], abs=0.01)
    assert found["partial_share_over_bound"] < 0.3
    assert found["carried_share_of_nodes"] < found["partial_share_of_nodes"]
    assert found["schedules_differ"] < 1e-9
    assert found["partial_speedup"] > 2
    assert found["parameters"] == 64 * 3 * 17 + 3 + 9 * _inner(done[0])
    assert found["photos_ratio_to_png"] == pytest.approx(found["photos_bpd_pcz"] / found["photos_bpd_png"])
    assert found["photos_bpd_pcz"] < 8
    names = {figure["name"] for figure in done[1]["figures"]}
    assert names == {"circuits", "images", "formats", "each_photo"}
    assert "em/chow_liu" in done[1]["curves"]


def _inner(folder: Path) -> int:
    from safetensors.torch import load_file

    return len(load_file(folder / "circuits" / "chow_liu.safetensors")["sums"])


def converted(run: Path, inputs: list[Path], out: Path) -> list[Path]:
    answers, *written = pc_compression.apply(run, inputs, out)
    assert answers == out / "answers.json"
    return written


def test_one_unusable_picture_is_skipped_and_named(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{name}.png")
    Image.fromarray(np.full((3, 3), 40000, np.uint16)).save(tmp_path / "b.png")
    (tmp_path / "cut.pcz").write_bytes(b"\x89PCZ\x01")
    inputs = [tmp_path / name for name in ("a.png", "b.png", "cut.pcz", "c.png")]
    assert [path.name for path in converted(done[0], inputs, tmp_path / "out")] == ["a.pcz", "c.pcz"]
    told = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert "does not have 8 bits a channel" in told[str(inputs[1])]["skipped"]
    assert "damaged or cut short" in told[str(inputs[2])]["skipped"]
    size = (tmp_path / "out" / "a.pcz").stat().st_size
    entry = told[str(inputs[0])]
    assert (entry["file"], entry["pixels"], entry["bytes"]) == ("a.pcz", "9 x 9, RGB", size)
    assert entry["bytes_before"] == inputs[0].stat().st_size
    assert entry["bits_per_dimension"] == pytest.approx(8 * size / 243, abs=1e-3)


def test_own_photographs_and_settings_get_numbers_and_no_verdicts(tmp_path: Path) -> None:
    system, usual = catalog.find("pc-compression"), pc_compression.Config()
    options = RunOptions(out=tmp_path)
    for changes in ({"photos": "folder:mine"}, {"data": "folder:mine"}, {"latents": 4}):
        config = dataclasses.replace(usual, **changes)
        claims, remark = applicable_claims(system, pc_compression, "laptop", config, options)
        assert not claims
        assert "numbers" in remark
    assert applicable_claims(system, pc_compression, "laptop", usual, options) == (system.claims, "")


def test_fewer_pictures_than_were_asked_for_are_explained(tmp_path: Path) -> None:
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for split in ("train", "test")[: 1 if i else 2]:
            (tmp_path / "mine" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "mine" / split / f"{i}.png")
    config = dataclasses.replace(TINY, photos=f"folder:{tmp_path / 'mine'}", photos_eval=2)
    with Run.quick(tmp_path, name="pc-compression", config=config) as run:
        pc_compression._photos(run, config)
    log = (run.dir / "log.txt").read_text()
    assert "2 pictures were asked for (--photos-eval) and 1 are there (test, the part that is held out)" in log
    assert "1 picture to compress" in log


def test_apply_goes_there_and_back(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {
        "photo.png": Image.fromarray(load("photos:32", "test", ("image",))[0]["image"].permute(1, 2, 0).numpy()),
        "alpha.webp": Image.fromarray(rng.integers(0, 256, (7, 5, 4), dtype=np.uint8)),
        "other/photo.png": Image.new("L", (1, 1), 9),
    }
    paths = []
    for name, image in images.items():
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir(exist_ok=True)
        if name.endswith("webp"):
            image.save(paths[-1], lossless=True, exact=True)
        else:
            image.save(paths[-1])
    packed = converted(done[0], paths, tmp_path / "packed")
    assert [p.name for p in packed] == ["photo.pcz", "alpha.pcz", "photo-2.pcz"]
    back = converted(done[0], packed, tmp_path / "back")
    for path, image in zip(back, images.values(), strict=True):
        assert path.suffix == ".png"
        with Image.open(path) as opened:
            assert opened.mode == image.mode
            assert np.array_equal(np.asarray(opened), np.asarray(image))
    beside = converted(done[0], [paths[0].with_suffix(".png")], tmp_path)
    assert converted(done[0], beside, tmp_path)[0].name == "photo.png"


def test_apply_never_replaces_another_picture(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for name, value in {"a.png": 9, "a.bmp": 200, "other/a.png": 3}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (5, 4), value).save(tmp_path / name)
    sources = [tmp_path / "a.png", tmp_path / "a.bmp"]
    packed = converted(done[0], sources, tmp_path)
    assert [p.name for p in packed] == ["a.pcz", "a-2.pcz"]
    before = {path: path.stat().st_mtime_ns for path in (*packed, *sources)}
    assert converted(done[0], sources, tmp_path) == packed, "the same once more changes nothing"
    assert converted(done[0], packed[:1], tmp_path) == [tmp_path / "a.png"], "the picture it came from"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match=r"a\.pcz is there already and holds something else"):
        pc_compression.apply(done[0], [tmp_path / "a.bmp"], tmp_path)
    with pytest.raises(UserError, match=r"other.a\.png is there already and holds something else"):
        pc_compression.apply(done[0], packed[:1], tmp_path / "other")
    (tmp_path / "other" / "a-2.png").write_text("somebody's notes")
    with pytest.raises(UserError, match="holds something else"):
        pc_compression.apply(done[0], packed[1:], tmp_path / "other")
    assert (tmp_path / "other" / "a-2.png").read_text() == "somebody's notes"


def test_apply_tells_what_is_wrong_and_writes_nothing(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 3), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (9, 9), 7).save(tmp_path / "a.png")
    (data,) = converted(done[0], [tmp_path / "a.png"], tmp_path)
    (tmp_path / "cut.pcz").write_bytes(data.read_bytes()[:-3])
    (tmp_path / "note.txt").write_text("no picture")
    out = tmp_path / "out"
    for name, told in {
        "deep.png": "does not have 8 bits a channel",
        "cut.pcz": r"cut\.pcz is damaged or cut short",
        "note.txt": "no picture that can be read",
    }.items():
        with pytest.raises(UserError, match=told):
            pc_compression.apply(done[0], [tmp_path / name], out)
    assert not out.exists()
    with pytest.raises(UserError, match="--photos none"):
        pc_compression.apply(tmp_path, [tmp_path / "a.png"], out)


def test_another_seed_is_another_model(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data="digits?limit=60", epochs=1)
    with Run.quick(tmp_path, seed=1, name="pc-compression", config=config, max_steps=1) as run:
        pc_compression.run(config, run)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    (packed,) = converted(done[0], [tmp_path / "a.png"], tmp_path)
    with pytest.raises(UserError, match="written with another model"):
        pc_compression.apply(run.dir, [packed], tmp_path / "out")
    assert "from_scratch" not in json.dumps(metrics_of(json.loads((run.dir / "report.json").read_text())))


def test_resuming_takes_up_circuits_that_are_done(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(done[0], tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    (tmp_path / "run" / "circuits" / "chain.safetensors").unlink()
    before = (tmp_path / "run" / "kept" / "pictures" / "model.safetensors").read_bytes()
    stamp = (tmp_path / "run" / "circuits" / "patches.safetensors").stat().st_mtime_ns
    with Run.quick(tmp_path, name="pc-compression", config=TINY, resume=True) as run:
        pc_compression.run(TINY, run)
    assert (run.dir / "kept" / "pictures" / "model.safetensors").read_bytes() == before
    assert (run.dir / "circuits" / "patches.safetensors").stat().st_mtime_ns == stamp
    report = metrics_of(json.loads((run.dir / "report.json").read_text()))
    for name in ("bpd", "bpd_chain", "photos_bpd_pcz"):
        assert report[name] == pytest.approx(metrics_of(done[1])[name], abs=1e-6)


def test_colour_images_mini_batches_and_no_photographs(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY,
        data="photos:6?count=40",
        train_split="train",
        stochastic_epochs=2,
        batch_size=16,
        epochs=1,
        latents=2,
        tree_latents=2,
        photos="none",
    )
    with Run.quick(tmp_path, name="pc-compression", config=config) as run:
        pc_compression.run(config, run)
    found = metrics_of(json.loads((run.dir / "report.json").read_text()))
    assert found["exact_share"] == 1
    assert not any(name.startswith("photos") for name in found)
    with pytest.raises(UserError, match="--photos none"):
        pc_compression.apply(run.dir, [tmp_path / "x.png"], tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": "photos:40?count=4"}, "4800 variables, the most is 4096"),
        ({"patch": 1}, "--patch is at least 2"),
        ({"photos_eval": 0}, "at least 1"),
        ({"photos": "photos:3?count=4", "epochs": 1}, "patches take 4 a side"),
        ({"pseudocount": -1.0}, "--pseudocount is at least 0"),
        ({"pseudocount": float("nan")}, "--pseudocount is at least 0"),
        ({"batch_size": 0}, "--batch-size is at least 1, got 0"),
        ({"patches": -5}, "--patches is at least 1, got -5"),
        ({"patch_epochs": 0}, "--patch-epochs is at least 1, got 0"),
        ({"stochastic_epochs": -1}, "--stochastic-epochs is at least 0"),
    ],
)
def test_impossible_settings_are_told(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, **{"data": "digits?limit=40", "epochs": 1, **changes})
    with pytest.raises(ValueError, match=told):
        _run(config, tmp_path)


def _run(config: Config, folder: Path) -> None:
    check(pc_compression, config)
    with Run.quick(folder, name="pc-compression", config=config) as run:
        pc_compression.run(config, run)


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        Image.new("L", (5 + i % 2, 5), i).save(folder / f"{i}.png")
    config = dataclasses.replace(TINY, data=f"folder:{folder}", train_split="train")
    with (
        Run.quick(tmp_path, name="pc-compression", config=config) as run,
        pytest.raises(UserError, match="several sizes"),
    ):
        pc_compression.run(config, run)


def test_patches_lie_as_the_coder_cuts_them_and_grey_has_no_colour() -> None:
    dataset = load("photos:20?include=brick&count=3", "train", ("image",))
    found, there = lossless.patches(dataset, 8, 12, torch.Generator().manual_seed(0))
    assert found.shape == (12, 192), "4 whole patches a picture; what is beyond them is left out"
    assert there[:, 0::3].all()
    assert not there[:, 1::3].any()
    coder_values = {tuple(p[0::3].tolist()) for p in found}
    assert len(coder_values) == 12


def test_the_paper_setting_is_mnist_with_32_states() -> None:
    config = Config.paper()
    assert config.data == "hub:ylecun/mnist"
    assert config.latents == 32
    assert config.step == (0.1, 0.01)
    assert HCLT(chain(784), 256, 1).inputs.numel() == 200_704
