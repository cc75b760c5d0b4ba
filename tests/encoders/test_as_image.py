"""Other modalities as images: where each value lands, and one network for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.codec import Codec, build, spec_of
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.as_image import (
    AsImage,
    AudioImage,
    PointImage,
    SeriesImage,
    VideoImage,
    augment_spectrogram,
    rotate_points,
    splat_points,
)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def encoder(channels: int) -> Backbone:
    sizes: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16), "kernel_sizes": ((3,), (7,), (7,), (3,))}
    return Backbone("unireplknet_a", in_chans=channels, **sizes)


MODALITIES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], dict[str, tuple[int, ...]], int]] = {
    # adapter, its channels, input shape, conditions, tokens
    "audio": (lambda: AudioImage(8000, 32, 64), 1, (2, 8000), {}, 2),
    "video": (lambda: VideoImage("tile"), 3, (2, 3, 4, 32, 16), {}, 2),
    "points": (lambda: PointImage(2, 64, neighbours=4, channels=8), 3, (2, 50, 3), {}, 8),
    "series": (lambda: SeriesImage(3, 16, 64), 1, (2, 16, 3), {}, 1),
    "stations": (
        lambda: SeriesImage(3, 16, 64, calendar=4, coordinates=6),
        1,
        (2, 16, 3),
        {"calendar": (2, 16, 4), "stations": (4, 3)},
        1,
    ),
}


@pytest.mark.parametrize("name", MODALITIES)
def test_one_network_for_every_modality(name: str, tmp_path: Any) -> None:
    make, channels, shape, conditions, count = MODALITIES[name]
    model = AsImage(make(), encoder(channels))
    condition = {key: _random(*size) for key, size in conditions.items()}
    codec = Codec(model).eval()
    (tokens,) = codec(_random(*shape), condition).prediction
    assert tokens.shape == (2, count, 16)
    assert model.feature_info[0].format == "NTC"
    tokens.sum().backward()
    assert all(p.grad is not None for p in model.adapter.parameters())
    alone = {k: v[: len(v) // 2] if k != "stations" else v for k, v in condition.items()}
    if name != "stations":  # their coordinates are standardised over the batch
        torch.testing.assert_close(codec(_random(*shape)[:1], alone).prediction[0], tokens[:1], atol=1e-4, rtol=1e-4)
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    assert torch.equal(again(_random(*shape), condition).prediction[0], tokens)
    assert build(spec_of(model)).conditions == set(conditions)


def test_audio_is_padded_with_zeros_before_it_is_standardised_and_cut() -> None:
    adapter = AudioImage(8000, 16, 60, mean=-3.0, std=2.0)
    wave = _random(1, 4000)
    picture, bands = adapter(wave), adapter.spectrogram(wave)
    assert bands.shape[1] == 48
    assert torch.equal(picture[0, 0, :, 48:], torch.full((16, 12), 3.0 / 4.0))
    assert torch.equal(picture[0, 0, :, 7], (bands[0, 7] + 3.0) / 4.0)
    assert AudioImage(8000, 16, 20)(wave).shape == (1, 1, 16, 20)
    torch.testing.assert_close(adapter(wave + 5), picture, atol=1e-3, rtol=1e-3)


def test_spectrogram_noise_is_repeatable_and_bounded() -> None:
    picture = torch.ones(4, 1, 16, 40)
    first, second = (
        augment_spectrogram(picture, torch.Generator().manual_seed(3), bands=8, frames=10) for _ in range(2)
    )
    assert torch.equal(first, second)
    hidden = first == 0
    assert hidden.any()
    assert ((first[~hidden] >= 1) & (first[~hidden] <= 1.1)).all()
    assert int(hidden.all(3).sum(2).max()) <= 8
    assert int(hidden.all(2).sum(2).max()) <= 10
    ramp = torch.arange(40.0).expand(2, 1, 16, 40)
    rolled = augment_spectrogram(ramp, torch.Generator().manual_seed(0), bands=0, frames=0, noise=0)
    assert all(torch.equal(r[0, 0].sort().values, torch.arange(40.0)) for r in rolled)


def test_raw_video_is_a_plain_view_and_tiles_are_a_mosaic() -> None:
    clip = torch.arange(4 * 2 * 3).view(1, 1, 4, 2, 3).float()
    assert torch.equal(VideoImage()(clip)[0, 0], clip.view(4, 6))
    mosaic = VideoImage("tile")(clip)[0, 0]
    assert torch.equal(mosaic[:2, :3], clip[0, 0, 0])
    assert torch.equal(mosaic[:2, 3:], clip[0, 0, 1])
    assert torch.equal(mosaic[2:, :3], clip[0, 0, 2])
    with pytest.raises(ValueError, match="5 frames make no square; take 4 or 9"):
        VideoImage()(torch.zeros(1, 1, 5, 2, 2))
    with pytest.raises(ValueError, match="layout"):
        VideoImage("mosaic")  # type: ignore[arg-type]


def test_series_convolution_is_circular_and_sizes_are_checked() -> None:
    layer = SeriesImage(2, 8, 8)
    series = _random(1, 8, 2)
    torch.testing.assert_close(layer.embed(series.roll(3, 1)), layer.embed(series).roll(3, 1))
    with pytest.raises(ValueError, match="dim=12 would"):
        SeriesImage(2, 48, 10)
    with pytest.raises(ValueError, match=r"is not \(B, 8, 2\)"):
        layer(_random(1, 9, 2))
    with pytest.raises(ValueError, match="without its calendar"):
        SeriesImage(2, 8, 8, calendar=4)(series)


def test_views_are_rotations_seen_from_a_distance() -> None:
    points = _random(2, 5, 3)
    seen = rotate_points(points, 10).view(2, 10, 5, 3) - torch.tensor([0, 0, 1.4])
    lengths = points.norm(dim=-1).unsqueeze(1).expand(2, 10, 5)
    torch.testing.assert_close(seen.norm(dim=-1), lengths)
    assert len({tuple(v.flatten().mul(1000).round().tolist()) for v in seen[0]}) == 10


def test_splat_keeps_the_sum_and_stays_in_the_picture() -> None:
    points, features = _random(3, 40, 3), _random(3, 4, 40)
    picture = splat_points(points, features, 20)
    torch.testing.assert_close(picture.sum((2, 3)), 9 * features.sum(2), atol=1e-4, rtol=1e-4)
    corner = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.5, 9.0]]])
    spots = splat_points(corner, torch.tensor([[[1.0, 10.0]]]), 13)[0, 0]
    assert spots[0:3, 3:6].sum() == 9
    assert spots[10:13, 8:11].sum() == 90


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AudioImage(frames=0), "frames is at least 1"),
        (lambda: AudioImage(std=0.0), "std is above 0"),
        (lambda: AudioImage(16000, hop=1e-5), "at least one sample"),
        (lambda: AudioImage()(torch.zeros(16000)), r"waveforms are \(B, L\), not \(16000,\)"),
        (lambda: AudioImage()(torch.zeros(1, 399)), "at least one frame of 400 samples"),
        (lambda: PointImage(1, size=3), "from 4 pixels to the whole picture"),
        (lambda: PointImage(1, size=32, extent=40), "from 4 pixels to the whole picture"),
        (lambda: PointImage(1, neighbours=0), "neighbours is at least 1"),
        (lambda: SeriesImage(0, 8, 8), "channels is at least 1"),
        (lambda: SeriesImage(1, 8, 8, calendar=-1), "calendar is at least 0"),
        (lambda: VideoImage()(torch.zeros(1, 3, 8, 8)), r"a clip is \(B, C, T, H, W\)"),
    ],
)
def test_impossible_settings_and_inputs_are_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cloud_without_extent_is_one_spot_and_small_clouds_have_fewer_neighbours() -> None:
    spot = splat_points(torch.ones(1, 7, 3), torch.ones(1, 2, 7), 12)
    assert int((spot[0, 0] > 0).sum()) == 9
    assert torch.isfinite(PointImage(1, 32, channels=8)(_random(1, 3, 3))).all()
    with pytest.raises(ValueError, match="between 1 and 10"):
        PointImage(11)
    with pytest.raises(ValueError, match=r"\(B, N, 3\)"):
        PointImage(1, 32, channels=8)(_random(1, 5, 2))
    assert math.isclose(float(PointImage(1).std[0]), 0.229, rel_tol=1e-6)
