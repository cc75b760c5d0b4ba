"""The grammar of an image and first guesses from neighbours."""

from __future__ import annotations

import pytest
import torch

from isthmus.samplers.raster import STARTS, Raster, starts


def test_lines_header_and_end_are_forced_and_the_rest_is_free_among_image_tokens() -> None:
    raster = Raster(2, 3, range(10, 20), end_of_line=5, end=6, header=(7, 8))
    assert len(raster) == 2 + 2 * 4 + 1
    place = torch.arange(13)
    assert raster.forced(place).tolist() == [7, 8, -1, -1, -1, 5, -1, -1, -1, 5, 6, -1, -1]
    allowed = raster.constrain(torch.zeros(13, 30), place).isfinite().sum(-1)
    assert allowed.tolist() == [1, 1, 10, 10, 10, 1, 10, 10, 10, 1, 1, 30, 30], "all is free after the image"


def test_a_forced_token_stays_possible_where_the_model_rules_it_out() -> None:
    raster = Raster(1, 1, [3, 1], end=0)
    out = raster.constrain(torch.full((2, 4), -torch.inf), torch.tensor([1, 0]))
    assert out[0].tolist() == [0.0, -torch.inf, -torch.inf, -torch.inf]
    assert raster.ids(torch.device("cpu"), 4).tolist() == [3, 1]


def test_a_model_with_fewer_tokens_than_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="image tokens beyond the model's 15"):
        Raster(2, 3, range(10, 20)).constrain(torch.zeros(1, 15), torch.tensor([0]))
    with pytest.raises(ValueError, match="raster's token 99 is beyond"):
        Raster(2, 3, range(3), end_of_line=99).constrain(torch.zeros(1, 15), torch.tensor([3]))
    with pytest.raises(ValueError, match="at least one line"):
        Raster(0, 3)
    with pytest.raises(ValueError, match="at least one id"):
        Raster(1, 3, ())


def test_neighbours_to_the_left_and_above() -> None:
    tokens = torch.arange(100, 120)[None]
    best = tokens + 100
    random = torch.tensor([[1, 2, 3, 4, 5]])
    place = torch.arange(6, 11)[None]  # in lines of 4: columns 2, 3, 0, 1, 2 of lines 1, 1, 2, 2, 2
    known = torch.tensor([6])

    def start(scheme: str) -> list[int]:
        return starts(scheme, random, place, 4, known, tokens, best)[0].tolist()  # type: ignore[arg-type]

    assert start("random") == [1, 2, 3, 4, 5]
    assert start("repeat_horizon") == [105, 105, 3, 105, 105], "beyond the known the last known, column 0 random"
    assert start("sample_horizon") == [205, 205, 3, 205, 205]
    assert start("repeat_vertical") == [102, 103, 104, 105, 105]
    assert start("sample_vertical") == [202, 203, 204, 205, 205]


@pytest.mark.parametrize("scheme", STARTS)
def test_nothing_known_yet_keeps_random_guesses(scheme: str) -> None:
    random = torch.tensor([[4, 2]])
    place = torch.tensor([[-1, 0]])  # a header is still to come
    tokens = torch.full((1, 8), 9)
    got = starts(scheme, random, place, 4, torch.tensor([-1]), tokens, tokens)  # type: ignore[arg-type]
    assert got.tolist() == random.tolist()


def test_unknown_schemes_and_missing_rows_are_refused() -> None:
    x = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="fresh tokens start as one of random, repeat_horizon"):
        starts("nearest", x, x, 4, x[0], x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the likeliest tokens"):
        starts("sample_horizon", x, x, 4, x[0], x)
