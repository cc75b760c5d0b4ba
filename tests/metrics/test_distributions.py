"""Tests and distances: right on what is known, told apart on what differs, and calibrated."""

from __future__ import annotations

import pytest
import torch

from isthmus.metrics.distributions import (
    chi_square,
    frechet_distance,
    same_marginals,
    sliced_wasserstein,
    total_variation,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_chi_square_is_scipys_where_every_outcome_is_frequent() -> None:
    from scipy.stats import chisquare

    counts, share = torch.tensor([30, 50, 20, 100]), torch.tensor([0.2, 0.25, 0.1, 0.45])
    want = chisquare(counts.numpy(), (share * 200).numpy())
    got = chi_square(counts, share)
    assert got.statistic == pytest.approx(float(want.statistic), rel=1e-6)
    assert got.p_value == pytest.approx(float(want.pvalue), rel=1e-6)
    assert got.degrees == 3


def test_rare_outcomes_are_judged_together_or_join_the_rarest() -> None:
    share = torch.tensor([0.5, 0.4, 0.04, 0.03, 0.03])
    together = chi_square(torch.tensor([50, 40, 4, 3, 3]), share)
    assert together.degrees == 2
    assert together.statistic == pytest.approx(0, abs=1e-10)
    joined = chi_square(torch.tensor([50, 48, 2, 0, 0]), torch.tensor([0.5, 0.48, 0.02, 0.0, 0.0]))
    assert joined.degrees == 1
    with pytest.raises(ValueError, match="0 groups of outcomes are expected 5 times, 2 are needed"):
        chi_square(torch.tensor([3, 1]), torch.tensor([0.5, 0.5]))


def test_an_impossible_outcome_that_was_seen_rejects() -> None:
    assert chi_square(torch.tensor([50, 50, 1]), torch.tensor([0.5, 0.5, 0.0])).p_value == 0


def test_p_values_of_true_distributions_are_uniform() -> None:
    share = torch.rand(12, generator=generator()).softmax(0)
    draws = torch.multinomial(share.expand(300, -1), 400, replacement=True, generator=generator(1))
    p = torch.tensor([chi_square(torch.bincount(row, minlength=12), share).p_value for row in draws])
    assert float((p < 0.1).float().mean()) == pytest.approx(0.1, abs=0.06)
    assert float(p.mean()) == pytest.approx(0.5, abs=0.06)


def sequences(count: int, seed: int, bias: float = 0.0) -> torch.Tensor:
    """Tokens that depend strongly on each other: all of a sequence lean to one side."""
    lean = torch.randn(count, 1, generator=generator(seed))
    noise = torch.randn(count, 20, generator=generator(seed + 1000))
    return (2 * lean + noise + bias > 0).long() + (noise > 1).long()


def test_marginals_of_dependent_tokens_are_judged_fairly() -> None:
    p = [same_marginals(sequences(60, 2 * i), sequences(60, 2 * i + 1), 3, generator(i), rounds=99) for i in range(60)]
    rejected = sum(value < 0.1 for value in p)
    assert 0 < rejected < 15, "a chi-square distribution would reject most of these"
    assert same_marginals(sequences(200, 1), sequences(150, 2, bias=1.5), 3, generator()) < 0.01
    assert same_marginals(sequences(20, 1), sequences(20, 1), 3, generator()) == 1.0


def test_frechet_distance_of_normal_distributions_is_known() -> None:
    a = torch.randn(20_000, 2, generator=generator(), dtype=torch.float64)
    b = torch.tensor([3.0, 0.0]) + a @ torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert frechet_distance(a, b) == pytest.approx(9 + 1, abs=0.3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a[:2], a[:2]) == pytest.approx(0, abs=1e-9), "covariances without full rank"
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_sliced_wasserstein_of_a_shift_is_known() -> None:
    a = torch.randn(500, 3, generator=generator())
    shift = torch.tensor([1.0, 2.0, 2.0])
    assert sliced_wasserstein(a, a + shift, 2000, generator()) == pytest.approx(3 / 3**0.5, rel=0.05)
    assert sliced_wasserstein(a, a[torch.randperm(500, generator=generator())]) == pytest.approx(0, abs=1e-6)
    assert sliced_wasserstein(a, a[:100], generator=generator()) < 0.5, "sets of different sizes"


def test_total_variation_lies_between_equal_and_disjoint() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    assert total_variation(p, q).tolist() == [0.0, 1.0]


def test_bad_input_is_refused() -> None:
    x = torch.zeros(3, 2)
    for call, message in (
        (lambda: chi_square(torch.ones(3), torch.ones(4)), r"must be \(C,\)"),
        (lambda: chi_square(torch.tensor([1.0, -1.0]), torch.ones(2)), "not be negative"),
        (lambda: total_variation(torch.ones(2), torch.ones(3)), "one shape"),
        (lambda: frechet_distance(x, torch.zeros(3, 4)), "two sets of vectors"),
        (lambda: frechet_distance(x[:1], x), "at least two vectors"),
        (lambda: sliced_wasserstein(x, x * torch.nan), "NaN or infinite"),
        (lambda: same_marginals(x.long(), x.long()[:, :1], 3), "two sets of sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
