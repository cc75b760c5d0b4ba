"""Sound files: WAV of any rate and depth, other formats where soundfile is installed, folders of them."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.sounds import Sounds, decode_sound

TONE = 0.5 * np.sin(2 * np.pi * 100 * np.arange(4000) / 4000)


@pytest.mark.parametrize(
    ("kind", "scale", "shift"),
    [(np.int16, 32767, 0), (np.int32, 2**31 - 1, 0), (np.uint8, 127, 128), (np.float32, 1, 0)],
)
def test_wav_files_of_any_rate_and_depth_are_read(kind: type, scale: float, shift: float, tmp_path: Path) -> None:
    stereo = np.stack([TONE, TONE], 1) * scale + shift
    for samples in (TONE * scale + shift, stereo):
        wavfile.write(tmp_path / "x.wav", 4000, samples.astype(kind))
        wave = decode_sound(tmp_path / "x.wav", 4000)
        np.testing.assert_allclose(wave.numpy(), TONE, atol=0.02)
        halved = decode_sound((tmp_path / "x.wav").read_bytes(), 2000)
        np.testing.assert_allclose(halved.numpy()[100:-100], TONE[::2][100:-100], atol=0.03)


def test_what_is_no_sound_is_said(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "x.wav", 4000, np.zeros(9, np.int16))
    whole = (tmp_path / "x.wav").read_bytes()
    for content, message in (
        (b"", "the file is empty"),
        (b"RIFF", "no WAV file|no sound file"),
        (whole[:20], "no WAV file|no sound file"),
        (b"nothing of the kind", "no WAV file|no sound file"),
    ):
        with pytest.raises(Unreadable, match=message):
            decode_sound(content, 2000)
    wavfile.write(tmp_path / "x.wav", 4000, np.zeros(0, np.int16))
    with pytest.raises(Unreadable, match="no samples"):
        decode_sound(tmp_path / "x.wav", 2000)
    with pytest.raises(Unreadable, match="is no regular file"):
        decode_sound(tmp_path, 2000)


def test_the_package_for_other_formats_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(Unreadable, match=r"for FLAC, MP3 and OGG install soundfile \(pip install 'isthmus\[sound\]'\)"):
        decode_sound(b"fLaC", 2000)


@pytest.mark.skipif(importlib.util.find_spec("soundfile") is None, reason="soundfile is not installed")
@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3", "AIFF"])
def test_other_formats_are_read(kind: str) -> None:
    import soundfile

    time = np.arange(16000) / 16000
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([wave, wave], 1), 16000, format=kind)
    found = decode_sound(buffer.getvalue(), 8000).numpy()
    spectrum = np.abs(np.fft.rfft(found[2000:6000] * np.hanning(4000)))
    assert spectrum.argmax() * 2 == pytest.approx(440, abs=2)
    assert len(found) == pytest.approx(8000, abs=400)
    assert np.abs(found).max() == pytest.approx(0.5, abs=0.05)
    if kind != "AIFF":  # whose samples may end anywhere
        with pytest.raises(Unreadable):
            decode_sound(buffer.getvalue()[:60], 8000)


def test_a_folder_of_sounds_has_classes_and_splits_as_pictures_do(tmp_path: Path) -> None:
    for folder in ("high", "low"):
        (tmp_path / folder).mkdir()
        for number in range(10):
            wavfile.write(tmp_path / folder / f"{number}.wav", 4000, (TONE[: 100 * number] * 9999).astype(np.int16))
    dataset = load(f"folder:{tmp_path}", "all", ("label", "image?", "audio?"))
    assert dataset.columns == ("audio", "label")
    assert dataset.classes == ["high", "low"]
    assert sum(len(load(f"folder:{tmp_path}", part, ("label",))) for part in ("train", "val", "test")) == 20
    waves = Sounds(dataset, 2000, 400)
    assert waves.fetch(range(20))["audio"].shape == (20, 400)
    assert waves.labels.tolist() == [0] * 10 + [1] * 10
    assert waves.skipped == [("high/0.wav", "it holds no samples"), ("low/0.wav", "it holds no samples")]
    with pytest.raises(UserError, match=r"no column image.*it has: audio, label"):
        load(f"folder:{tmp_path}", "all", ("image",))
