"""Log-mel spectrograms of sounds whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from isthmus.layers.spectral import log_mel, mel_filters

both = pytest.mark.parametrize("kaldi", [False, True])


def tone(frequency: float, rate: int = 8000, seconds: float = 1.0) -> Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds)) / rate).unsqueeze(0)


@both
def test_a_tone_stands_in_the_band_of_its_frequency(kaldi: bool) -> None:
    for frequency in (300.0, 1000.0, 2500.0):
        spectrum = log_mel(tone(frequency), 8000, 32, kaldi)[0].mean(0)
        mel = [1127 * math.log1p(f / 700) for f in (20.0, frequency, 4000.0)]
        expected = (mel[1] - mel[0]) / (mel[2] - mel[0]) * 33 - 1
        assert abs(int(spectrum.argmax()) - expected) <= 1


def test_number_of_frames() -> None:
    wave = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    assert log_mel(wave, 16000, 128, kaldi=True).shape == (2, 98, 128)
    assert log_mel(wave, 16000, 64).shape == (2, 100, 64)


@both
def test_samples_and_frames_do_not_touch_each_other(kaldi: bool) -> None:
    wave = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    changed = wave.clone()
    changed[1] = 0
    changed[0, 4000:] = 0
    a, b = log_mel(wave, 8000, 16, kaldi), log_mel(changed, 8000, 16, kaldi)
    assert torch.equal(a[0, :47], b[0, :47])
    assert torch.isfinite(b).all()


@both
def test_gradient_reaches_the_wave(kaldi: bool) -> None:
    wave = tone(440).requires_grad_()
    log_mel(wave, 8000, 16, kaldi).sum().backward()
    assert wave.grad is not None
    assert torch.isfinite(wave.grad).all()


def test_plain_filters_cover_every_frequency_between_the_ends_equally() -> None:
    filters = mel_filters(20, 512, 16000, 100.0, 8000.0)
    bins = torch.arange(257) * 16000 / 512
    centres = filters.double() @ bins.double() / filters.sum(1)
    inside = (bins > centres[1]) & (bins < centres[-2])
    torch.testing.assert_close(filters.sum(0)[inside], torch.ones(int(inside.sum()), dtype=torch.float64))


def test_impossible_requests_are_named() -> None:
    with pytest.raises(ValueError, match="at least one frame of 200 samples"):
        log_mel(torch.zeros(1, 100), 8000, 16)
    with pytest.raises(ValueError, match="half the rate"):
        log_mel(torch.zeros(1, 8000), 8000, 16, high=5000)
