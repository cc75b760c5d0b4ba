"""Ranking: one list, floors, ties, equal shares."""

from __future__ import annotations

import pytest
import torch

from isthmus.compression.ranking import choose, kept, lowest, one_at_a_time

SCORES = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([0.9, 0.15, 0.25, 0.8])}


def test_the_lowest_of_all_layers_go_first() -> None:
    assert lowest(SCORES, 3) == [("a", 0), ("b", 1), ("a", 1)]


def test_a_floor_keeps_every_layer_alive() -> None:
    assert lowest(SCORES, 4, floor=0) == [("a", 0), ("b", 1), ("a", 1), ("b", 2)]
    assert [unit for layer, unit in lowest(SCORES, 5) if layer == "a"] == [0, 1]
    assert [unit for layer, unit in lowest(SCORES, 2, floor=0.6) if layer == "a"] == [0]
    with pytest.raises(ValueError, match="5 can"):
        lowest(SCORES, 6)
    with pytest.raises(ValueError, match="floor"):
        lowest(SCORES, 1, floor=-1)
    assert [kept(10, 0.25), kept(10, 3), kept(2, 3), kept(10, 0)] == [3, 3, 2, 0]


def test_ties_go_by_layer_and_filter() -> None:
    same = {"x": torch.zeros(3), "y": torch.zeros(3)}
    assert lowest(same, 4) == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]


def test_equal_shares_take_from_every_layer() -> None:
    skewed = {"x": torch.arange(10.0), "y": 100 + torch.arange(10.0)}
    plan = lowest(skewed, 10, equal=True)
    assert sorted(layer for layer, _ in plan) == ["x"] * 5 + ["y"] * 5
    assert {layer for layer, _ in lowest(skewed, 9)} == {"x"}


def test_units_that_take_several_filters_count_them() -> None:
    picked = choose([torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 3.0])], [4, 1], 5)
    assert picked == [(0, 0), (1, 0)]


def test_removing_one_at_a_time_shifts_indices() -> None:
    assert one_at_a_time([("b", 5), ("a", 2), ("b", 1), ("b", 3)]) == [("b", 1), ("b", 2), ("b", 3), ("a", 2)]


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        lowest({"a": torch.tensor([0.0, torch.nan])}, 1)
