"""Coverage: against trying every threshold, ties together, targets that are never reached."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.metrics.coverage import coverage, coverage_curve


def _by_hand(confidence: torch.Tensor, correct: torch.Tensor, accuracy: float) -> tuple[float, float]:
    best = (0.0, math.inf)
    for threshold in confidence.unique():
        kept = confidence >= threshold
        if correct[kept].double().mean() >= accuracy and kept.double().mean() > best[0]:
            best = (float(kept.double().mean()), float(threshold))
    return best


@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.98, 1.0])
def test_is_what_every_threshold_gives(accuracy: float) -> None:
    generator = torch.Generator().manual_seed(3)
    confidence = torch.randint(20, (300,), generator=generator) / 20  # many ties
    correct = torch.rand(300, generator=generator) < confidence
    found = coverage(confidence, correct, accuracy)
    assert found == pytest.approx(_by_hand(confidence, correct, accuracy))


def test_ties_are_kept_or_dropped_together() -> None:
    found = coverage(torch.tensor([0.9, 0.9, 0.5]), torch.tensor([1, 0, 1]), 1.0)
    assert found == (0.0, math.inf)
    share, accuracy, threshold = coverage_curve(torch.tensor([0.9, 0.9, 0.5]), torch.tensor([1, 0, 1]))
    assert share.tolist() == pytest.approx([2 / 3, 1.0])
    assert accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    assert threshold.tolist() == pytest.approx([0.9, 0.5])


def test_refuses_what_has_no_answer() -> None:
    with pytest.raises(ValueError, match="no sample"):
        coverage(torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match="NaN"):
        coverage(torch.tensor([float("nan")]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        coverage(torch.tensor([0.5]), torch.tensor([1]), 98)
    with pytest.raises(ValueError, match=r"\(N,\)"):
        coverage(torch.rand(2, 2), torch.rand(2, 2))
