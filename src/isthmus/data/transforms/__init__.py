"""What is done to a batch between the source and the network; every transform takes its randomness from a generator."""

from isthmus.data.transforms.pictures import (
    CenterCrop,
    ColorJitter,
    Compose,
    Flip,
    Mixup,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Transform,
    as_floats,
    divided,
    grey,
)

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "Flip",
    "Mixup",
    "Normalize",
    "RandomCrop",
    "RandomResizedCrop",
    "Resize",
    "Transform",
    "as_floats",
    "divided",
    "grey",
]
