"""The recipe of MEG decoding at a tiny size: metrics, pictures, recordings decoded, other data and encoders."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import isthmus
from isthmus.codec import Loss, UserError
from isthmus.codec.published import convert
from isthmus.data import load
from isthmus.encoders.signals.meg_conv import MEGConv
from isthmus.engine import Run, Training
from isthmus.recipes import meg_decoding
from isthmus.recipes.meg_decoding import Config
from isthmus.tasks.brain import course as courses
from isthmus.tasks.brain.trials import Trials, averaged_predictions, read, retrieve

SIZE = (
    "brain?subjects=2&trials=40&stimuli=6&repeats=2&features=4&sensors=12&geometry=sphere&noise=0.2"
    "&evoked=1&induced=0&signal=0.5"
)
TINY = Config(
    data=SIZE,
    evoked="",
    timed=SIZE.replace("subjects=2", "subjects=1") + "&start=-0.2&stop=1&rate=50",
    attention=6,
    position_dim=18,
    hidden=8,
    channels=12,
    depth=2,
    training=Training(steps=80, batch_size=16, lr=1e-2, warmup_steps=5),
    painting=Training(steps=10, batch_size=16, lr=5e-3, warmup_steps=2),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with Run.quick(tmp_path_factory.mktemp("meg"), name="meg-decoding", config=TINY) as run:
        meg_decoding.run(TINY, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def npz(path: Path, split: str = "test", rate: float = 40.0, **more: Any) -> Path:
    data = load(SIZE, split, ("signal", "subject", "latent", "label"))
    batch = data.fetch(range(len(data)))
    arrays = {k: batch[k].numpy() for k in ("signal", "subject", "latent", "label")}
    np.savez(path, rate=rate, start=-0.1, positions=data.layout.numpy(), **{**arrays, **more})  # type: ignore[attr-defined]
    return path


def test_everything_is_measured_and_drawn(done: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in done[1]["metrics"].items()}
    assert metrics["chance"] == 0.5, "of 6 candidates the first 3 count"
    assert any("the first 3 count (top-3) and not the first 5" in note for note in done[1]["notes"])
    assert not any(name.startswith("top5") for name in metrics)
    assert metrics["cnn_over_ridge"] == pytest.approx(metrics["top3_cnn"] / metrics["top3_ridge"])
    assert metrics["top3_cnn_large"] <= metrics["top3_cnn"]
    assert metrics["stream_difference"] < 1e-4
    assert metrics["best_semantic"] > 0.2
    assert 0.05 <= metrics["low_peak"] <= 0.2
    drawn = {figure["name"] for figure in done[1]["figures"]}
    assert {"retrieval", "course", "stream", "pictures", "sensors"} <= drawn


def test_the_kept_decoder_is_a_codec_of_its_own(done: tuple[Path, dict[str, Any]]) -> None:
    codec = isthmus.load(done[0]).model
    latents = codec(torch.randn(2, 12, 33), {"subject": torch.tensor([0, 1])}).prediction
    assert latents.retrieval.shape == latents.generation.shape == (2, 4)


def test_apply_decodes_arrays_and_tells_how_likely_what_was_seen(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("no recording")
    written = meg_decoding.apply(done[0], [npz(tmp_path / "one.npz"), tmp_path / "note.txt"], tmp_path / "out")
    names = [path.name for path in written]
    assert names == [
        "one-latents.npz",
        "one-retrieval.json",
        "one-course.png",
        "one-pictures.png",
        "skipped.json",
    ]
    assert all(path.stat().st_size for path in written)
    told = json.loads(written[1].read_text())
    assert len(told["trials"]) == 24
    assert all(len(set(trial["stimulus"])) == 5 for trial in told["trials"]), "no candidate comes twice"
    assert told["trials"][0]["cosine"] == sorted(told["trials"][0]["cosine"], reverse=True)
    assert told["correlation"] > 0.1, "the recording's own latents are predicted"
    latents = np.load(written[0])
    assert latents["retrieval"].shape == latents["generation"].shape == (24, 4)
    assert latents["pictures"].shape == latents["nearest"].shape == (24, 3, 24, 24)
    assert latents["pictures"].std(0).max() > 0, "they differ from trial to trial"
    known = load_file(done[0] / "kept" / "decoder" / "pictures.safetensors")["thumbs"].numpy()
    assert all((picture == known).all((1, 2, 3)).any() for picture in latents["nearest"])


def test_apply_takes_other_rates_and_other_sensors(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    times = np.arange(-0.1, 0.72, 1 / 160)
    signal = np.random.default_rng(0).normal(size=(12, 9, len(times))).astype(np.float32)
    np.savez(tmp_path / "other.npz", signal=signal, times=times, positions=np.random.default_rng(1).random((9, 2)))
    written = meg_decoding.apply(done[0], [tmp_path / "other.npz"], tmp_path / "out")
    assert np.load(written[0])["retrieval"].shape == (12, 4)
    np.savez(tmp_path / "few.npz", signal=signal[:2], times=times, positions=np.random.default_rng(1).random((9, 2)))
    with pytest.raises(UserError, match="2 trials are too few for a scale of their own"):
        meg_decoding.apply(done[0], [tmp_path / "few.npz"], tmp_path / "out")
    np.savez(tmp_path / "short.npz", signal=signal[..., :50], times=times[:50])
    with pytest.raises(UserError, match="are needed; cut longer epochs"):
        meg_decoding.apply(done[0], [tmp_path / "short.npz"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no kept model"):
        meg_decoding.apply(tmp_path / "empty", [tmp_path / "short.npz"], tmp_path / "out")


def test_apply_finds_the_person_by_name(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Each file numbers its own words; the number that counts is that of training."""
    run_dir = tmp_path / "run"
    shutil.copytree(done[0] / "kept" / "decoder", run_dir)
    kept = json.loads((run_dir / "saved.json").read_text())
    kept["facts"]["people"] = ["ann", "eve.npz"]
    (run_dir / "saved.json").write_text(json.dumps(kept))
    bare = {"subject": np.array(["eve.npz"] * 24)}
    first = np.load(meg_decoding.apply(run_dir, [npz(tmp_path / "x.npz", **bare)], tmp_path / "1")[0])
    with np.load(npz(tmp_path / "whole.npz")) as whole:
        np.savez(tmp_path / "eve.npz", **{k: whole[k] for k in whole.files if k != "subject"})
        np.savez(tmp_path / "other.npz", **{k: whole[k] for k in whole.files if k != "subject"})
    files = meg_decoding.apply(run_dir, [tmp_path / "eve.npz", tmp_path / "other.npz"], tmp_path / "2")
    np.testing.assert_array_equal(first["retrieval"], np.load(files[0])["retrieval"])
    assert [json.loads(files[n].read_text())["subject"] for n in (1, 5)] == [[1], [0]]
    assert [json.loads(files[n].read_text())["subject_known"] for n in (1, 5)] == [True, False]
    with pytest.raises(UserError, match=r"nobody called 'zoe' was trained on; the people are ann, eve\.npz"):
        meg_decoding.apply(run_dir, [npz(tmp_path / "z.npz", subject=np.array(["zoe"] * 24))], tmp_path / "3")


def test_apply_streams_a_continuous_fif(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    mne = pytest.importorskip("mne")
    info = mne.pick_info(mne.channels.read_meg_canonical_info("ctf275", verbose="ERROR"), list(range(0, 274, 30)))
    with info._unlock():
        info["sfreq"] = 100.0
    noise = np.random.default_rng(0).normal(size=(len(info["ch_names"]), 300)) * 1e-13
    mne.io.RawArray(noise, info, verbose="ERROR").save(tmp_path / "rest_raw.fif", verbose="ERROR")
    written = meg_decoding.apply(done[0], [tmp_path / "rest_raw.fif"], tmp_path / "out")
    told = json.loads(written[1].read_text())
    assert len(told["steps"]) > 50
    assert told["steps"][1]["time"] - told["steps"][0]["time"] == pytest.approx(1 / 40, abs=1e-3)
    assert all(step["milliseconds"] > 0 for step in told["steps"])
    window = (32 - 4) / 40  # of the 33 samples five lie before the onset
    assert all(step["latency"] >= window + step["milliseconds"] / 1000 - 1e-3 for step in told["steps"])


def test_recordings_and_latents_of_a_vision_model(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (80, 3, 24, 24), np.uint8)
    npz(tmp_path / "mine.npz", "train", image=pictures)
    config = Config(
        **{**TINY.__dict__, "data": f"meg:{tmp_path}/mine.npz", "encoder": "timm:test_resnet", "pretrained": False},
    )
    with Run.quick(tmp_path, name="meg-decoding", config=config, max_steps=2) as run:
        meg_decoding.run(config, run)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert metrics["chance"]["value"] <= 0.5
    assert "semantic_lag" not in metrics, "nobody knows the truth of a recording"
    decoder: Any = isthmus.load(run.dir).model.decoder
    assert decoder.retrieval.out_features == timm.create_model("test_resnet").num_features


def test_sources_without_targets_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", signal=np.zeros((30, 3, 8), np.float32), rate=40.0, start=-0.1)
    with pytest.raises(UserError, match="no latent, image or label to predict"):
        read(f"meg:{tmp_path}/bare.npz", "train", 0)
    with pytest.raises(UserError, match="has no column signal"):
        read("digits", "train", 0)
    np.savez(
        tmp_path / "classes.npz",
        signal=np.zeros((30, 3, 8), np.float32),
        rate=40.0,
        start=-0.1,
        label=np.arange(30) % 3,
    )
    trials = read(f"meg:{tmp_path}/classes.npz", "all", 0)
    assert len(trials.stimuli()[0]) == 3, "trials of a class show one thing"


def trials(count: int = 8) -> Trials:
    stimulus = torch.arange(count) % 4
    latent = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))[stimulus]
    signal = torch.arange(count).float().view(-1, 1, 1).expand(-1, 2, 10)
    return Trials(
        signal, torch.zeros(count, dtype=torch.int64), stimulus, latent, torch.rand(count, 2, 2), torch.arange(10) / 10
    )


def test_one_candidate_is_no_retrieval(tmp_path: Path) -> None:
    npz(tmp_path / "mine.npz", label=np.zeros(24, np.int64), latent=np.ones((24, 4), np.float32), stimulus=[0] * 24)
    config = replace(TINY, data=f"meg:{tmp_path}/mine.npz")
    run = Run.quick(tmp_path, name="meg-decoding", config=config, max_steps=2)
    with pytest.raises(UserError, match="show 1 stimulus; retrieval needs at least 2"), run:
        meg_decoding.run(config, run)
    assert not list(run.dir.rglob("*.ckpt")), "told before anything is trained"


def test_a_picture_that_cannot_be_read_is_told_with_its_column(tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(b"no picture")
    npz(tmp_path / "mine.npz", image=["dog.png"] * 24)
    with pytest.raises(UserError, match=r"its column image names .*dog\.png, which cannot be read"):
        read(f"meg:{tmp_path}/mine.npz", "all", 0)


def test_the_end_of_a_stimulus_is_drawn_only_where_it_is_known() -> None:
    course = courses.Course([(0.0, 0.1), (0.9, 1.0)], {"latent": [0.1, 0.2]})

    def moments(figure: Any) -> list[float]:
        return [line.get_xdata()[0] for line in figure.axes[0].lines if list(line.get_ydata()) == [0, 1]]

    assert 0.5 in moments(courses.draw(course, None, 0.5))
    assert 0.5 not in moments(courses.draw(course, None))


def test_repeats_are_averaged_in_one_order() -> None:
    made = trials()
    mean = made.averaged()
    assert mean.signal[:, 0, 0].tolist() == [2, 3, 4, 5]
    assert torch.equal(averaged_predictions(made.latent, made), mean.latent)
    assert retrieve(made.latent, made, 1) == retrieve(mean.latent, mean, 1) == 1.0
    assert retrieve(-made.latent, made, 1) == 0.0


def test_windows_meet_at_the_onset_and_peaks_are_found() -> None:
    spans = courses.spans(-0.2 + torch.arange(61) / 50, 0.1, 0.05)
    assert spans[0] == (-0.2, -0.1)
    assert (0.0, 0.1) in spans
    assert spans[-1][1] == pytest.approx(1.0)
    centres = torch.tensor([(a + b) / 2 for a, b in spans])

    def bump(*places: float) -> list[float]:
        return sum(torch.exp(-((centres - p) ** 2) / 0.002) for p in places).tolist()  # type: ignore[union-attr]

    found = courses.peaks(courses.Course(spans, {"low": bump(0.1), "semantic": bump(0.2, 0.7)}), 0.0, 0.5)
    assert found["low_peak"] == pytest.approx(0.1)
    assert found["semantic_peak"] == pytest.approx(0.2)
    assert found["trough"] == courses.FLOOR
    assert found["bump"] > 0.9
    assert found["before"] < 0.01


def test_published_trunks_are_converted_and_the_paper_model_has_its_size(tmp_path: Path) -> None:
    state = {"merger.heads": torch.randn(4, 8), "final.2.weight": torch.randn(6, 5, 1), "final.2.bias": torch.zeros(5)}
    torch.save({"model": state}, tmp_path / "trunk.th")
    saved = load_file(convert(tmp_path / "trunk.th", tmp_path / "trunk.safetensors"))
    assert torch.equal(saved["project.2.weight"], state["final.2.weight"].transpose(0, 1))
    torch.save({**state, "other.weight": torch.zeros(1)}, tmp_path / "other.th")
    with pytest.raises(UserError, match="belongs to no published MEG trunk"):
        convert(tmp_path / "other.th", tmp_path / "x")

    made = Trials(
        torch.zeros(4, 272, 181), torch.arange(4), torch.arange(4), torch.zeros(4, 768), torch.rand(4, 272, 2),
        torch.arange(181) / 120 - 0.5,
    )  # fmt: skip
    codec = meg_decoding._network(Config.paper(), made, made.positions[0])
    assert isinstance(codec.encoder, MEGConv)
    retrieval = sum(p.numel() for name, p in codec.named_parameters() if "generation" not in name)
    assert retrieval == 6_424_472


def test_the_published_setting_stops_early_on_validation(tmp_path: Path) -> None:
    assert Config.paper().training.patience == 10
    training = Training(epochs=40, batch_size=16, lr=0.3, patience=1)  # far too fast, so that it soon gets worse
    config = replace(TINY, training=training, timed="", data=SIZE)
    with Run.quick(tmp_path, name="meg-decoding", config=config) as run:
        meg_decoding.run(config, run)
    rows = list(csv.DictReader((run.dir / "scalars" / "convnet.csv").read_text().splitlines()))
    steps = {int(row["step"]) for row in rows}
    losses = [float(row["value"]) for row in rows if row["name"] == "evaluate/loss"]
    assert max(steps) == 5 * len(losses), "after every epoch"
    assert max(steps) < 200
    assert losses[-1] >= min(losses[:-1])


def test_validation_is_the_mean_over_all_trials() -> None:
    trials = read(SIZE, "val", 0)
    asked: list[int] = []

    class Counting(torch.nn.Linear):
        def forward(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> Any:  # type: ignore[override]
            asked.append(len(batch["signal"]))
            return Loss(batch["latent"].square().mean())

    found = trials.loss_of(16)(Counting(1, 1))["loss"]
    assert sum(asked) == len(trials)
    assert max(asked) <= 16
    assert min(asked) >= max(asked) - 1
    assert found == pytest.approx(float(trials.latent.square().mean()), rel=1e-5)
