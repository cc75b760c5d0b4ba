"""Guidance, filters and drawing on any number of axes."""

from __future__ import annotations

import pytest
import torch

from isthmus.metrics.distributions import chi_square
from isthmus.samplers.logits import draw, guide, top_k_top_p


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("k", "p", "temperature"), [(5, None, 1.0), (None, 0.7, 0.8), (9, 0.5, 1.7), (1, None, 1.0)])
def test_filters_are_those_of_transformers_at_every_position(
    k: int | None, p: float | None, temperature: float
) -> None:
    transformers = pytest.importorskip("transformers")
    x = logits(3, 4, 23)
    want = transformers.TemperatureLogitsWarper(float(temperature))(None, x.flatten(0, 1))
    want = want if k is None else transformers.TopKLogitsWarper(k)(None, want)
    want = want if p is None else transformers.TopPLogitsWarper(p)(None, want)
    torch.testing.assert_close(top_k_top_p(x, k, p, temperature), want.view_as(x))


def test_every_row_may_have_its_own_k_and_ties_stay_together() -> None:
    x = logits(2, 3, 10)
    kept = top_k_top_p(x, torch.tensor([[1, 2, 0], [4, 10, 99]])).isfinite().sum(-1)
    assert kept.tolist() == [[1, 2, 10], [4, 10, 10]]
    assert top_k_top_p(torch.tensor([3.0, 1.0, 3.0, 3.0]), 2).isfinite().tolist() == [True, False, True, True]
    assert top_k_top_p(x, 99).isfinite().all()
    assert top_k_top_p(x, p=1e-6).isfinite().sum(-1).eq(1).all(), "one token always stays"


def test_guidance_extrapolates_and_keeps_the_impossible_impossible() -> None:
    c, u = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    torch.testing.assert_close(guide(c, u, 1.0), c)
    torch.testing.assert_close(guide(c, u, 3.0), 3 * c - 2 * u)
    c[0, 0, 1], u[0, 0, 2] = -torch.inf, -torch.inf
    c[0, 0, 3] = u[0, 0, 3] = -torch.inf
    out = guide(c, u, 3.0)[0, 0]
    assert out.isneginf().tolist() == [False, True, True, True, False]
    assert not out.isnan().any()


def test_draws_follow_the_distribution_and_never_take_what_has_no_mass() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw(p.expand(20_000, 6), torch.Generator().manual_seed(0))
    assert chi_square(torch.bincount(drawn, minlength=6), p).p_value > 0.01
    wide = torch.zeros(70_000)
    wide[-3:] = torch.tensor([1e-6, 1.0, 0.0])
    assert draw(wide.expand(50, -1), torch.Generator().manual_seed(1)).eq(69_998).all()
    assert draw(3 * p[None, None], torch.Generator().manual_seed(2)).shape == (1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_top_p(logits(3), temperature=0.0), "temperature must be above 0"),
        (lambda: top_k_top_p(logits(3), p=0.0), r"top-p must lie in \(0, 1\]"),
        (lambda: top_k_top_p(logits(3), k=-1), "top-k must be at least 1"),
        (lambda: guide(logits(3), logits(4), 2.0), "two tensors of one shape"),
    ],
)
def test_impossible_settings_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
