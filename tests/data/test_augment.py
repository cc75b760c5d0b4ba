"""Strong augmentation depends on the generator alone, keeps shapes, and changes what it says it changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from isthmus.data.transforms import Transform
from isthmus.data.transforms.augment import RandAugment, RandomErase, TrivialAugment
from isthmus.layers.random import ShardedGenerator


def _images(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 32, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transform", [TrivialAugment(), RandAugment(), RandomErase(share=0.7)])
def test_two_processes_see_what_one_sees(transform: Transform) -> None:
    image = _images()
    whole = transform({"image": image}, ShardedGenerator(3, "batch"))["image"]
    halves = [
        transform({"image": image[4 * r : 4 * r + 4]}, ShardedGenerator(3, "batch", rank=r, world=2))["image"]
        for r in range(2)
    ]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, transform({"image": image}, ShardedGenerator(4, "batch"))["image"])


@pytest.mark.parametrize("transform", [TrivialAugment(), RandAugment()])
def test_global_generators_are_left_alone_and_the_dtype_stays(transform: Transform) -> None:
    def draws() -> list[float]:
        return [float(torch.rand(1)), random.random(), float(np.random.rand())]  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002

    seed()
    expected = draws()
    seed()
    for image in (_images(), (_images() * 255).byte()):
        out = transform({"image": image, "label": torch.arange(8)}, torch.Generator().manual_seed(1))
        assert out["image"].dtype == image.dtype
        assert out["image"].shape == image.shape
        assert not torch.equal(out["image"], image)
    assert draws() == expected


def test_rand_augment_is_timms_with_its_strength_and_fill() -> None:
    """Stronger policies move further; what nothing moves to has the mean colour; unknown policies are told."""
    image = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    change = []
    for policy in ("rand-m1-inc1", "rand-m10-inc1"):
        out = RandAugment(policy)({"image": image}, torch.Generator().manual_seed(0))["image"]
        change.append(float((out - image).abs().mean()))
    assert change[0] < 0.7 * change[1]
    shifted = RandAugment("rand-m10-n1-t1", mean=(1.0, 0.0, 0.0))({"image": 0.5 + 0 * image}, torch.Generator())
    filled = (shifted["image"] == torch.tensor([1.0, 0.0, 0.0])[:, None, None]).all(1)
    assert 0 < float(filled.float().mean()) < 0.3
    with pytest.raises(ValueError, match="policy 'rand-x9' is none of timm's RandAugment"):
        RandAugment("rand-x9")


def test_erased_rectangles_cover_the_share_and_the_area_asked_for() -> None:
    image = torch.full((400, 3, 40, 40), 2.0)  # noise never comes out as exactly 2
    out = RandomErase(share=0.25, area=(0.1, 0.2))({"image": image}, torch.Generator().manual_seed(0))["image"]
    erased = (out != 2.0).all(1)
    share = erased.flatten(1).float().mean(1)
    assert 0.18 < float((share > 0).float().mean()) < 0.32
    assert 0.08 < float(share[share > 0].min()) <= float(share.max()) < 0.22
    for places in erased[share > 0][:20]:
        rows, columns = places.any(1).nonzero(), places.any(0).nonzero()
        box = places[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        assert box.all(), "a rectangle without holes"


def test_impossible_settings_and_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        RandomErase(share=1.5)
    with pytest.raises(ValueError, match="area"):
        RandomErase(area=(0.5, 0.1))
    with pytest.raises(ValueError, match="uint8"):
        RandomErase()({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, torch.Generator())
