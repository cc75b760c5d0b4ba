"""Repeated augmentation: what an epoch visits, and that copies are augmented apart."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import Memory, Repeated, batches, load
from isthmus.data.transforms import Mixup, RandomCrop


def source(count: int = 300) -> Memory:
    return Memory("numbers", {"image": torch.arange(count * 48).remainder(256).byte().view(count, 3, 4, 4)})


def test_an_epoch_is_as_long_and_visits_one_image_of_three_three_times() -> None:
    repeated = Repeated(source(), 3)
    assert len(repeated) == 300
    first, second = repeated.order(0) % 300, repeated.order(1) % 300
    assert Counter(Counter(first.tolist()).values()) == {3: 100}
    assert set(first.tolist()) != set(second.tolist())
    assert len(Repeated(source(10), 3).order(0)) == 10


def test_copies_share_a_batch_and_are_no_neighbours() -> None:
    """Mixup pairs neighbours: it must mix different images."""
    for batch in (next(batches(Repeated(source()), 192, seed=seed)) for seed in range(3)):
        index = batch["index"]
        assert Counter(Counter(index.tolist()).values()) == {3: 64}
        assert (index[::2] != index[1::2]).all()


def test_copies_are_augmented_apart() -> None:
    for prepared in (
        Repeated(source(6), 3),
        Repeated(load("photos").select(range(6)), 3),
    ):  # whole batches, and single samples
        crop = RandomCrop(4, padding=3)
        batch = next(batches(prepared, 6, seed=0, transform=crop))
        found: dict[int, list[torch.Tensor]] = {}
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            found.setdefault(index, []).append(image)
        assert {len(images) for images in found.values()} == {3}
        assert any(not torch.equal(images[0], other) for images in found.values() for other in images[1:])


def test_the_rest_of_the_data_set_is_as_before() -> None:
    plain = source(8)
    repeated = Repeated(plain, 2)
    assert torch.equal(repeated[5]["image"], plain[5]["image"])
    assert int(repeated.fetch([13])["index"]) == 5
    assert repeated.identify(13) == plain.identify(5)
    labelled = Memory("labelled", {"image": plain.data["image"], "label": torch.arange(8) % 2})
    mixed = next(batches(Repeated(labelled, 2), 8, seed=0, transform=Mixup(2)))
    assert mixed["label"].shape == (8, 2)


def test_what_cannot_be_repeated_is_told() -> None:
    with pytest.raises(UserError, match="numbers cannot be repeated 0 times"):
        Repeated(source(), 0)
