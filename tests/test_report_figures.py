"""Shared figures show the numbers they were given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.report import figures


def test_confusion_shows_shares_of_the_true_class() -> None:
    figure = figures.confusion(torch.tensor([[3, 1], [0, 0]]), ["0°", "90°"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.75", "0.25", "0.00", "0.00"]


def test_captions_are_green_where_right_and_empty_places_stay_empty() -> None:
    figure = figures.captioned(torch.rand(3, 3, 4, 4), ["a", "b", "c"], [True, False, True], columns=2)
    assert len(figure.axes) == 4
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c", ""]
    assert [axis.title.get_color() for axis in figure.axes[:3]] == ["tab:green", "tab:red", "tab:green"]


def test_filters_are_drawn_for_colour_only() -> None:
    assert figures.first_filters({"grey": nn.Conv2d(1, 4, 3)}) is None
    assert figures.first_filters({"none": nn.Linear(3, 4)}) is None
    figure = figures.first_filters({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 5)})
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]


def test_bars_have_their_values_and_comparisons_stand_back() -> None:
    axis = figures.bars({"probe_a": 0.5, "probe_a_untrained": 0.25}).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [0.5, 0.25]
    assert axis.patches[0].get_facecolor() != axis.patches[1].get_facecolor()


def test_every_image_is_stretched_by_itself() -> None:
    images = torch.stack([torch.full((3, 2, 2), 7.0), torch.linspace(-4, 5, 12).view(3, 2, 2)])
    unit = figures.to_unit(images)
    assert not unit[0].any(), "a flat image has no contrast to stretch"
    assert (float(unit[1].min()), float(unit[1].max())) == pytest.approx((0, 1))
