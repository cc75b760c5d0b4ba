"""The recipe of QLAE: scores and pictures, own data with and without causes, other encoders, apply."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import isthmus
from isthmus.cli.flags import check
from isthmus.codec import UserError
from isthmus.engine import Run, Training
from isthmus.recipes import qlae
from isthmus.recipes.qlae import Config
from isthmus.tasks import applying
from isthmus.tasks.latents import LatentsTask

BRIEF = Training(steps=3, batch_size=32, lr=1e-3, schedule="constant")
SMALL = Config(latents=4, values=3, training=BRIEF, gan=replace(BRIEF, steps=6, batch_size=8))


def ran(folder: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    with Run.quick(folder, name="qlae", config=config) as run:
        qlae.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    every = (*Config().arms, "fsq_normalised", "qlae_global_table", "qlae_frozen_tables", "gan")
    return ran(tmp_path_factory.mktemp("qlae"), replace(SMALL, arms=every, measured=90))


def test_every_arm_is_scored_and_drawn(finished: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in finished[1]["metrics"].items()}
    drawn = {figure["name"] for figure in finished[1]["figures"]}
    for arm in ("qlae", "ae", "ae_with_decay", "vae", "tcvae", "fsq", "fsq_normalised", "qlae_global_table", "gan"):
        assert metrics[f"psnr_{arm}"] > 0
        assert 0 <= metrics[f"infoe_{arm}"] <= 1
        assert f"traversal_{arm}" in drawn
    assert metrics["metric_permuted"] == pytest.approx(1)
    assert metrics["metric_rotated"] < 0.8
    assert metrics["margin_over_ae"] == pytest.approx(metrics["infom_qlae"] - metrics["infom_ae"])


def test_apply_tells_the_code_and_what_latents_change(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    forms = {"a": ("RGB", (30, 20)), "odd": ("RGB", (37, 5)), "clear": ("RGBA", (9, 12)), "dot": ("RGB", (1, 1))}
    for name, (mode, size) in forms.items():
        Image.new(mode, size, 128 if mode == "L" else (128,) * len(mode)).save(tmp_path / f"{name}.png")
    inputs = [tmp_path / f"{name}.png" for name in forms]
    written = applying.apply(finished[0], inputs, tmp_path / "out", qlae.answer)
    assert [path.name for path in written] == ["answers.json", *(f"{name}-answer.png" for name in forms)]
    facts = json.loads(written[0].read_text())[str(inputs[0])]
    kept = isthmus.load(finished[0])
    code = kept.model.encode(torch.full((1, 3, 16, 16), 128 / 255)).indices
    assert facts["code"] == code.flatten().tolist()
    assert len(facts["values"]) == len(facts["causes"]) == 4


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, arms=("qlae", "vae", "fsq"), measured=60)
    whole = ran(tmp_path / "whole", config)[1]["metrics"]
    measure = LatentsTask.measure
    calls = itertools.count()

    def until(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(LatentsTask, "measure", until)
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, config)
    monkeypatch.undo()
    with Run.quick(tmp_path, name="qlae", config=config, resume=True) as run:
        qlae.run(config, run)
    again = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert {n: entry["value"] for n, entry in again.items()} == {n: entry["value"] for n, entry in whole.items()}


def table(path: Path, **columns: list[Any]) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    features = datasets.Dataset.from_dict({"image": [Image.fromarray(x) for x in pixels], **columns})
    features.to_parquet(path)
    return f"parquet:{path}"


def test_columns_of_a_table_are_causes(tmp_path: Path) -> None:
    hue, kind = [i % 4 for i in range(40)], ["ab"[i % 2] for i in range(40)]
    data = table(tmp_path / "mine.parquet", hue=hue, kind=kind, one=[1] * 40, free=[i / 7 for i in range(40)])
    config = replace(SMALL, data=data, arms=("qlae", "ae"), train_split="train", eval_split="train")
    report = ran(tmp_path, config)[1]
    assert "infom_qlae" in report["metrics"]
    with pytest.raises(UserError, match="no column 'shade'"):
        ran(tmp_path / "other", replace(config, factors=("shade",)))


def test_pictures_without_causes_are_coded_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (12, 20, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    config = replace(SMALL, data=f"folder:{tmp_path / 'pictures'}", arms=("qlae",))
    folder, report = ran(tmp_path, config)
    assert "psnr_qlae" in report["metrics"]
    assert "infom_qlae" not in report["metrics"]
    assert isthmus.load(folder).facts["names"] == [f"latent {i}" for i in range(4)]


def test_too_few_pictures_for_the_scores_leave_a_codec_and_a_note(tmp_path: Path) -> None:
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)):
        (tmp_path / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png")
    folder, report = ran(tmp_path, replace(SMALL, data=f"folder:{tmp_path / 'pictures'}", arms=("ae",)))
    assert "infom_ae" not in report["metrics"]
    assert any("10 neighbours need more samples" in note for note in report["notes"])
    assert isthmus.load(folder).inputs.size == (16, 16)


def test_any_timm_encoder_and_the_published_kind_of_network(tmp_path: Path) -> None:
    config = replace(SMALL, size=32, data="discs:32", arms=("qlae", "vae"), measured=60)
    timm = replace(config, encoder="vit_tiny_patch16_224", training=replace(BRIEF, steps=1, batch_size=4))
    assert "infom_qlae" in ran(tmp_path / "a", timm)[1]["metrics"]
    small = replace(config, network="small", training=replace(BRIEF, steps=1, batch_size=4))
    assert "infom_qlae" in ran(tmp_path / "b", small)[1]["metrics"]


def test_says_what_is_wrong() -> None:
    for config, expected in (
        (replace(SMALL, arms=()), "at least one of --arms"),
        (replace(SMALL, arms=("gan",), encoder="resnet10t"), "leave --encoder out"),
        (replace(SMALL, network="image", size=20), "give larger|no map grows"),
        (replace(SMALL, values=0), "--values is at least 1, got 0"),
        (replace(SMALL, latents=-1), "--latents is at least 1"),
        (replace(SMALL, values=1), "arm fsq: .*at least two levels"),
        (replace(SMALL, arms=("ae", "gan"), encoder="resnet10t"), "leave --encoder out"),
        (replace(SMALL, encoder="resnet10"), "timm has no model"),
        (replace(SMALL, measured=0), "--measured is at least 1"),
        (replace(SMALL, size=-4), "--size is at least 1"),
        (replace(SMALL, beta=-1.0), "--beta is at least 0"),
    ):
        with pytest.raises(UserError, match=expected):
            check(qlae, config)
