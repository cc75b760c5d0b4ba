"""Robust scaling of recordings."""

from __future__ import annotations

import pytest
import torch

from isthmus.layers.robust_scale import RobustScale, baseline


def test_each_recording_gets_median_zero_and_quartiles_one_apart() -> None:
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(60, 3, 50, generator=g) * torch.tensor([1.0, 1e-12, 1e6])[:, None] + 5
    recording = torch.arange(60) % 2
    signal[recording == 1] *= 7
    scaled = RobustScale(3, 2).fit(signal, recording)(signal, recording)
    for one in (0, 1):
        values = scaled[recording == one].transpose(0, 1).flatten(1)
        torch.testing.assert_close(values.median(1).values, torch.zeros(3), atol=0.01, rtol=0)
        spread = values[[0, 2]].quantile(0.75, 1) - values[[0, 2]].quantile(0.25, 1)
        torch.testing.assert_close(spread, torch.ones(2), atol=0.02, rtol=0)


def test_flat_channels_stay_flat_and_outliers_are_clipped() -> None:
    signal = torch.randn(20, 2, 30, generator=torch.Generator().manual_seed(0))
    signal[:, 1] = 3.0
    scale = RobustScale(2).fit(signal)
    assert torch.equal(scale(signal)[:, 1], torch.zeros(20, 30))
    signal[0, 0, 0] = 1e9
    assert float(scale(signal).max()) == 20.0
    assert torch.isfinite(RobustScale(2).fit(torch.zeros(4, 2, 5))(torch.zeros(4, 2, 5))).all()


def test_somebody_unknown_gets_the_mean_scale_and_wrong_numbers_are_refused() -> None:
    scale = RobustScale(1, 2)
    scale.centre[:] = torch.tensor([[0.0], [2.0]])
    assert scale(torch.ones(1, 1, 1), torch.tensor([-1])).item() == 0.0
    with pytest.raises(ValueError, match="scales of 2 recordings, got number 2"):
        scale(torch.ones(1, 1, 1), torch.tensor([2]))
    with pytest.raises(ValueError, match="1 channels"):
        scale.fit(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="NaN"):
        scale.fit(torch.full((1, 1, 3), torch.nan))


def test_the_baseline_is_the_mean_before_the_onset() -> None:
    times = torch.tensor([-0.2, -0.1, 0.0, 0.1])
    out = baseline(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), times)
    assert out.tolist() == [[-1.0, 1.0, 3.0, 5.0]]
    with pytest.raises(ValueError, match="no sample between"):
        baseline(torch.ones(1, 4), times + 1)
