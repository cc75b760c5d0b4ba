"""Crop selection: exact box sums, content-only scores, agreement as theory says, refusals, export, video, saving."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus.codec import Codec, spec_of
from isthmus.encoders.backbone import Backbone
from isthmus.robustness.crop_selection import (
    SCORES,
    CropSelection,
    box_sums,
    quantise,
    same_crop_probability,
    select,
    smallest_window,
    take,
)
from isthmus.robustness.shifts import EIGHT, FOUR, similarity, stability, view


def _noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_box_sums_are_those_of_unfolded_windows() -> None:
    x = torch.randint(-(10**6), 10**6, (2, 9, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(box_sums(x, (4, 3)), x.unfold(1, 4, 1).unfold(2, 3, 1).sum((-1, -2)))
    assert torch.equal(box_sums(x, (9, 11)), x.sum((1, 2))[:, None, None])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("size", [(5, 4), (2, 3), (1, 1)])
def test_a_score_depends_on_the_crop_alone(name: str, size: tuple[int, int]) -> None:
    pixels = _noise(2, 10).long()
    scores = SCORES[name](pixels, size)
    assert scores.shape == (2, 11 - size[0], 11 - size[1])
    for i, j in itertools.product(range(0, scores.shape[1], 2), range(0, scores.shape[2], 3)):
        alone = SCORES[name](pixels[:, :, i : i + size[0], j : j + size[1]], size)
        assert torch.equal(alone[:, 0, 0], scores[:, i, j])


def test_the_hash_stays_inside_int64_and_looks_uniform() -> None:
    scores = SCORES["hash"](torch.full((1, 4, 40, 40), 2**31 - 2), (20, 20))
    assert (scores >= 0).all()
    assert (scores < 2**31 - 1).all()
    # smooth pictures too: the best position is not drawn to the border
    ramp = (torch.arange(64)[:, None] * 2 + torch.arange(64)).expand(64, 3, 64, 64) + torch.arange(64)[
        :, None, None, None
    ]
    offset = select(SCORES["hash"](ramp.contiguous(), (33, 33))).offset
    assert 10 < float(offset.float().mean()) < 22


def test_views_agree_as_often_as_theory_says() -> None:
    sources = _noise(400, 34)
    chooser = CropSelection(nn.Identity(), 20)
    still = chooser.select(view(sources, 32)).offset
    agreeing = torch.ones(400, dtype=torch.bool)
    for shift in FOUR:
        equal = (chooser.select(view(sources, 32, shift)).offset + torch.tensor(shift) == still).all(1)
        assert abs(float(equal.float().mean()) - 12 / 14) < 0.06
        agreeing &= equal
    assert abs(float(agreeing.float().mean()) - same_crop_probability(13, FOUR)) < 0.08
    assert same_crop_probability(13, FOUR) == pytest.approx((13 - 2) ** 2 / (13**2 + 4 * 13))
    assert same_crop_probability((5, 9), [(1, 2)]) == pytest.approx(4 * 7 / (2 * 45 - 28))
    assert same_crop_probability(3, [(3, 0)]) == 0.0


def test_the_same_crop_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chooser = CropSelection(network, 16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    sources = _noise(30, 42).float() / 255
    still, moved = view(sources, 40), view(sources, 40, (1, 0))
    same = (chooser.select(still).offset == chooser.select(moved).offset + torch.tensor([1, 0])).all(1)
    assert same.sum() > 20
    for image, other in zip(still[same], moved[same], strict=True):
        assert torch.equal(chooser(image[None]), chooser(other[None]))


@pytest.mark.parametrize("crop", [8, 20])
def test_cyclic_selection_ignores_every_cyclic_shift(crop: int) -> None:
    images = _noise(2, 20)
    chooser = CropSelection(nn.Identity(), crop, cyclic=True)
    crops = chooser.crops(images)
    for shift in [(1, 0), (0, 7), (13, 19)]:
        assert torch.equal(chooser.crops(images.roll(shift, (2, 3))), crops)


def test_ties_take_the_first_crop_and_are_told() -> None:
    chosen = CropSelection(nn.Identity(), 6).select(torch.zeros(1, 3, 10, 10))
    assert chosen.offset.tolist() == [[0, 0]]
    assert chosen.tied.tolist() == [True]
    scores = torch.tensor([[[1, 5, 2], [5, 0, 3]]])
    assert select(scores).offset.tolist() == [[0, 1]]


def test_grey_alpha_half_precision_and_lists_of_sizes() -> None:
    for channels in (1, 4):
        assert CropSelection(nn.Flatten(), 6)(torch.rand(2, channels, 9, 12)).shape == (2, channels * 36)
    images = torch.randint(0, 256, (2, 3, 20, 20)) / 255
    chooser = CropSelection(nn.Identity(), 8)
    for dtype in (torch.float16, torch.float64):
        assert torch.equal(chooser.select(images.to(dtype)).offset, chooser.select(images).offset)
    assert chooser([torch.rand(3, 12, 30), torch.rand(3, 25, 9)]).shape == (2, 3, 8, 8)
    resized = CropSelection(nn.Identity(), (8, 6), size=(16, 16))
    assert resized(images).shape == (2, 3, 16, 16)


def test_a_window_keeps_to_the_middle() -> None:
    chooser = CropSelection(nn.Identity(), 6, window=3)
    offset = chooser.select(_noise(40, 20)).offset
    assert offset.min() >= 6
    assert offset.max() <= 8


def test_a_video_keeps_its_crop_while_it_is_in_view() -> None:
    source = _noise(1, 60)
    chooser = CropSelection(nn.Identity(), 20)
    chosen, first, moves = chooser.select(view(source, 40)), None, []
    for step in range(1, 6):
        frame = view(source, 40, (0, step))
        chosen = chooser.select(frame, previous=chosen.score)
        pixels = take(frame, chosen.offset, (20, 20))
        first = pixels if first is None else first
        moves.append(torch.equal(pixels, first))
    assert all(moves)


def test_around_an_encoder_it_is_an_encoder() -> None:
    encoder = CropSelection(Backbone("resnet10t"), 32).eval()
    features = encoder(torch.rand(1, 3, 40, 40))
    for feature, level in zip(features, encoder.feature_info, strict=True):
        assert feature.shape == (1, level.channels, 32 // level.reduction, 32 // level.reduction)


def test_saves_and_loads_inside_a_codec(tmp_path: Path) -> None:
    codec = Codec(CropSelection(Backbone("resnet10t"), 32, score="saliency", mean=(0.5,) * 3, std=(0.5,) * 3)).eval()
    codec.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 40, 40)
    again = Codec.from_pretrained(tmp_path)
    for a, b in zip(codec(images).prediction, again(images).prediction, strict=True):
        assert torch.equal(a, b)
    assert spec_of(codec.encoder)["kwargs"]["score"] == "saliency"


def test_exports() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    robust = CropSelection(network, 12, size=16).eval()
    images = torch.rand(2, 3, 20, 20)
    exported = torch.export.export(robust, (images,)).module()
    other = torch.rand(2, 3, 20, 20)
    assert torch.allclose(exported(other), robust(other), atol=1e-6)


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"30×30 does not fit into a view of 20×20"):
        CropSelection(nn.Identity(), 30)(torch.rand(1, 3, 20, 20))
    with pytest.warns(UserWarning, match="nothing to choose"):
        CropSelection(nn.Identity(), 20)(torch.rand(1, 3, 20, 20))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantise(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="no score 'best'"):
        CropSelection(nn.Identity(), 8, score="best")
    with pytest.raises(ValueError, match="crop is at least 1"):
        CropSelection(nn.Identity(), 0)
    with pytest.raises(ValueError, match="leave out the window"):
        CropSelection(nn.Identity(), 8, window=3, cyclic=True)
    with pytest.raises(ValueError, match="a score is NaN"):
        select(torch.full((1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="lies in"):
        smallest_window(1.0)


def test_how_large_a_window_must_be() -> None:
    assert [smallest_window(c) for c in (0.9, 0.95, 0.99)] == [19, 39, 199]


def test_the_protocol_counts_flips_and_fooled_images() -> None:
    sources = torch.zeros(2, 1, 6, 6)
    sources[0, 0, 1, 2] = 1.0  # enters a 4×4 view's first row
    sources[1, 0, 3, 3] = 1.0

    def first_row(views: torch.Tensor) -> torch.Tensor:
        return (views[:, 0, 0] > 0).any(1).long()

    found = stability(first_row, [{"image": sources, "label": torch.tensor([1, 0])}], 4, FOUR)
    assert found.accuracy == 1.0
    assert found.by_shift[(1, 0)] == 0.5
    assert found.fooled == 0.5
    assert found.flips == pytest.approx(0.25), "down and up of the first picture"
    cyclic = stability(first_row, [{"image": sources}], 4, [(4, 4)], cyclic=True)
    assert cyclic.flips == 0.0
    assert cyclic.accuracy != cyclic.accuracy, "no labels, no accuracy"
    cosine = similarity(lambda v: v, [{"image": torch.rand(3, 3, 10, 10)}], 8, EIGHT)
    assert cosine.shape == (3, 8)
    assert (cosine < 1).all()
    with pytest.raises(ValueError, match="does not fit into sources of 6×6"):
        view(sources, 6, (1, 0))
    with pytest.raises(ValueError, match="at least one shift"):
        stability(first_row, [], 4, [])
    with pytest.raises(ValueError, match="no image"):
        stability(first_row, [], 4)
