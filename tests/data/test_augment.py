"""Strong augmentation depends on the generator alone, keeps shapes, and changes what it says it changes."""

from __future__ import annotations

import pytest
import torch

from isthmus.data.augment import RandomErase, TrivialAugment
from isthmus.layers.random import ShardedGenerator


def _images(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 32, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transform", [TrivialAugment(), RandomErase(share=0.7)])
def test_two_processes_see_what_one_sees(transform: TrivialAugment | RandomErase) -> None:
    image = _images()
    whole = transform({"image": image}, ShardedGenerator(3, "batch"))["image"]
    halves = [
        transform({"image": image[4 * r : 4 * r + 4]}, ShardedGenerator(3, "batch", rank=r, world=2))["image"]
        for r in range(2)
    ]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, transform({"image": image}, ShardedGenerator(4, "batch"))["image"])


def test_trivial_augment_leaves_the_global_generator_alone_and_keeps_the_dtype() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for image in (_images(), (_images() * 255).byte()):
        out = TrivialAugment()({"image": image, "label": torch.arange(8)}, torch.Generator().manual_seed(1))
        assert out["image"].dtype == image.dtype
        assert out["image"].shape == image.shape
        assert not torch.equal(out["image"], image)
    assert torch.equal(torch.rand(3), expected)


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
