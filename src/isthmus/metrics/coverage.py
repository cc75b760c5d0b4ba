"""Coverage: how many samples may be answered when the answers have to be right so often (arXiv 1312.6082, section 3).

found = coverage(confidence, correct, 0.98)     # found.coverage of all, those with confidence >= found.threshold
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coverage(NamedTuple):
    """The share that is answered and the lowest confidence that is; 0 and infinity where no threshold reaches it."""

    coverage: float
    threshold: float


def coverage_curve(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy of the answers with at least a given confidence, for every confidence that occurs.

    Samples of one confidence are answered together or not at all.

    Args:
        confidence: ``(N,)`` floats.
        correct: ``(N,)``, True or 1 where the answer is right.

    Returns:
        coverage: ``(M,)`` share answered, ascending, M different confidences.
        accuracy: ``(M,)`` share of those that is right.
        threshold: ``(M,)`` lowest confidence answered.

    Raises:
        ValueError: shapes that differ, no sample, or a confidence that is NaN.
    """
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(f"confidence and correct are (N,), got {tuple(confidence.shape)} and {tuple(correct.shape)}.")
    if not len(confidence):
        raise ValueError("coverage of no sample at all; give at least one.")
    if bool(confidence.isnan().any()):
        raise ValueError("a confidence is NaN.")
    ordered, index = confidence.sort(descending=True)
    right = correct[index].to(torch.float64).cumsum(0)
    count = torch.arange(1, len(ordered) + 1, device=ordered.device, dtype=torch.float64)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]  # the end of every run of ties
    return count[last] / len(ordered), (right / count)[last], ordered[last]


def coverage(confidence: Tensor, correct: Tensor, accuracy: float = 0.98) -> Coverage:
    """The largest share that can be answered with at least ``accuracy`` right.

    Choose the threshold on other data than it is used on, and keep it with the model: it depends on the mix of data.

    Raises:
        ValueError: as :func:`coverage_curve`, or an accuracy outside [0, 1].
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy lies in [0, 1], got {accuracy}.")
    share, reached, threshold = coverage_curve(confidence, correct)
    enough = (reached >= accuracy - 1e-12).nonzero()[:, 0]
    if not len(enough):
        return Coverage(0.0, float("inf"))
    return Coverage(float(share[enough[-1]]), float(threshold[enough[-1]]))
