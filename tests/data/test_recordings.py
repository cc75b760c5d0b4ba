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
from isthmus.data.readers.mne_recordings import from_raw
from isthmus.data.readers.recordings import MISSING, from_epochs, read
from isthmus.data.readers.sensors import pick, positions

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
    data = torch.as_tensor(made.get_data(copy=False), dtype=torch.float32)
    torch.testing.assert_close(found.signal, data * 1e15, msg="tesla become femtotesla")
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


def raw(stim: dict[int, int] | None = None, kinds: str = "eeg", channels: int = 5, samples: int = 400) -> Any:
    """Continuous data of ``channels`` sensors with places, and a stim channel of codes at samples."""
    mne = pytest.importorskip("mne")
    names = [f"A{i}" for i in range(channels)]
    info = mne.create_info([*names, *(["STI"] if stim is not None else [])], RATE, kinds)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(len(info["ch_names"]), samples)) * 1e-5
    if stim is not None:
        info = mne.create_info([*names, "STI"], RATE, [kinds] * channels + ["stim"])
        data[-1] = 0
        for sample, code in stim.items():
            data[-1, sample] = code
    made = mne.io.RawArray(data, info, verbose="ERROR")
    angles = np.linspace(0, 2 * np.pi, channels, endpoint=False)
    for number, angle in enumerate(angles):
        made.info["chs"][number]["loc"][:3] = 0.08 * np.cos(angle), 0.08 * np.sin(angle), 0.03 + 0.02 * (number % 2)
    return made


def annotated(made: Any, *told: tuple[float, str]) -> Any:
    import mne

    return made.set_annotations(mne.Annotations([t for t, _ in told], 0.0, [name for _, name in told]))


def labels(found: Any) -> list[str]:
    return [found.classes[number] for number in found.columns["label"].tolist()]


def test_codes_that_last_one_sample_or_change_in_the_next_are_events() -> None:
    found = from_raw(raw({60: 1, 120: 1, 121: 3, 200: 2}), -0.1, 0.5)
    assert not found.continuous
    assert labels(found) == ["1", "1", "3", "2"]


def test_a_silent_stim_channel_leaves_the_word_to_annotations() -> None:
    found = from_raw(annotated(raw({}), (2.0, "dog"), (4.0, "cat"), (5.0, "BAD_blink")), -0.1, 0.5)
    assert labels(found) == ["dog", "cat"]
    both = from_raw(annotated(raw({100: 7}), (2.0, "dog")), -0.1, 0.5)
    assert labels(both) == ["7"], "a stim channel that speaks is believed"


@pytest.mark.parametrize("stim", [None, {}])
@pytest.mark.parametrize("told", [[], [(2.0, "BAD_blink")], [(2.0, "bad segment"), (3.0, "EDGE boundary")]])
def test_without_events_a_recording_stays_whole(stim: dict[int, int] | None, told: list[tuple[float, str]]) -> None:
    found = from_raw(annotated(raw(stim), *told))
    assert found.continuous
    assert found.signal.shape == (1, 5, 400)


def test_annotations_at_one_sample_are_a_trial_each() -> None:
    made = annotated(raw(), (2.0, "dog"), (2.0, "animal"), (2.0, "brown"), (4.0, "cat"), (6.0, "dog"))
    found = from_raw(made, -0.1, 0.5)
    assert sorted(labels(found)[:3]) == ["animal", "brown", "dog"]
    assert labels(found)[3:] == ["cat", "dog"]
    assert torch.equal(found.signal[0], found.signal[1])
    assert not torch.equal(found.signal[0], found.signal[3])


def test_events_without_a_whole_window_are_told_with_the_file(tmp_path: Path) -> None:
    raw({2: 1, 398: 2}).save(tmp_path / "edge_raw.fif", verbose="ERROR")
    with pytest.raises(UserError, match=r"edge_raw\.fif: of 2 events none has the whole window of -0\.5 to 1\.0 s"):
        read(tmp_path / "edge_raw.fif")


@pytest.mark.parametrize(("kind", "unit"), [("eeg", 1e6), ("mag", 1e15), ("grad", 1e13)])
def test_units_do_not_depend_on_the_data(kind: str, unit: float) -> None:
    mne = pytest.importorskip("mne")
    medians = []
    for size in (31 / unit, 33 / unit, 500 / unit):
        made = raw(kinds=kind)
        info = made.info
        epochs = mne.EpochsArray(np.full((2, 5, 20), size), info, verbose="ERROR")
        medians.append(float(from_epochs(epochs).signal.median()))
    assert medians == pytest.approx([31, 33, 500])


@pytest.mark.parametrize("kind", ["eeg", "mag", "grad"])
@pytest.mark.parametrize("name", ["MEG{:03d}", "MEG 0{:03d}", "sensor-{}", "E{}"])
def test_places_come_from_the_recording_whatever_its_channels_are_called(kind: str, name: str) -> None:
    made = raw(kinds=kind, channels=12)
    made.rename_channels({old: name.format(i) for i, old in enumerate(made.ch_names)})
    places = positions(made.info, pick(made.info))
    assert (places >= 0).all()
    assert float(places.min()) == 0
    assert float(places.max()) == 1
    assert len(places.unique(dim=0)) == 12
    turned = places - places.mean(0)
    angles = torch.atan2(turned[:, 1], turned[:, 0])
    true = torch.linspace(0, 2 * torch.pi, 13)[:-1]
    assert ((angles - true + torch.pi).remainder(2 * torch.pi) - torch.pi).abs().max() < 0.3, "as they lie on the head"


@pytest.mark.parametrize("kind", ["eeg", "mag"])
def test_bad_channels_belong_to_the_cap(kind: str) -> None:
    made = raw(kinds=kind, channels=12)
    whole = positions(made.info, pick(made.info))
    made.info["bads"] = [made.ch_names[0], made.ch_names[3]]
    chosen = pick(made.info)
    assert len(chosen) == 10
    torch.testing.assert_close(positions(made.info, chosen), whole[chosen])
    vectorview = epochs()
    before = from_epochs(vectorview).positions
    vectorview.info["bads"] = vectorview.ch_names[:2]
    torch.testing.assert_close(from_epochs(vectorview).positions, before[2:])


def test_a_recording_without_any_place_is_refused() -> None:
    made = raw()
    for channel in made.info["chs"]:
        channel["loc"][:3] = np.nan
    with pytest.raises(UserError, match="holds no places of them; set a montage"):
        from_raw(made)


def test_a_missing_image_is_told_with_its_file_and_column(tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(b"seen")
    paths = ["dog.png", str(tmp_path / "dog.png"), *["cat.png"] * 28]
    arrays(tmp_path / "a.npz", image=paths)
    told = r"a\.npz: its column image names 'cat\.png' for trial 2, and there is no such file"
    with pytest.raises(UserError, match=told):
        load(f"meg:{tmp_path / 'a.npz'}", "all", ("signal", "image"))
    assert len(load(f"meg:{tmp_path / 'a.npz'}", "all", ("signal",))) == 30, "nobody asked for images"
    arrays(tmp_path / "b.npz", image=["dog.png"] * 30)
    found = load(f"meg:{tmp_path / 'b.npz'}", "all", ("signal", "image"))
    assert found[0]["image"] == str(tmp_path / "dog.png"), "paths may be beside the recording"


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
