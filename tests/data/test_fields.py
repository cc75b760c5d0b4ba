"""Noise fields: the same on every machine, terms of one variance each, and what is scored."""

from __future__ import annotations

import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.data.builtin.fields import MARGIN, OFFSETS

ALL = ("signal", "target", "terms", "mask")


def test_a_field_is_a_function_of_seed_split_and_number() -> None:
    fields = load("fields", "test", ALL, seed=3)
    assert len(fields) == 64
    one, many = fields[5], fields.fetch([4, 5])
    assert all(torch.equal(one[name], many[name][1]) for name in ALL)
    for other in (load("fields", "val", ALL, seed=3), load("fields", "test", ALL, seed=4)):
        assert not torch.equal(other[5]["signal"], one["signal"])
    value = float(load("fields", "train", ("signal",), seed=0)[7]["signal"][3, 2, 1])
    assert value == pytest.approx(0.8088646, abs=1e-6), "the same on every machine"


def test_the_target_is_the_sum_of_products_of_shifted_channels() -> None:
    batch = load("fields?size=9", "train", ALL).fetch(range(3))
    assert batch["mask"].sum() == 3 * (9 - 2 * MARGIN) ** 2
    y, x = 4, 5
    assert batch["mask"][0, y, x] == 1
    factors = [batch["signal"][:, i, y + dy, x + dx] for i, (dy, dx) in enumerate(OFFSETS)]
    product, total = torch.ones(3), torch.zeros(3)
    for degree, factor in enumerate(factors):
        product = product * factor
        total = total + product
        torch.testing.assert_close(batch["terms"][:, degree, y, x], product)
    torch.testing.assert_close(batch["target"][:, y, x], total)
    assert max(max(abs(dy), abs(dx)) for dy, dx in OFFSETS) <= MARGIN


def test_every_degree_carries_a_quarter_of_the_variance() -> None:
    batch = load("fields", "train", ALL).fetch(range(600))
    terms = batch["terms"].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(terms.square().mean(0), torch.ones(4), atol=0.12, rtol=0)
    assert torch.corrcoef(terms.T).sub(torch.eye(4)).abs().max() < 0.05
    assert float(batch["signal"].mean()) == pytest.approx(0, abs=0.005)


def test_degrees_are_chosen() -> None:
    both = load("fields", "test", ALL)[0]
    alone = load("fields?degrees=3&channels=5&count=7", "test", ALL)
    assert len(alone) == 7
    assert torch.equal(alone[0]["target"], alone[0]["terms"][2])
    assert torch.equal(both["target"], both["terms"].sum(0))
    assert alone[0]["signal"].shape == (5, 12, 12)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("fields:6", "size 6 leaves no place 3 away from the border; give at least 7"),
        ("fields?channels=3", "the target reads 4 channels; 3 are too few"),
        ("fields?degrees=15", "some of the digits 1 to 4"),
        ("fields?degrees=11", "each once"),
        ("fields?count=-1", "count must be positive"),
    ],
)
def test_a_mistake_is_answered_with_the_fix(source: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(source, needs=("signal",))


def test_it_has_no_pictures() -> None:
    with pytest.raises(UserError, match=r"no column image.*signal"):
        load("fields")
