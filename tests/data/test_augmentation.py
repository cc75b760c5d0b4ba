"""Changes of training images: the published ones in their order, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.codec import UserError
from isthmus.data.transforms import Compose, Flip, Mixup, Normalize, RandomResizedCrop
from isthmus.data.transforms.augment import RandAugment, RandomErase
from isthmus.data.transforms.augmentation import DEIT, IMAGENET, Augmentation, training_transform


def test_published_augmentation_has_the_published_order() -> None:
    """Erased rectangles get noise that is standard normal once normalised, as where erasing comes behind it."""
    train = training_transform((32, 32), 37, 10, DEIT, *IMAGENET, smoothing=0.1)
    assert isinstance(train, Compose)
    kinds = [type(step) for step in train.transforms]
    assert kinds == [RandomResizedCrop, Flip, RandAugment, RandomErase, Normalize, Mixup]
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


def test_an_unknown_policy_is_told_before_training() -> None:
    with pytest.raises(ValueError, match="policy 'strong' is none of timm's RandAugment"):
        training_transform((32, 32), 32, 10, Augmentation(randaugment="strong"), *IMAGENET)
