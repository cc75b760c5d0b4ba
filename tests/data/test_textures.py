"""Textures: one sample a number, classes in turn, the frequency and direction of the class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load


def test_a_sample_is_a_function_of_its_number() -> None:
    first, second = load("textures:24", "train", ("image", "label")), load("textures:24", "train", ("image", "label"))
    assert torch.equal(first[5]["image"], second[5]["image"])
    assert torch.equal(first[5]["image"], first[5]["image"])
    assert not torch.equal(first[5]["image"], load("textures:24", "test")[5]["image"])
    assert not torch.equal(first[5]["image"], load("textures:24", "train", seed=1)[5]["image"])
    assert first[11]["label"] == 3
    assert len(load("textures", "test")) == 500
    assert len(load("textures?count=7")) == 7
    assert first[0]["image"].shape == (3, 24, 24)


def test_power_lies_where_the_class_says() -> None:
    dataset = load("textures:64", "train", ("image", "label"))
    for label, (u, v) in {0: (0.10, 0.0), 2: (0.0, 0.10), 6: (0.0, 0.17)}.items():
        power = 0.0
        for index in range(label, label + 8 * 24, 8):
            image = dataset[index]["image"][0].numpy().astype(float)
            power = power + np.abs(np.fft.fft2(image - image.mean())) ** 2
        place, turned = (round(v * 64), round(u * 64)), (round(u * 64), round(v * 64))
        around = [power[place[0] + i, place[1] + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        elsewhere = [power[turned[0] + i, turned[1] + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        assert sum(around) > 1.5 * sum(elsewhere)


@pytest.mark.parametrize(("source", "message"), [("textures:4", "at least 8"), ("textures?count=-1", "positive")])
def test_refuses_impossible_sizes(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(source)
