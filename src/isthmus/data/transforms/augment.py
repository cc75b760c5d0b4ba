"""Strong augmentation for supervised training: TrivialAugment, RandAugment and random erasing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from isthmus.data.transforms import Transform
from isthmus.layers.random import rows


@dataclass
class TrivialAugment(Transform):
    """One random operation of a random strength for every image (arXiv 2103.10158, the wide space; torchvision's).

    Only ``image`` is changed, although some operations shear, turn or move it: for labels, not for masks or boxes.
    """

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """``image`` ``(B, 3, H, W)``, uint8 or floats in [0, 1]; its dtype stays."""
        return _one_by_one(batch, generator, TrivialAugmentWide())


@dataclass
class RandAugment(Transform):
    """Random operations of one strength for every image (arXiv 1909.13719); timm's, and its names of policies.

    Only ``image`` is changed, although some operations shear, turn or move it: for labels, not for masks or boxes.

    Args:
        policy: ``"rand-m9-mstd0.5-inc1"`` is two operations of strength 9 of 10, give or take a normal deviate of 0.5,
            stronger for larger numbers; what DeiT and its successors train with.
        mean: colour of the places that nothing moves to, in [0, 1].

    Raises:
        ValueError: timm knows no such policy.
    """

    policy: str = "rand-m9-mstd0.5-inc1"
    mean: Sequence[float] = (0.485, 0.456, 0.406)

    def __post_init__(self) -> None:
        try:
            self._augment(32)
        except (AssertionError, AttributeError, ValueError, KeyError) as error:
            raise ValueError(
                f'policy {self.policy!r} is none of timm\'s RandAugment; "rand-m9-mstd0.5-inc1" is one.'
            ) from error

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """``image`` ``(B, 3, H, W)``, uint8 or floats in [0, 1]; its dtype stays."""
        augment = self._augment(min(batch["image"].shape[-2:]))
        return _one_by_one(batch, generator, lambda image: pil_to_tensor(augment(to_pil_image(image))))

    def _augment(self, side: int) -> Callable[[Any], Any]:
        """timm's settings for training at ``side`` pixels: shifts of up to 45 percent, bicubic."""
        return rand_augment_transform(
            self.policy,
            {
                "translate_const": int(side * 0.45),
                "img_mean": tuple(min(255, round(255 * value)) for value in self.mean),
                "interpolation": Resampling.BICUBIC,
            },
        )


@dataclass
class RandomErase(Transform):
    """A rectangle of noise over some of the images (arXiv 1708.04896, with noise for every pixel).

    Args:
        share: of the images that get one.
        area: smallest and largest share of the image that it covers.
        aspect: smallest height over width; the largest is its inverse.
        mean, std: of the noise in every channel, in [0, 1].
    """

    share: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: float = 0.3
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is the part of the images with an erased rectangle, 0 to 1, got {self.share}.")
        if not 0 < self.area[0] <= self.area[1] < 1 or not 0 < self.aspect <= 1:
            raise ValueError(f"area {self.area} and aspect {self.aspect} have to lie between 0 and 1.")

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """``image`` ``(B, 3, H, W)``, floats in [0, 1]; values outside, as normalised noise has them, stay."""
        image = batch["image"]
        if not image.is_floating_point():
            raise ValueError(f"RandomErase takes floats in [0, 1], got {image.dtype}; put it after what resizes.")
        count, channels, height, width = image.shape
        draws = rows(lambda n: torch.rand(n, 5, generator=generator), count, generator)
        chosen, area, aspect, y, x = draws.to(image.device).unbind(1)
        pixels = (self.area[0] + (self.area[1] - self.area[0]) * area) * height * width
        ratio = torch.exp((2 * aspect - 1) * torch.log(torch.tensor(self.aspect)).abs())
        tall = (pixels * ratio).sqrt().round().clamp(1, height).long()
        wide = (pixels / ratio).sqrt().round().clamp(1, width).long()
        top, left = (y * (height - tall + 1)).long(), (x * (width - wide + 1)).long()
        inside = _span(height, top, tall)[:, None, :, None] & _span(width, left, wide)[:, None, None, :]
        inside = inside & (chosen < self.share)[:, None, None, None]
        noise = rows(lambda n: torch.randn(n, channels, height, width, generator=generator), count, generator)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return {**batch, "image": torch.where(inside, (noise * std + mean).to(image), image)}


def _one_by_one(
    batch: Mapping[str, Any], generator: torch.Generator, augment: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The batch with every image, uint8 ``(3, H, W)``, augmented by a library that draws from global generators."""
    image = batch["image"]
    seeds = rows(lambda n: torch.randint(2**62, (n,), generator=generator), len(image), generator)
    changed = []
    with _global_generators_kept():
        for picture, seed in zip(_as_bytes(image), seeds.tolist(), strict=True):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - timm draws from the global generator
            changed.append(augment(picture))
    out = torch.stack(changed)
    return {**batch, "image": out if image.dtype == torch.uint8 else (out / 255).to(image.dtype)}


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Leave the global generators of torch, numpy and Python as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _as_bytes(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _span(size: int, start: Tensor, length: Tensor) -> Tensor:
    """``(B, size)``: whether a position lies in ``[start, start + length)`` of its row."""
    place = torch.arange(size, device=start.device)
    return (place >= start[:, None]) & (place < (start + length)[:, None])
