"""Sounds, signals, solids and clips: pure functions of (seed, split, i) that hold what their labels say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus import data
from isthmus.codec import UserError
from isthmus.data.builtin import signals, sounds

SOURCES = {
    "sounds?count=24": ("audio", (8000,)),
    "sounds:clicks?count=24&rate=4000": ("audio", (4000,)),
    "signals?count=24": ("signal", (1, 1024)),
    "signals:sinusoids?count=24": ("signal", (1, 128)),
    "solids:64?count=24": ("points", (64, 3)),
    "clips?count=24&frames=4": ("video", (4, 3, 16, 16)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_samples_depend_on_seed_split_and_number_only(source: str) -> None:
    column, shape = SOURCES[source]
    train = data.load(source, "train", (column, "label"), seed=3)
    batch = train.fetch(range(24))
    assert batch[column].shape == (24, *shape)
    assert len(train) == 24
    for i in (5, 23):
        assert torch.equal(train[i][column], batch[column][i])
        assert int(train[i]["label"]) == int(batch["label"][i]) < len(train.classes or ())
    longer = data.load(source.replace("count=24", "count=30"), "train", (column,), seed=3)
    assert torch.equal(longer[23][column], batch[column][23])
    for split, seed in (("test", 3), ("val", 3), ("train", 4)):
        other = data.load(source, split, (column,), seed)
        assert not torch.equal(other[5][column], batch[column][5])
    assert set(data.load(source, "test", ("label",)).fetch([0])) == {"label", "index"}


@pytest.mark.parametrize("kind", sounds.EVENTS)
def test_kinds_of_events_sound_as_they_are_called(kind: str) -> None:
    t = np.arange(800) / 8000
    noise = np.random.default_rng(0).standard_normal(800)
    wave = sounds._KINDS[kind](t, 250.0, 0.3, noise)
    halves = [np.abs(np.fft.rfft(half * np.hanning(400))) for half in (wave[:400], wave[400:])]
    place = [float((spectrum * np.arange(201)).sum() / spectrum.sum()) * 20 for spectrum in halves]  # Hz
    assert wave.shape == t.shape
    assert np.isfinite(wave).all()
    if "chirp" in kind:
        assert (place[1] - place[0]) * (1 if kind == "rising chirp" else -1) > 150
    elif kind == "steady tone":
        assert place[0] == pytest.approx(750, abs=80)
    elif kind == "harmonic stack":
        peaks = [halves[0][round(250 * k / 20)] for k in (1, 2, 3)]
        assert peaks[0] > peaks[1] > peaks[2] > 0.1 * peaks[0]
    elif kind == "click train":
        assert (wave == 0).mean() > 0.9
    elif kind == "amplitude modulation":
        loud = np.abs(wave).reshape(-1, 20).max(1)
        assert loud.min() < 0.2 < 0.8 < loud.max()


def _burst_times(wave: Tensor, rate: int) -> list[float]:
    """Where the energy of 10 ms is largest, and where it is largest away from there."""
    energy = wave.unfold(0, rate // 100, rate // 1000).square().sum(1)
    first = int(energy.argmax())
    energy[max(0, first - 60) : first + 60] = 0
    return sorted((first / 1000, int(energy.argmax()) / 1000))


def test_clicks_stand_at_the_distance_of_their_class() -> None:
    batch = data.load("sounds:clicks?count=16", "train", ("audio", "label")).fetch(range(16))
    starts = []
    for wave, label in zip(batch["audio"], batch["label"].tolist(), strict=True):
        first, second = _burst_times(wave, 8000)
        assert second - first == pytest.approx(sounds.DISTANCES[label], rel=0.03, abs=0.004)
        starts.append(first)
    assert np.std(starts) > 0.05, "the place tells nothing"


def test_bumps_and_periods_are_those_of_their_class() -> None:
    for length in (1024, 512):
        many = data.load(f"signals?count=400&length={length}", "train", ("signal", "label")).fetch(range(400))
        for label, distance in enumerate(signals.DISTANCES):
            wave = many["signal"][many["label"] == label][:, 0].double()
            spectrum = torch.fft.rfft(wave, 2 * length).abs().square().mean(0)
            overlap = torch.fft.irfft(spectrum)[:length]  # mean autocorrelation
            lags = [round(d * length / 1024) for d in signals.DISTANCES]
            assert lags[int(torch.tensor([float(overlap[lag]) for lag in lags]).argmax())] == lags[label], distance
    tones = data.load("signals:sinusoids?count=80", "train", ("signal", "label")).fetch(range(80))
    wave = tones["signal"][:, 0] - tones["signal"][:, 0].mean(1, keepdim=True)
    strength = torch.stack([_at_period(wave, period) for period in signals.PERIODS], 1)
    assert float((strength.argmax(1) == tones["label"]).float().mean()) > 0.6


def _at_period(wave: Tensor, period: int) -> Tensor:
    angle = 2 * torch.pi * torch.arange(wave.shape[1]) / period
    return (wave @ angle.cos()).square() + (wave @ angle.sin()).square()


def test_solids_are_centred_turned_and_of_their_kind() -> None:
    batch = data.load("solids:400?count=16&noise=0", "train", ("points", "label")).fetch(range(16))
    points = batch["points"]
    assert points.mean(1).abs().max() < 1e-4
    torch.testing.assert_close(points.norm(dim=2).amax(1), torch.ones(16), atol=1e-4, rtol=0)
    near = points.norm(dim=2).amin(1)
    for label in range(4):
        assert int((batch["label"] == label).sum()) == 4
    assert near[batch["label"] == 0].min() > 0.5, "a sphere is hollow"
    assert near[batch["label"] == 3].min() > 0.15, "a torus has a hole"
    spread = torch.linalg.eigvalsh(points.transpose(1, 2) @ points / 400)
    flat = spread[:, 0] / spread[:, 2]
    assert flat[batch["label"] == 3].mean() < 0.5 * flat[batch["label"] == 0].mean(), "a torus is flat"
    axes = torch.linalg.eigh(points.transpose(1, 2) @ points)[1][batch["label"] == 3, :, 0]
    assert (axes @ axes.T).abs().amin() < 0.7, "they lie every way"


def test_squares_move_as_their_label_says() -> None:
    clips = data.load("clips:32?count=48&noise=0&frames=6", "train", ("video", "label", "caption"))
    batch = clips.fetch(range(48))
    light = batch["video"].float().mean(2)  # N, T, H, W
    light = (light - 40).clamp_min(0)
    mass = light.sum((2, 3))
    column = (light.sum(2) * torch.arange(32)).sum(2) / mass
    row = (light.sum(3) * torch.arange(32)).sum(2) / mass
    for i, (label, caption) in enumerate(zip(batch["label"].tolist(), batch["caption"], strict=True)):
        name = (clips.classes or [])[label]
        assert caption.endswith(name)
        dx, dy = (float(v[i, -1] - v[i, 0]) for v in (column, row))
        if name.startswith("moves"):
            along, across = (dx, dy) if name.endswith(("right", "left")) else (dy, dx)
            assert along * (1 if name.endswith(("right", "down")) else -1) > 6, caption
            assert abs(across) < 1.5
        else:
            x, y = column[i] - 15.5, row[i] - 15.5
            turn = (x[:-1] * y[1:] - x[1:] * y[:-1]).mean()  # positive is clockwise, y being downwards
            assert float(turn) * (1 if name == "circles clockwise" else -1) > 0, caption
    assert mass.min() > 0, "the square stays in the picture"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sounds:birds", "'birds' is neither events nor clicks"),
        ("sounds?rate=100", "rate must be at least 2000"),
        ("signals:waves", "none of bumps, sinusoids"),
        ("signals?length=10", "length must be at least 64"),
        ("solids:2", "points must be at least 4"),
        ("clips?frames=1", "frames from 2 to 256"),
    ],
)
def test_impossible_requests_are_named(source: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        data.load(source, "train", ("label",))


def test_windows_of_a_file_keep_to_their_part_and_are_standardised_by_training(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [f"2020-01-{i},{i},{100 - 2 * i}" for i in range(100)]
    path.write_text("\n".join(["date,up,down", *rows]) + "\n")
    parts = {part: data.load(f"series:{path}?length=5", part, ("signal",)) for part in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [56, 16, 16]
    train, test = parts["train"], parts["test"]
    assert train.channels == ["up", "down"]
    values = [torch.cat([part[0]["signal"], part[len(part) - 1]["signal"]], 1) for part in parts.values()]
    plain = [v * torch.tensor(train.std)[:, None] + torch.tensor(train.mean)[:, None] for v in values]
    assert [(round(float(v[0, 0])), round(float(v[0, -1]))) for v in plain] == [(0, 59), (60, 79), (80, 99)]
    torch.testing.assert_close(values[2][0], -values[2][1])
    assert torch.equal(test.windows[0, 0], test[0]["signal"][0])
    few = data.load(f"series:{path}?length=5&count=4", "train", ("signal",))
    assert [int(start) for start in few.starts] == [0, 14, 28, 42]


def test_drawn_series_have_days() -> None:
    drawn = data.load("series?length=240", "train", ("signal",), seed=1)
    wave = torch.stack([drawn[i]["signal"] for i in range(0, len(drawn), 97)]).double()
    wave = wave - wave.mean(2, keepdim=True)
    assert wave.shape[1] == 7
    power = torch.fft.rfft(wave).abs().square().mean((0, 1))
    assert int(power[5:].argmax()) + 5 == 10, "ten days in 240 hours"
    assert len(data.load("series", "val", ("signal",), seed=1)) == 2000 - 119
    assert not torch.equal(data.load("series", "val", ("signal",), seed=2)[0]["signal"][:, :5], wave[0, :, :5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "a heading and one row a time step"),
        ("a,b\nx,y\n", "no column of numbers"),
        ("a\n1\nx\n2\n", "no number where the first one has"),
        ("a\n" + "1\n" * 50 + "nan\n", "row 51 is not finite"),
        ("a\n" + "1\n" * 50, "fewer than a window of 120"),
    ],
)
def test_broken_tables_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        data.load(f"series:{tmp_path / 't.csv'}", "train", ("signal",))


def test_a_table_that_is_not_there_and_joined_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv cannot be read"):
        data.load(f"series:{tmp_path}/none.csv", "train", ("signal",))
    with pytest.raises(UserError, match="would cross a border"):
        data.load("series", "train+val", ("signal",))
