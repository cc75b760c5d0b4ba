"""How training images are changed: settings, and the transform that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from isthmus.bounds import Count, Natural, Range, Share, at_least, check_made
from isthmus.data.transforms.augment import RandAugment, RandomErase
from isthmus.data.transforms.pictures import (
    CenterCrop,
    Compose,
    Flip,
    Mixup,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Transform,
)

#: Mean and standard deviation of ImageNet's channels.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed; all of it is off by default."""

    crop: Annotated[float, Range(0, 1, least_open=True)] = 1.0
    """Smallest share of a picture that a training crop covers; 1 crops nothing at random."""
    padding: Natural = 0
    """Zeros around a training image before a window of its size is cut out at random."""
    flip: bool = False
    """Mirror left and right at random."""
    mixup: Annotated[float, at_least(0)] = 0.0
    """Strength of mixup."""
    cutmix: Annotated[float, at_least(0)] = 0.0
    """Strength of CutMix."""
    randaugment: str = ""
    """Policy of RandAugment as timm names it, such as rand-m9-mstd0.5-inc1; none without it."""
    erasing: Share = 0.0
    """Share of the images that get a rectangle of noise."""
    repeats: Count = 1
    """Copies of an image in a batch, each changed on its own; an epoch then visits so many times fewer images."""

    def __post_init__(self) -> None:
        check_made(self)


#: What DeiT and those after it train with on ImageNet.
DEIT = Augmentation(crop=0.08, flip=True, mixup=0.8, cutmix=1.0, randaugment="rand-m9-mstd0.5-inc1", erasing=0.25)


def training_transform(
    size: tuple[int, int],
    resized: int | tuple[int, int],
    num_classes: int,
    augmentation: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    smoothing: float = 0.0,
) -> Transform:
    """The transform of training images.

    Args:
        size: rows and columns of what the network sees.
        resized: what pictures are resized to before the middle is cut out, where no crop is drawn at random.
        num_classes: for labels that are mixed.
        augmentation: what is changed.
        mean: of every channel, in [0, 1].
        std: likewise.
        smoothing: ε of soft labels where samples are mixed; elsewhere it belongs to the objective.
    """
    train: list[Transform] = (
        [RandomResizedCrop(size, scale=(augmentation.crop, 1.0))]
        if augmentation.crop < 1
        else [Resize(resized), CenterCrop(size)]
    )
    train += [RandomCrop(size, augmentation.padding)] if augmentation.padding else []
    train += [Flip()] if augmentation.flip else []
    train += [RandAugment(augmentation.randaugment, mean)] if augmentation.randaugment else []
    train += [RandomErase(augmentation.erasing, mean=mean, std=std)] if augmentation.erasing else []
    train += [Normalize(mean, std)]
    mixed = augmentation.mixup or augmentation.cutmix
    train += [Mixup(num_classes, augmentation.mixup, augmentation.cutmix, smoothing)] if mixed else []
    return Compose(train)
