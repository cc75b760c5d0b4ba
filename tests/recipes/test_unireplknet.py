"""UniRepLKNet's recipe: six tasks with one convnet, merging, answers to a user's files, published checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from isthmus.bounds import check_fields
from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.dataset import Unreadable
from isthmus.data.readers import samples as files
from isthmus.engine import Run, Training
from isthmus.objectives.forecasting import Forecasting
from isthmus.recipes import unireplknet
from isthmus.recipes.unireplknet import Config
from isthmus.tasks import modalities
from isthmus.tasks.modalities import (
    COLUMNS,
    AudioTask,
    ForecastTask,
    ImageTask,
    PointsTask,
    SeriesTask,
    VideoTask,
    models,
)

BRIEF = Training(steps=4, batch_size=16, lr=4e-3, warmup_steps=1)
TINY = Config(
    depths=(1, 1, 1, 1),
    dims=(8, 8, 8, 16),
    kernel=7,
    image=ImageTask("digits:32", Training(steps=60, batch_size=32, lr=8e-3, warmup_steps=5), size=32),
    audio=AudioTask("sounds:clicks?count=40&rate=2000", BRIEF, rate=2000, bands=16, frames=32, hop=0.03),
    video=VideoTask("clips:8?frames=4&count=40", BRIEF),
    points=PointsTask("solids:32?count=40", BRIEF, views=2, size=32, neighbours=4, channels=8),
    series=SeriesTask("signals:sinusoids?count=40&length=64", BRIEF, dim=16),
    forecast=ForecastTask("series", BRIEF, dim=24, length=24, horizon=6, windows=(40, 20)),
    test_samples=64,
)


def _checked(config: Config) -> None:
    check_fields(config)
    unireplknet.check(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with Run.quick(tmp_path_factory.mktemp("unireplknet"), name="unireplknet", config=TINY) as run:
        unireplknet.run(TINY, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_every_task_is_learnt_by_both_networks_and_merged(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    for task in COLUMNS:
        kind = "mse" if task == "forecast" else "accuracy"
        assert 0 <= metrics[f"{kind}_{task}_small"] <= (1 if kind == "accuracy" else 100)
        if task != "forecast":
            gain = metrics[f"accuracy_{task}_large"] - metrics[f"accuracy_{task}_small"]
            assert metrics[f"gain_{task}"] == pytest.approx(gain)
    assert metrics["accuracy_image_large"] > 0.3, "chance is 0.1"
    assert metrics["share_above_chance_image"] == pytest.approx((metrics["accuracy_image_large"] - 0.1) / 0.9)
    assert metrics["least_share_above_chance"] == min(metrics[f"share_above_chance_{n}"] for n in unireplknet.CLAIMED)
    assert metrics["merge_gap"] < 1e-4
    assert {"accuracies", "inputs", "forecast"} == {figure["name"] for figure in trained[1]["figures"]}


def test_apply_answers_every_kind_of_file(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    picture = load("digits:32", "test")[0]["image"].permute(1, 2, 0).numpy()
    Image.fromarray(picture).resize((50, 40)).save(tmp_path / "digit.png")
    sound = load("sounds:clicks", "test", ("audio",))[0]["audio"].numpy()
    wavfile.write(tmp_path / "clicks.wav", 8000, np.stack([(sound * 32767).astype(np.int16)] * 2, 1))
    np.save(tmp_path / "body.npy", load("solids", "test", ("points",))[1]["points"].numpy())
    np.save(
        tmp_path / "clip.npy", load("clips:24?frames=4", "test", ("video",))[2]["video"].permute(0, 2, 3, 1).numpy()
    )
    np.save(tmp_path / "tones.npy", load("signals:sinusoids", "test", ("signal",))[0]["signal"].numpy())
    rows = load("series?length=60", "test", ("signal",))[0]["signal"].T.numpy()
    with open(tmp_path / "hours.csv", "w", newline="") as file:
        csv.writer(file).writerows([["time", *"abcdefg"], *([f"t{i}", *row] for i, row in enumerate(rows))])
    (tmp_path / "note.txt").write_text("no data")
    inputs = sorted(path for path in tmp_path.iterdir() if path.is_file())
    written = unireplknet.apply(trained[0], inputs, tmp_path / "out")
    assert all(path.stat().st_size for path in written)
    assert len(written) == len(set(written)) == 1 + 5 + 2
    told = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert {Path(name).stem: list(answer) for name, answer in told.items()} == {
        "digit": ["image"],
        "clicks": ["audio"],
        "body": ["points"],
        "clip": ["video"],
        "tones": ["series"],
        "hours": ["forecast"],
        "note": ["skipped"],
    }
    for name, answer in told.items():
        for task, found in answer.items():
            if task not in ("forecast", "skipped"):
                assert sum(found["probability"].values()) <= 1.001, name
                assert next(iter(found["probability"])) == found["class"]
    with open(tmp_path / "out" / "hours-forecast.csv", newline="") as file:
        table = list(csv.reader(file))
    assert len(table) == 1 + 6
    assert len(table[0]) == len(table[1]) == 7
    with pytest.raises(UserError, match="none of the inputs can be answered"):
        unireplknet.apply(trained[0], [tmp_path / "note.txt"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="kept no network; run the recipe to its end"):
        unireplknet.apply(tmp_path / "empty", inputs, tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "shape", "array", "message"),
    [
        ("points", (32, 3), np.zeros((5, 2)), r"an array of points is \(P, 3\)"),
        ("points", (32, 3), np.full((5, 3), np.nan), "finite numbers"),
        ("video", (4, 3, 8, 8), np.zeros((5, 8, 8, 3)), r"a clip is \(4, 3, H, W\), not \(5, 3, 8, 8\)"),
        ("series", (1, 64), np.zeros((1, 63)), "1 series of at least 64 steps is needed, this is 1 of 63"),
        ("series", (1, 64), np.zeros((2, 64)), "this is 2 of 64"),
        ("series", (1, 64), np.array(["a"]), "finite numbers"),
        ("audio", (2000,), np.zeros(3), r"the audio task reads \.wav"),
    ],
)
def test_files_of_other_shapes_are_named(
    task: str, shape: tuple[int, ...], array: np.ndarray, message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(Unreadable, match=message):
        files.read_file(task, getattr(TINY, task), shape, tmp_path / "x.npy")


def test_a_sound_that_cannot_be_heard_is_told(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "nan.wav", 2000, np.full(2000, np.nan, np.float32))
    wavfile.write(tmp_path / "short.wav", 2000, np.zeros(40, np.int16))
    for name, message in (("nan", "finite numbers"), ("short", "40 samples at 2000 a second; one moment takes 50")):
        with pytest.raises(Unreadable, match=message):
            files.read_file("audio", TINY.audio, [2000], tmp_path / f"{name}.wav")


def test_a_users_sounds_are_learnt_from_wav_files_of_any_length(tmp_path: Path) -> None:
    """Tables hold sounds as files; broken ones are left out."""
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        wavfile.write(tmp_path / "x.wav", 4000, rng.integers(-9000, 9000, 2000 + 300 * i).astype(np.int16))
        rows.append({"audio": (tmp_path / "x.wav").read_bytes() if i != 3 else b"fLaC", "label": i % 2})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "words.parquet")
    audio = AudioTask(f"parquet:{tmp_path}/words.parquet", BRIEF, rate=2000, bands=16, frames=32, hop=0.03)
    config = dataclasses.replace(TINY, tasks=("audio",), audio=audio, train_split="all", eval_split="all", twin=0)
    (train, _) = modalities.sources(config, "audio", 0)
    length = 50 + 31 * 60
    assert len(train) == 24
    assert train[0]["audio"].shape == train[20]["audio"].shape == (length,)
    assert train[0]["audio"][1000:].abs().max() == 0, "half a second, then silence"
    assert train[20]["audio"][1000:].abs().max() > 0
    with Run.quick(tmp_path / "run", name="unireplknet", config=config) as run:
        unireplknet.run(config, run)
    out = unireplknet.apply(run.dir, [tmp_path / "x.wav"], tmp_path / "out")
    assert json.loads(out[0].read_text())[str(tmp_path / "x.wav")]["audio"]["class"] in ("0", "1")


def test_forecasts_keep_level_and_spread_of_what_was_seen() -> None:
    model: Any = models.make_model(TINY, "forecast", [7, 30], 7, 7).eval()
    x = load("series?length=24", "test", ("signal",)).fetch(range(3))["signal"]
    with torch.no_grad():
        told = model(x)
        torch.testing.assert_close(model(5 * x + 100), 5 * told + 100, atol=2e-2, rtol=1e-4)
        assert model(torch.full_like(x, 7.0)).sub(7).abs().max() < 1e-3, "a series that stands still"
    assert told.shape == (3, 7, 6)
    batch = {"signal": torch.cat([x, told], 2)}
    assert float(Forecasting(model, 24)(batch, torch.Generator()).loss.detach()) == pytest.approx(0, abs=1e-8)


def test_views_of_a_cloud_are_told_together() -> None:
    model: Any = models.make_model(TINY, "points", [32, 3], 4, 7).eval()
    clouds = load("solids:32", "test", ("points",)).fetch(range(4))["points"]
    with torch.no_grad():
        torch.testing.assert_close(model(clouds)[2:3], model(clouds[2:3]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("smell",)}, "tasks smell: choose each once from image, audio"),
        ({"tasks": ()}, r"tasks \(\): choose"),
        ({"tasks": ("series",), "series": SeriesTask("signals:sinusoids", BRIEF, dim=30)}, "make no square picture"),
        ({"tasks": ("video",), "video": VideoTask("clips?frames=5", BRIEF)}, "5 frames make no square"),
        ({"tasks": ("audio",), "audio": AudioTask("digits", BRIEF)}, "has no column audio"),
        ({"tasks": ("forecast",), "encoder": "resnet10t"}, "reads the last map of a UniRepLKNet"),
        ({"tasks": ("image",), "kernel": 8}, "no dilated branches"),
        ({"test_samples": -1}, "--test-samples is at least 0"),
        (
            {"audio": dataclasses.replace(TINY.audio, frames=0)},
            "the audio task cannot be set up: .*frames is at least 1",
        ),
        ({"points": dataclasses.replace(TINY.points, size=2)}, "the points task cannot be set up: size 2"),
    ],
)
def test_impossible_settings_are_one_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, **change)
    if change.get("tasks") in (("smell",), ()) or "test_samples" in change:
        with pytest.raises(UserError, match=message):
            _checked(config)
        return
    with pytest.raises(ValueError, match=message), Run.quick(tmp_path, name="unireplknet", config=config) as run:
        unireplknet.run(config, run)
    assert not list((run.dir / "checkpoints").glob("*")), "told before anything is trained"


def test_any_convnet_of_timm_learns_them(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, tasks=("audio",), encoder="resnet10t")
    with Run.quick(tmp_path, name="unireplknet", config=config) as run:
        unireplknet.run(config, run)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert metrics["merge_gap"]["value"] == 0
    assert "accuracy_audio_small" not in metrics


def test_published_settings_build_the_published_network() -> None:
    config = Config.paper()
    with torch.device("meta"):
        for name, shape in {"audio": [16000], "points": [1024, 3], "forecast": [7, 72]}.items():
            model = models.make_model(config, name, shape, 1000, config.kernel)
            inside = sum(p.numel() for p in model.network.parameters())
            changed = 0 if name == "points" else 2 * 40 * 9  # one channel in place of three
            assert inside == 31_693_420 - 641 * 1000 - changed
