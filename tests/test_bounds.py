"""Bounds: what holds, in which sentence it is refused, and that checks cost no heavy import."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from isthmus import bounds
from isthmus.bounds import Count, Natural, Positive, Share, above, at_least, at_most, below, between, checked, one_of
from isthmus.errors import UserError

MIXERS = {"plain": 1, "wide": 2}


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "words"),
    [
        (at_least(1), [1, 1.0, 7], [0, 0.999, -3], "at least 1"),
        (at_most(2.5), [2.5, -7], [2.6], "at most 2.5"),
        (above(0), [1e-9], [0, -1e-9], "above 0"),
        (below(1), [0.999], [1, 2], "below 1"),
        (between(-1, 1), [-1, 0, 1], [-1.1, 1.1], "from -1 to 1"),
        (bounds.share, [0, 1, 0.5], [1.0001, -0.1], "from 0 to 1"),
        (bounds.Range(0, 1, least_open=True), [0.1, 1], [0, 2], "above 0 and at most 1"),
    ],
)
def test_a_range_holds_inside_only_and_says_where_that_is(
    bound: bounds.Range, inside: list[float], outside: list[float], words: str
) -> None:
    assert all(map(bound.holds, inside))
    assert not any(map(bound.holds, [*outside, math.nan, math.inf, -math.inf, "1", None, True, [1]]))
    assert str(bound) == words


def test_one_of_a_table_holds_for_its_keys() -> None:
    assert one_of(MIXERS).holds("wide")
    assert not one_of(MIXERS).holds("wider")
    assert not one_of((1, 2)).holds(True)
    assert str(one_of(MIXERS)) == "one of plain, wide"


@dataclass(frozen=True)
class Inner:
    batch_size: Count = 4
    rate: Positive | None = None


@dataclass(frozen=True)
class Outer:
    widths: tuple[Count, ...] = (8, 16)
    pair: tuple[Share, Natural] = (0.5, 0)
    devices: Count | Literal["auto"] = 1
    mixer: Annotated[str, one_of(MIXERS)] = "plain"
    weights: Mapping[str, Positive] = field(default_factory=dict)
    free: float = math.inf
    inner_part: Inner = Inner()
    more: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"widths": (8, 0)}, "--widths is at least 1, got 0."),
        ({"pair": (0.5, -1)}, "--pair is at least 0, got -1."),
        ({"pair": (math.nan, 1)}, "--pair is from 0 to 1, got nan."),
        ({"devices": "many"}, "--devices is at least 1, got 'many'."),
        ({"devices": 0}, "--devices is at least 1, got 0."),
        ({"mixer": "odd"}, "--mixer is one of plain, wide, got 'odd'."),
        ({"weights": {"a": 1.0, "b": 0.0}}, "--weights is above 0, got 0.0."),
        ({"inner_part": Inner(batch_size=-3)}, "--inner-part.batch-size is at least 1, got -3."),
        ({"inner_part": Inner(rate=math.inf)}, "--inner-part.rate is finite and above 0, got inf."),
        ({"more": (Inner(), Inner(0))}, "--more.batch-size is at least 1, got 0."),
    ],
)
def test_a_field_out_of_bounds_is_named_by_its_flag(settings: dict[str, Any], sentence: str) -> None:
    bounds.check_fields(Outer())
    bounds.check_fields(Outer(devices="auto", inner_part=Inner(rate=0.1)))
    with pytest.raises(UserError) as refused:
        bounds.check_fields(Outer(**settings))
    assert str(refused.value) == sentence


def test_arguments_of_functions_and_constructors_are_checked() -> None:
    @checked
    def halve(width: Count, share: Share = 0.5, *, name: str = "") -> float:
        return width * share

    @checked
    class Layer:
        def __init__(self, width: Count) -> None:
            self.width = width

    assert (halve(4), halve(4, 0.25), Layer(3).width) == (2, 1, 3)
    assert halve.__name__ == "halve"
    with pytest.raises(UserError, match="share is from 0 to 1, got 2"):
        halve(4, share=2)
    with pytest.raises(UserError, match="width is at least 1, got 0"):
        Layer(0)


def test_plain_types_of_arguments_bound_too() -> None:
    @checked
    def made(
        width: int = 1,
        rate: float = 0.1,
        kind: Literal["a", "b"] | None = "a",
        size: int | tuple[int, int] = 2,
        widths: int | Sequence[int] = 4,
    ) -> None:
        pass

    made(-1, -0.5, None, (2, 3), [4, 5])
    made(rate=1, kind="b", size=[2, 3], widths=())  # type: ignore[arg-type]
    for wrong, sentence in (
        ({"width": math.nan}, "width is a whole number, got nan."),
        ({"width": "4"}, "width is a whole number, got '4'."),
        ({"rate": math.inf}, "rate is a finite number, got inf."),
        ({"rate": "0.1"}, "rate is a finite number, got '0.1'."),
        ({"kind": "c"}, "kind is one of a, b, got 'c'."),
        ({"size": (2, 3, 4)}, "size is a list of 2 values, got (2, 3, 4)."),
        ({"size": (2, 0.5)}, "size is a whole number, got 0.5."),
        ({"widths": "45"}, "widths is a whole number, got '45'."),
    ):
        with pytest.raises(UserError) as refused:
            made(**wrong)  # type: ignore[arg-type]
        assert str(refused.value) == sentence
    with pytest.raises(TypeError, match=r"made\(\) got an unexpected keyword argument"):
        made(depth=1)  # type: ignore[call-arg]


def test_bounds_need_nothing_heavy() -> None:
    code = "import sys, isthmus.bounds; sys.exit(bool({'torch', 'numpy', 'tyro'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
