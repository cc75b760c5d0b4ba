"""Points of the plane: where each class lies, and which draws they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load


def both(source: str, split: str = "train", seed: int = 0) -> Any:
    return load(source, split, ("signal", "label"), seed)


def test_a_set_is_a_function_of_seed_and_split() -> None:
    first = both("planar:spiral")
    assert torch.equal(first[7]["signal"], both("planar:spiral")[7]["signal"])
    for other in (both("planar:spiral", "test"), both("planar:spiral", seed=1), both("planar:moon")):
        assert not torch.equal(first[7]["signal"], other[7]["signal"])
    assert (len(first), len(both("planar", "test")), len(both("planar?count=11"))) == (400, 1000, 11)
    assert torch.equal(both("planar:circle?count=9")[5]["signal"], both("planar:circle")[5]["signal"])


def test_circles_lie_at_their_radii_and_no_line_divides_them() -> None:
    data = both("planar:circle", "test").data
    radius = data["signal"].norm(dim=1)
    assert float(radius[data["label"] == 0].mean()) == pytest.approx(1.0, abs=0.05)
    assert float(radius[data["label"] == 1].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(data["signal"].mean(0).abs().max()) < 0.1


def test_arms_of_the_spiral_are_turned_copies() -> None:
    data = both("planar:spiral?arms=4&count=4000").data
    for arm in range(4):
        points = data["signal"][data["label"] == arm]
        angle = torch.tensor(-torch.pi / 2 * arm)
        turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
        assert (points @ turn.T).mean(0) == pytest.approx(data["signal"][data["label"] == 0].mean(0), abs=0.06)
    assert both("planar:spiral").classes == ["arm 0", "arm 1", "arm 2", "arm 3"]


@pytest.mark.parametrize(
    ("source", "message"),
    [("planar:square", "moon, circle, spiral"), ("planar:spiral?arms=1", "two arms"), ("planar?count=1", "each class")],
)
def test_refuses_what_is_no_set(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(source, needs=("signal",))
