"""Retrieval scores: chance where nothing is said, one where all is right, ties by their share."""

from __future__ import annotations

import pytest
import torch

from isthmus.metrics.retrieval import columnwise_correlation, correlation, ranks, topk_accuracy, two_way_identification


def test_perfect_blind_and_reversed_predictions() -> None:
    right = torch.eye(10)
    assert topk_accuracy(right, 1) == two_way_identification(right) == 1.0
    blind = torch.zeros(10, 10)
    assert topk_accuracy(blind, 3) == pytest.approx(0.3)
    assert two_way_identification(blind) == pytest.approx(0.5)
    assert topk_accuracy(-right, 9) == two_way_identification(-right) == 0.0
    assert topk_accuracy(-right, 10) == topk_accuracy(blind, 50) == 1.0


def test_agrees_with_sorting_where_there_are_no_ties() -> None:
    scores = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(60, (40,), generator=torch.Generator().manual_seed(1))
    best = scores.argsort(1, descending=True)
    for k in (1, 5, 17):
        wanted = (best[:, :k] == targets[:, None]).any(1).float().mean()
        assert topk_accuracy(scores, k, targets) == pytest.approx(float(wanted))
    place = (best == targets[:, None]).float().argmax(1)
    assert torch.equal(ranks(scores, targets)[0], place)
    assert two_way_identification(scores, targets) == pytest.approx(float((59 - place).float().mean() / 59))


def test_ties_count_by_the_share_of_orders() -> None:
    scores = torch.tensor([[1.0, 1.0, 2.0, 0.0]])
    assert topk_accuracy(scores, 2, torch.tensor([0])) == pytest.approx(0.5)
    assert topk_accuracy(scores, 1, torch.tensor([0])) == 0.0
    assert two_way_identification(scores, torch.tensor([0])) == pytest.approx((0.5 + 1) / 3)


def test_correlations_are_pearsons() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=g, dtype=torch.float64), torch.randn(5, 30, generator=g, dtype=torch.float64)
    whole = torch.corrcoef(torch.cat([a, b]))
    torch.testing.assert_close(correlation(a, b), whole[:4, 4:])
    torch.testing.assert_close(columnwise_correlation(a.mT, b[:4].mT), whole[:4, 4:8].diagonal())
    flat = torch.ones(1, 30, dtype=torch.float64)
    assert correlation(flat, b).abs().sum() == columnwise_correlation(flat.mT, b[:1].mT).abs().sum() == 0


def test_impossible_questions_are_refused() -> None:
    for arguments, told in (
        ((torch.zeros(3, 2), 1), "2 candidates for 3 predictions"),
        ((torch.zeros(3, 3), 0), "k must be 1 or more"),
        ((torch.full((2, 2), torch.nan), 1), "NaN"),
        ((torch.zeros(2, 2), 1, torch.tensor([0, 2])), "2 columns below 2|targets must be"),
        ((torch.zeros(0, 2), 1), "N and M of 1 or more"),
    ):
        with pytest.raises(ValueError, match=told):
            topk_accuracy(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two candidates or more"):
        two_way_identification(torch.zeros(1, 1))
