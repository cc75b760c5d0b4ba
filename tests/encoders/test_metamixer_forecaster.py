"""FFNet for time series: patches, padding, normalisation, merging, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.encoders.signals.metamixer_forecaster import (
    GroupedPointwise,
    InTime,
    MetaMixerForecaster,
    RevIN,
    SeriesEncoder,
    convert_official,
)
from isthmus.layers.large_kernel import DepthwiseConv
from tests.layers.test_metamixer import close
from tests.layers.test_reparam import trained

TINY: dict[str, Any] = {"dims": (4, 6), "depths": (1, 1), "kernels": (13, 7), "small_kernels": (5, 3)}


def series(length: int = 50, variables: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, variables, length, generator=torch.Generator().manual_seed(length)).cumsum(-1)


def forecaster(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return trained(MetaMixerForecaster(3, 50, 12, **{**TINY, **kwargs}))


def test_tokens_are_counted_as_they_come() -> None:
    """Also where a stage's tokens are no multiple of the downsampling: the last ones are repeated."""
    torch.manual_seed(0)
    for downsample in (2, 3, 4):
        encoder = SeriesEncoder(3, **TINY, downsample=downsample).eval()
        for length in (4, 5, 6, 11, 49, 50):
            counts = [level.shape[1] for level in encoder(series(length))]
            assert counts == encoder.token_counts(length)
    assert [(i.channels, i.reduction, i.format) for i in SeriesEncoder(3, **TINY).feature_info] == [
        (12, 2, "NTC"),
        (18, 4, "NTC"),
    ]


def test_groups_stay_apart() -> None:
    """Across features of a variable other variables do not matter, across variables of a feature other features."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 5)
    for by, axis in (("variable", 1), ("feature", 2)):
        layer = GroupedPointwise(by, (3, 4), (3, 8) if by == "variable" else (6, 4))  # type: ignore[arg-type]
        other = x.clone()
        other.select(axis, 1).add_(1)
        changed = (layer(other) - layer(x)).abs().sum((0, 3)) > 1e-6
        assert changed.any(2 - axis).tolist() == [i == 1 for i in range(changed.shape[axis - 1])]


def test_depthwise_in_time_is_a_one_dimensional_convolution() -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(12, (1, 13))
    x = torch.randn(2, 3, 4, 9, requires_grad=True)
    wanted = torch.conv1d(x.flatten(1, 2), conv.weight[:, :, 0], conv.bias, padding=6, groups=12)
    close(InTime(conv)(x).flatten(1, 2), wanted)


@pytest.mark.parametrize("subtract_last", [False, True])
def test_normalisation_is_undone(subtract_last: bool) -> None:
    layer = RevIN(3, subtract_last=subtract_last)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5], [1.0], [2.0]]))  # type: ignore[union-attr]
        layer.bias.copy_(torch.tensor([[0.1], [0.0], [-1.0]]))  # type: ignore[union-attr]
        x = series()
        y, told = layer(x)
        close(layer.inverse(y, told), x)
    if subtract_last:
        close(y[..., -1], layer.bias[:, 0].expand(2, 3))  # type: ignore[index]


def test_forecasts_follow_shift_and_scale_of_the_series() -> None:
    model, x = forecaster(), series()
    with torch.no_grad():
        close(model(1000 * x + 500), 1000 * model(x) + 500, 1e-4)


def test_constant_series_have_a_forecast() -> None:
    with torch.no_grad():
        assert torch.isfinite(forecaster()(torch.full((2, 3, 50), 7.0))).all()


@pytest.mark.parametrize("individual", [False, True])
def test_merged_network_gives_the_same_forecasts(individual: bool) -> None:
    """The published merge cannot run."""
    model, x = forecaster(individual=individual), series()
    with torch.no_grad():
        before = model(x)
        assert before.shape == (2, 3, 12)
        count = sum(p.numel() for p in model.parameters())
        model.reparameterize()
        close(model(x), before)
        model.reparameterize()
    assert sum(p.numel() for p in model.parameters()) < count
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        forecaster().train().reparameterize()


def test_it_learns_a_wave() -> None:
    torch.manual_seed(0)
    model = MetaMixerForecaster(2, 24, 6, dims=(8,), kernels=(13,), small_kernels=(3,))
    time = torch.arange(400.0)
    wave = torch.stack([(time / 3).sin(), (time / 2).cos()])
    starts = torch.arange(0, 370)
    windows = torch.stack([wave[:, s : s + 30] for s in starts])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        chosen = windows[torch.randint(0, 370, (64,))]
        optimizer.zero_grad()
        (model(chosen[..., :24]) - chosen[..., 24:]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        error = (model.eval()(windows[..., :24]) - windows[..., 24:]).square().mean()
        repeated = (windows[..., 23:24] - windows[..., 24:]).square().mean()
    assert error < 0.3 * repeated


def test_unused_layers_of_published_checkpoints_are_left_out() -> None:
    model = forecaster(individual=True)
    official = {
        "te_patch.0.weight": torch.zeros(4, 1, 4),
        "lat_layer.0.weight": torch.zeros(8, 8, 1),
        "downsample_layers.2.1.weight": torch.zeros(1),
        "stages.1.blocks.0.token_mixer.dw1.weight": torch.zeros(18, 1, 7),
        **{f"head.linears.{i}.{n}": torch.full((12, 8) if n == "weight" else (12,), float(i))
           for i in range(11) for n in ("weight", "bias")},
    }  # fmt: skip
    converted = convert_official(official)
    assert set(converted) == {"weight", "bias", "encoder.stages.1.0.token_mixer.key.conv.weight"}
    assert converted["encoder.stages.1.0.token_mixer.key.conv.weight"].shape == (18, 1, 1, 7)
    assert converted["weight"][:, 0, 0].tolist() == list(range(11)), "in the order of the variables, 10 behind 9"
    assert model.weight.shape == (3, 12, 6 * 13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetaMixerForecaster(3, 3, 12), "length 3 and horizon 12: a series is read in patches of 4 values"),
        (lambda: MetaMixerForecaster(3, 50, 0), "horizon is at least 1"),
        (lambda: SeriesEncoder(3, kernels=(50,)), "odd kernel"),
        (lambda: SeriesEncoder(3, kernels=(51,), small_kernels=(4,)), "must be odd"),
        (lambda: SeriesEncoder(3, kernels=(51, 51)), "kernels (51, 51), small_kernels (5,): one of each a stage"),
        (lambda: SeriesEncoder(3, patch=2, stride=4), "longer than the patch"),
        (lambda: SeriesEncoder(3, **TINY)(series(3)), "(2, 3, 3); this encoder takes (B, 3, L), and at least 4 values"),
        (lambda: SeriesEncoder(2, **TINY)(series()), "(2, 3, 50); this encoder takes (B, 2, L)"),
        (lambda: forecaster()(series(48)), "(2, 3, 48); this network takes (B, 3, 50)"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
