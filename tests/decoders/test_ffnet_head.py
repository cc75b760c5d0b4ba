"""The up-head on any pyramid: resizing to the finer map, letters, fewer levels, refusals, saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.codec import Codec
from isthmus.decoders.ffnet_head import BRANCHES, FFNetClassifier, FFNetHead, convert_official, resized
from isthmus.encoders.backbone import Backbone


def _levels(*sides: tuple[int, int], channels: int = 6) -> list[torch.Tensor]:
    return [torch.rand(1, channels, h, w) for h, w in sides]


@pytest.mark.parametrize("branch", "ABC")
@pytest.mark.parametrize("segmentation", "ABC")
@pytest.mark.parametrize("mobile", [False, True])
def test_logits_have_the_finest_resolution(branch: str, segmentation: str, mobile: bool) -> None:
    head = FFNetHead((6,) * 4, 5, branch, segmentation, mobile, divisor=8).eval()
    assert head(_levels((17, 25), (9, 13), (5, 7), (3, 4))).shape == (1, 5, 17, 25)
    kernel = {"A": (1, 1), "B": (3, 3), "C": (1, 1)}[segmentation]
    assert head.last[3].kernel_size == kernel, "only the last convolution is 1×1"
    assert head.widths == [w // 8 for w in BRANCHES[branch][1]]


def test_maps_of_one_place_and_batch_of_one() -> None:
    head = FFNetHead((6,) * 4, 1, divisor=8).eval()
    assert head(_levels((2, 2), (1, 1), (1, 1), (1, 1))).isfinite().all()
    classifier = FFNetClassifier((6,) * 4, 3, dropout=0.2, divisor=16)
    assert classifier.eval()(_levels((8, 8), (4, 4), (2, 2), (1, 1))).shape == (1, 3), "the batch stays"


def test_corners_are_aligned_but_in_mobile_variants() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2)
    like = torch.zeros(1, 1, 3, 3)
    assert resized(x, like, False)[0, 0].tolist() == [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]
    assert resized(x, like, True)[0, 0].tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]


def test_serves_encoders_with_fewer_levels(tmp_path: Path) -> None:
    encoder = Backbone("resnet10t", reductions=(8, 32))
    codec = Codec(encoder, decoder=FFNetHead([level.channels for level in encoder.feature_info], 4, divisor=8)).eval()
    images = torch.rand(1, 3, 64, 96)
    assert codec(images).prediction.shape == (1, 4, 8, 12)
    codec.save_pretrained(tmp_path)
    assert torch.equal(Codec.from_pretrained(tmp_path)(images).prediction, codec(images).prediction)
    vit = Backbone("vit_tiny_patch16_224", depth=2, embed_dim=48, img_size=64)
    assert FFNetHead([48], 3, divisor=8).eval()(vit(torch.rand(1, 3, 64, 64))).shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": "D"}, "branch is A, B or C"),
        ({"segmentation": "X"}, "segmentation is A"),
        ({"classes": 0}, "classes is at least 1, got 0"),
        ({"divisor": 0}, "divisor is at least 1, got 0"),
        ({"divisor": 1000}, "divisor must be 1 to 32 for branch B"),
    ],
)
def test_unknown_letters_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FFNetHead(**{"channels": (6,) * 4, "classes": 3, **changes})


def test_other_levels_and_names_are_refused() -> None:
    head = FFNetHead((6,) * 4, 3, divisor=8)
    with pytest.raises(ValueError, match=r"channels \(5, 5\); this head was made for \(6, 6, 6, 6\)"):
        head(_levels((4, 4), (2, 2), channels=5))
    with pytest.raises(ValueError, match="one to four levels"):
        FFNetHead((6,) * 5, 3)
    with pytest.raises(ValueError, match=r"'head\.layers\.9\.weight' is no parameter"):
        convert_official({"head.layers.9.weight": torch.zeros(1)})
