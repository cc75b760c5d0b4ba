"""Shared figures show the numbers they were given, under names as they are."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.report import figures


def test_confusion_shows_shares_of_the_true_class() -> None:
    figure = figures.confusion_matrix(torch.tensor([[3, 1], [0, 0]]), ["0°", "90°"])
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


NAMES = ["$a$b", "_$_$", r"\frac{", "_hidden", "類別", "line\nbreak", "long " * 30]
IMAGES = torch.rand(len(NAMES), 3, 4, 4, generator=torch.Generator().manual_seed(0))
VALUES = {name: float(number) for number, name in enumerate(NAMES)}
POINTS = {name: [(1.0, value + 1), (10.0, value + 2)] for name, value in VALUES.items()}
DRAWN = {
    "bars": lambda: figures.bars(VALUES, "$"),
    "grouped_bars": lambda: figures.grouped_bars(dict.fromkeys(NAMES, VALUES), "$"),
    "lines": lambda: figures.lines(POINTS, "$x$", "$y$", log_x=True, log_y=True, across={"_$a$b$": 2.0}),
    "scatter": lambda: figures.scatter(POINTS, "$x$", "$y$", diagonal=True),
    "single_points": lambda: figures.scatter({name: points[:1] for name, points in POINTS.items()}, "x", "y"),
    "histogram": lambda: figures.histogram({name: [1, 2, 2] for name in NAMES}, "$"),
    "series": lambda: figures.series(IMAGES[:, 0, 0], IMAGES[:, 0, 1], NAMES, IMAGES[:, 0, 2]),
    "maps": lambda: figures.maps({name: image[0] for name, image in zip(NAMES, IMAGES, strict=True)}, "$m$"),
    "confusion_matrix": lambda: figures.confusion_matrix(torch.eye(len(NAMES)), NAMES),
    "table": lambda: figures.table(dict.fromkeys(NAMES, VALUES)),
    "captioned": lambda: figures.captioned(IMAGES, NAMES),
    "pictures": lambda: figures.pictures(dict.fromkeys(NAMES, IMAGES), titles=NAMES),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_names_of_any_kind_can_be_drawn(kind: str) -> None:
    drawn = matplotlib.image.imread(io.BytesIO(figures.png(DRAWN[kind]())))
    assert drawn.shape[0] > 100
    assert drawn.std() > 0.01


def test_dollars_are_words_also_on_a_figure_of_somebody_elses() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label="$ and $")
    axes.set_xticks([0, 1], ["$_$", r"$\oops$"])
    axes.set_title(r"$\frac{$")
    axes.legend()
    assert figures.png(figure)[:4] == b"\x89PNG"


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_every_colour_has_its_name_in_the_legend_underscores_or_not() -> None:
    assert legend_of(figures.lines({"a": [(0, 1)], "_b": [(0, 2)]}, "x", "y", across={"chance": 0.1})) == [
        "a",
        "_b",
        "chance",
    ]
    assert legend_of(figures.grouped_bars({"a": {"x": 1.0}, "_b": {"x": 2.0}}, "y")) == ["a", "_b"]


def test_a_logarithmic_axis_has_the_numbers_themselves() -> None:
    figure = figures.lines({"a": [(64, 0.1), (128, 0.2), (1024, 0.3)]}, "images", "accuracy", log_x=True)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "128", "1024"]
    assert axes.get_xlabel() == "images"


def test_a_logarithmic_axis_of_many_values_has_round_numbers() -> None:
    figure = figures.lines({"a": [(i, 2.0**-i) for i in range(30)]}, "step", "loss", log_y=True)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) > 3
    assert "0.001" in labels or "0.01" in labels


def test_values_without_a_logarithm_leave_the_axis_linear() -> None:
    assert figures.lines({"a": [(0, 1), (10, 2)]}, "x", "y", log_x=True).axes[0].get_xscale() == "linear"


def test_bars_say_what_is_not_finite() -> None:
    axes = figures.bars({"a": 1.0, "b": float("nan"), "c": float("inf")}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "not finite", "not finite"]


def test_a_group_lacks_the_bars_that_were_not_measured() -> None:
    axes = figures.grouped_bars({"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}, "value").axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 3]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["x", "y"]


def test_signed_maps_share_colours_that_are_white_at_zero() -> None:
    figure = figures.maps({"a": torch.tensor([[-3.0, 1.0]]), "b": torch.tensor([[0.5, 2.0]])}, signed=True)
    assert [image.get_clim() for axes in figure.axes[:2] for image in axes.get_images()] == [(-3, 3), (-3, 3)]


def test_a_map_without_a_number_is_drawn() -> None:
    assert figures.png(figures.maps({"a": torch.full((2, 2), float("nan"))}))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_any_number_of_channels_are_drawn(channels: int) -> None:
    figure = figures.captioned(torch.rand(2, channels, 4, 4), ["a", "b"])
    assert [axes.get_images()[0].get_array().shape for axes in figure.axes] == [(4, 4, 3)] * 2


def test_bytes_are_drawn_as_their_shares_of_255() -> None:
    rows: dict[str, Tensor] = {"a": torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)}
    figure = figures.pictures(rows)
    assert [float(np.mean(axes.get_images()[0].get_array())) for axes in figure.axes] == [0, 1]


def test_many_classes_have_a_readable_matrix() -> None:
    figure = figures.confusion_matrix(torch.eye(300), [f"class {i}" for i in range(300)])
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_xticklabels()) <= 50
    assert max(figure.get_size_inches()) < 15
