"""Recordings that people have: arrays, MNE's epochs and continuous files, and what is wrong with broken ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.readers.recordings import MISSING, from_epochs, read

RATE = 40.0


def arrays(path: Path, trials: int = 30, sensors: int = 6, **more: Any) -> Path:
    rng = np.random.default_rng(trials)
    signal = rng.normal(size=(trials, sensors, 33)).astype(np.float32)
    extras = {"rate": RATE, "start": -0.1, "positions": rng.random((sensors, 2)), "label": np.arange(trials) % 3}
    np.savez(path, **{"signal": signal, **extras, **more})
    return path


def epochs(trials: int = 12) -> Any:
    mne = pytest.importorskip("mne")
    info = mne.pick_info(mne.channels.read_meg_canonical_info("ctf275", verbose="ERROR"), list(range(0, 274, 30)))
    with info._unlock():
        info["sfreq"] = RATE
    data = np.random.default_rng(0).normal(size=(trials, len(info["ch_names"]), 33)) * 1e-13
    events = np.stack([np.arange(trials) * 50, np.zeros(trials), 1 + np.arange(trials) % 2], 1).astype(int)
    return mne.EpochsArray(data, info, events, tmin=-0.1, event_id={"dog": 1, "cat": 2}, verbose="ERROR")


def test_arrays_are_read_with_what_they_know_of_each_trial(tmp_path: Path) -> None:
    latent = np.random.default_rng(1).normal(size=(30, 4))
    found = read(arrays(tmp_path / "one.npz", latent=latent, stimulus=[f"s{i % 5}" for i in range(30)]))
    assert found.signal.shape == (30, 6, 33)
    assert found.rate == pytest.approx(RATE)
    assert float(found.times[0]) == pytest.approx(-0.1)
    assert found.columns["stimulus"].tolist() == [i % 5 for i in range(30)]
    assert found.columns["latent"].shape == (30, 4)
    np.save(tmp_path / "bare.npy", np.zeros((2, 3, 4), np.float32))
    assert read(tmp_path / "bare.npy").signal.shape == (2, 3, 4)


def test_epochs_of_mne_come_with_layout_and_labels(tmp_path: Path) -> None:
    made = epochs()
    found = from_epochs(made)
    assert found.classes == ("cat", "dog")
    assert found.columns["label"].tolist() == [1, 0] * 6
    assert float(found.positions.min()) >= 0
    assert float(found.positions.max()) == 1
    assert 0.1 < float(found.signal.abs().median()) < 10, "tesla become numbers near one"
    made.save(tmp_path / "one-epo.fif", overwrite=True, verbose="ERROR")
    again = read(tmp_path / "one-epo.fif")
    torch.testing.assert_close(again.signal, found.signal, rtol=1e-3, atol=1e-4)
    assert torch.equal(again.positions, found.positions)


def test_continuous_files_are_cut_at_their_events_or_stay_whole(tmp_path: Path) -> None:
    mne = pytest.importorskip("mne")
    info = epochs().info
    raw = mne.io.RawArray(
        np.random.default_rng(0).normal(size=(len(info["ch_names"]), 400)) * 1e-13, info, verbose="ERROR"
    )
    raw.save(tmp_path / "rest_raw.fif", verbose="ERROR")
    whole = read(tmp_path / "rest_raw.fif")
    assert whole.continuous
    assert whole.signal.shape == (1, len(info["ch_names"]), 400)
    raw.set_annotations(mne.Annotations([2.0, 4.0, 6.0], 0.1, ["dog", "cat", "dog"]))
    raw.save(tmp_path / "task_raw.fif", verbose="ERROR")
    cut = read(tmp_path / "task_raw.fif", -0.1, 0.7)
    assert cut.signal.shape[0] == 3
    assert cut.columns["label"].tolist() == [1, 0, 1]


def test_other_times_are_resampled_without_aliases(tmp_path: Path) -> None:
    times = np.arange(-0.2, 0.8, 1 / 200)
    slow, fast = np.sin(2 * np.pi * 3 * times), np.sin(2 * np.pi * 85 * times)
    signal = np.stack([slow, fast])[None].astype(np.float32)
    np.savez(tmp_path / "fast.npz", signal=signal, times=times, positions=np.random.rand(2, 2))  # noqa: NPY002
    wanted = -0.1 + torch.arange(33) / RATE
    found = read(tmp_path / "fast.npz").at(wanted)
    assert torch.equal(found.times, wanted)
    middle = slice(4, -4)
    torch.testing.assert_close(
        found.signal[0, 0, middle], torch.sin(2 * torch.pi * 3 * wanted)[middle], atol=0.05, rtol=0
    )
    assert found.signal[0, 1, middle].abs().max() < 0.1, "85 Hz would come back as 5 Hz"
    with pytest.raises(UserError, match=r"recording covers -0\.200 to 0\.795 s"):
        read(tmp_path / "fast.npz").at(torch.arange(50) / RATE)


def test_files_of_a_folder_are_people_and_fewer_sensors_are_padded(tmp_path: Path) -> None:
    arrays(tmp_path / "a.npz")
    arrays(tmp_path / "b.npz", trials=20, sensors=4)
    whole = load(f"meg:{tmp_path}", "all", ("signal", "subject", "positions", "label"))
    batch = whole.fetch(range(len(whole)))
    assert batch["signal"].shape == (50, 6, 33)
    assert batch["subject"].tolist() == [0] * 30 + [1] * 20
    assert (batch["positions"][30:, 4:] == MISSING).all()
    assert batch["signal"][30:, 4:].abs().sum() == 0
    sizes = [len(load(f"meg:{tmp_path}", split, ("signal",))) for split in ("train", "val", "test")]
    assert sum(sizes) == 50
    assert min(sizes) > 0
    one = load(f"meg:{tmp_path}/a*.npz", "all", ("signal",))
    assert len(one) == 30


def test_words_of_several_files_are_numbered_together(tmp_path: Path) -> None:
    """Numbered file by file, a cat of the one would be a dog of the other."""
    arrays(tmp_path / "a.npz", 4, label=list("yxyx"), subject=["eve"] * 4, stimulus=["p", "q", "p", "q"])
    arrays(tmp_path / "b.npz", 4, label=list("zyzy"), subject=["ann"] * 4, stimulus=["q", "r", "q", "r"])
    whole: Any = load(f"meg:{tmp_path}", "all", ("signal", "subject", "label", "stimulus"))
    batch = whole.fetch(range(8))
    assert whole.classes == ["x", "y", "z"]
    assert batch["label"].tolist() == [1, 0, 1, 0, 2, 1, 2, 1]
    assert batch["stimulus"].tolist() == [0, 1, 0, 1, 1, 2, 1, 2]
    assert whole.people == ("ann", "eve")
    assert batch["subject"].tolist() == [1] * 4 + [0] * 4
    arrays(tmp_path / "c.npz", 4, label=[0, 1, 0, 1], subject=["eve"] * 4, stimulus=["p"] * 4)
    with pytest.raises(UserError, match="label is words in some files and numbers in others"):
        load(f"meg:{tmp_path}", "all", ("signal",))
    arrays(tmp_path / "d.npz", 4, label=[0, 1, 0, 2], classes=["x", "y"])
    with pytest.raises(UserError, match="classes has 2 names, which is too few"):
        read(tmp_path / "d.npz")


def test_parts_are_as_told_or_share_no_stimulus(tmp_path: Path) -> None:
    stimulus = np.arange(60) % 12
    path = arrays(tmp_path / "a.npz", 60, stimulus=stimulus)
    parts = {split: load(f"meg:{path}", split, ("signal", "stimulus")) for split in ("train", "val", "test")}
    seen = [set(part.fetch(range(len(part)))["stimulus"].tolist()) for part in parts.values()]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    assert sum(map(len, parts.values())) == 60
    assert sorted(set().union(*seen)) == list(range(12))
    told = ["test" if i < 20 else "val" if i < 30 else "train" for i in range(60)]
    path = arrays(tmp_path / "b.npz", 60, stimulus=stimulus, split=told)
    assert [len(load(f"meg:{path}", split, ("signal",))) for split in ("train", "val", "test")] == [30, 10, 20]
    arrays(tmp_path / "c.npz", 2, split=["train", "dev"])
    with pytest.raises(UserError, match="split says 'dev'; it may say train, val, test"):
        read(tmp_path / "c.npz")
    with pytest.raises(UserError, match="some files say which split"):
        load(f"meg:{tmp_path}/[ab].npz", "all", ("signal",))


def test_a_rate_resamples_every_file(tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz")
    data: Any = load(f"meg:{path}?rate=20", "all", ("signal",))
    assert data.rate == pytest.approx(20)
    assert data[0]["signal"].shape == (6, 17)
    for options in ("rate=fast", "rate=-1", "start=1&stop=0"):
        with pytest.raises(UserError, match="start"):
            load(f"meg:{path}?{options}", "all", ("signal",))


def test_a_missing_mne_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one-epo.fif").write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "mne", None)
    with pytest.raises(UserError, match=r"pip install 'isthmus\[brain\]'"):
        read(tmp_path / "one-epo.fif")


def test_broken_recordings_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(arrays(tmp_path / "whole.npz").read_bytes()[:100])
    (tmp_path / "no.fif").write_bytes(b"nothing")
    (tmp_path / "text.txt").write_text("hello")
    np.savez(tmp_path / "flat.npz", signal=np.zeros((3, 4)))
    np.savez(tmp_path / "objects.npz", signal=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "nan.npz", signal=np.full((2, 3, 4), np.nan))
    for name, told in (
        ("cut.npz", "cannot be read|damaged"),
        ("text.txt", r"no recording that can be read; known are \.fif"),
        ("flat.npz", r"\(trials, channels, samples\) called signal; it has a signal of shape \(3, 4\)"),
        ("objects.npz", "damaged or holds objects"),
        ("nan.npz", "2 of 2 trials have NaN"),
        ("absent.npz", "there is no recording"),
        ("no.fif", r"no \.fif of epochs or continuous data"),
    ):
        if name.endswith(".fif"):
            pytest.importorskip("mne")
        with pytest.raises(UserError, match=told):
            read(tmp_path / name)
    for extra, told in (({"label": [1, 2]}, "label has 2 entries"), ({"times": [1.0, 2.0]}, r"times must be \(33,\)")):
        with pytest.raises(UserError, match=told):
            read(arrays(tmp_path / "odd.npz", **extra))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.fif"):
        load(f"meg:{tmp_path / 'empty'}", "train", ("signal",))
