"""What recipes of image classification share: the published augmentation, in its order and with its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.transforms import CenterCrop, Compose, Flip, Mixup, Normalize, RandomResizedCrop, Resize
from isthmus.data.transforms.augment import RandAugment, RandomErase
from isthmus.recipes._image_classification import (
    DEIT,
    Augmentation,
    all_labels,
    first,
    subset,
    transforms,
    usual_crop,
)


def test_published_augmentation_has_the_published_order() -> None:
    """Erased rectangles get noise that is standard normal once normalised, as where erasing comes behind it."""
    train, test = transforms(32, 10, DEIT, smoothing=0.1, crop_pct=0.875)
    assert isinstance(train, Compose)
    assert isinstance(test, Compose)
    kinds = [type(step) for step in train.transforms]
    assert kinds == [RandomResizedCrop, Flip, RandAugment, RandomErase, Normalize, Mixup]
    assert [type(step) for step in test.transforms] == [Resize, CenterCrop, Normalize]
    _, _, augment, erase, normalize, mix = train.transforms
    assert isinstance(augment, RandAugment)
    assert augment.policy == "rand-m9-mstd0.5-inc1"
    assert isinstance(erase, RandomErase)
    assert isinstance(normalize, Normalize)
    assert erase.share == 0.25
    assert (erase.mean, erase.std) == (normalize.mean, normalize.std)
    assert isinstance(mix, Mixup)
    assert (mix.mixup, mix.cutmix, mix.smoothing) == (0.8, 1.0, 0.1)
    batch = {"image": torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0)), "label": torch.arange(4)}
    out = train(batch, torch.Generator().manual_seed(0))
    assert out["image"].shape == (4, 3, 32, 32)
    assert out["label"].sum(1).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 0}, "crop is above 0 and at most 1"),
        ({"crop": 2}, "crop is above 0 and at most 1"),
        ({"padding": -2}, "padding is at least 0, got -2"),
        ({"mixup": -1}, "mixup is at least 0, got -1"),
        ({"cutmix": float("nan")}, "cutmix is at least 0, got nan"),
        ({"erasing": 3}, "erasing is from 0 to 1"),
        ({"repeats": 0}, "repeats is at least 1"),
    ],
)
def test_impossible_augmentation_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augmentation(**change)


def test_impossible_transforms_are_refused() -> None:
    with pytest.raises(UserError, match="size 0: a picture is at least 1 pixel"):
        transforms(0, 10)
    with pytest.raises(UserError, match="smoothing 2 of labels"):
        transforms(8, 10, smoothing=2)
    with pytest.raises(UserError, match="standard deviation of every channel must be above 0"):
        transforms(8, 10, std=(0.0, 1.0, 1.0))


def test_shares_of_a_source_have_their_share_of_every_class() -> None:
    source = load("digits", "train", ("image", "label"))
    labels = all_labels(load("digits", "train", ("label",)))
    assert np.array_equal(labels, source.fetch(np.arange(len(source)))["label"].numpy())
    counts = np.bincount(labels)
    for share, seed in ((0.05, 0), (0.1, 3), (0.1, 9), (0.5, 1)):
        chosen = subset(source, share, seed, labels=labels)
        taken = chosen.fetch(np.arange(len(chosen)))
        assert len(chosen) == round(share * len(source)) == len(set(taken["index"].tolist()))
        assert np.abs(np.bincount(taken["label"].numpy(), minlength=10) - share * counts).max() <= 1.5
    few, more = (subset(source, share, 0, labels=labels) for share in (0.05, 0.1))
    assert {int(s["index"]) for s in few.samples(range(len(few)))} < {
        int(s["index"]) for s in more.samples(range(len(more)))
    }
    uneven = np.concatenate([np.full(500, 7), np.zeros(757, int)])
    for seed in range(4):
        taken = [uneven[subset(source, 0.01, seed, labels=uneven).number(i)] for i in range(13)]
        assert taken.count(7) in (5, 6), "500 of 1257 images, so 5.2 of 13"


def test_the_first_samples_or_all_of_them() -> None:
    source = load("digits", "test", ("label",))
    assert [len(first(source, number, "test_images")) for number in (0, 5, 10**6)] == [len(source), 5, len(source)]
    with pytest.raises(UserError, match=r"test_images must be 0 \(all of them\) or more, got -1"):
        first(source, -1, "test_images")


def test_pictures_are_cropped_when_measuring_as_is_usual_for_their_size() -> None:
    assert [usual_crop(size) for size in (8, 32, 192, 224, 256, 384)] == [1, 1, 1, 0.875, 0.875, 1]


def test_an_unknown_policy_is_told_before_training() -> None:
    with pytest.raises(ValueError, match="policy 'strong' is none of timm's RandAugment"):
        transforms(32, 10, Augmentation(randaugment="strong"))
