"""What recipes of image classification share: the published augmentation, in its order and with its parts."""

from __future__ import annotations

import pytest
import torch

from isthmus.data.augment import RandAugment, RandomErase
from isthmus.data.transforms import CenterCrop, Compose, Flip, Mixup, Normalize, RandomResizedCrop, Resize
from isthmus.recipes._image_classification import DEIT, Augmentation, transforms


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


def test_an_unknown_policy_is_told_before_training() -> None:
    with pytest.raises(ValueError, match="policy 'strong' is none of timm's RandAugment"):
        transforms(32, 10, Augmentation(randaugment="strong"))
