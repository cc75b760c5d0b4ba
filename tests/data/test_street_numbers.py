"""Composed numbers: a function of the number, digits of the split only, boxes that hold ink, cutting to the box."""

from __future__ import annotations

import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.builtin.street_numbers import NumberBox

_ALL = ("image", "labels", "boxes", "caption")


def test_a_sample_is_a_function_of_its_number() -> None:
    first, second = load("street-numbers:24x40?most=4", "test", _ALL), load("street-numbers:24x40?most=4", "test", _ALL)
    for index in (7, 3):
        a, b = first[index], second[index]
        assert torch.equal(a["image"], b["image"])
        assert a["caption"] == "".join(str(int(d)) for d in a["labels"])
        assert len(a["boxes"]) == len(a["labels"])
        assert a["image"].shape == (3, 24, 40)
    assert not torch.equal(first[7]["image"], load("street-numbers:24x40?most=4", "test", seed=1)[7]["image"])
    assert not torch.equal(first[7]["image"], load("street-numbers:24x40?most=4", "train")[7]["image"])
    lengths = {len(first[i]["labels"]) for i in range(60)}
    assert lengths == {1, 2, 3, 4}


def test_boxes_hold_the_digits() -> None:
    dataset = load("street-numbers:40x60?most=3&warp=0", "test", _ALL)
    for index in range(10):
        sample = dataset[index]
        grey = sample["image"].float().mean(0)
        inside = torch.zeros(40, 60, dtype=torch.bool)
        for left, top, right, bottom in sample["boxes"].int().tolist():
            inside[top:bottom, left:right] = True
        assert grey[inside].mean() > grey[~inside].mean() + 15, "ink is brighter than the wall"


def test_the_box_of_a_number_is_enlarged_and_cut_at_the_border() -> None:
    image = torch.zeros(1, 3, 40, 60)
    image[0, :, 10:30, 20:40] = 1.0
    batch = {
        "image": image,
        "boxes": [torch.tensor([[20.0, 10, 30, 30], [30, 10, 40, 30]])],
        "labels": [torch.tensor([1, 2])],
    }
    cut = NumberBox(26)(batch, torch.Generator())
    assert cut["image"].shape == (1, 3, 26, 26)
    assert cut["image"][0, 0, 3:23, 3:23].mean() > 0.99, "1.3 times the box of 20 pixels"
    assert cut["labels"][0].tolist() == [1, 2], "digits outside a box are still read"
    whole = NumberBox(20)({"image": image, "boxes": [torch.tensor([[0.0, 0, 60, 40]])]}, torch.Generator())
    assert whole["image"].shape == (1, 3, 20, 20)
    assert NumberBox(20)({"image": image}, torch.Generator())["image"].shape == (1, 3, 20, 20)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("street-numbers:4", "8 at least"),
        ("street-numbers:16?most=5", "1 to 2 digits"),
        ("street-numbers?count=-2", "positive"),
    ],
)
def test_refuses_impossible_pictures(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(source)


def test_boxes_beside_the_picture_still_cut_something_out() -> None:
    for box in ([50.0, 2.0, 60.0, 8.0], [2.0, 40.0, 8.0, 44.0], [-30.0, -20.0, -10.0, -5.0]):
        batch = {"image": torch.rand(1, 3, 12, 20), "boxes": [torch.tensor([box])]}
        assert NumberBox(8)(batch, torch.Generator())["image"].shape == (1, 3, 8, 8)
