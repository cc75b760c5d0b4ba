"""Mutual information of categories with many variables at once, over the category's entropy.

``nmi_discrete`` counts; ``nmi_continuous`` is the estimate from nearest neighbours for one categorical and one real
variable (Ross, PLoS ONE 2014, equation 2), in one dimension, where sorting finds all neighbours: the same numbers as
scikit-learn's ``mutual_info_classif`` without a tree for every pair.
"""

from __future__ import annotations

import numpy as np
from scipy.special import digamma
from torch import Tensor

CLOSE = 1e-6
"""Floats nearer than this share of a column's range are one value."""


def codes(columns: np.ndarray | Tensor) -> np.ndarray:
    """Values of every column ``(n, K)`` numbered from 0 in ascending order; what rounding alone parts is one value."""
    x = np.asarray(columns, np.float64)
    order = np.argsort(x, 0, kind="stable")
    ordered = np.take_along_axis(x, order, 0)
    span = ordered[-1] - ordered[0]
    # A column that only rounding moves has one value, however that compares to its range; whole numbers are exact.
    still = (span <= CLOSE * np.abs(x).max(0)) & (x != np.round(x)).any(0)
    steps = np.diff(ordered, axis=0, prepend=ordered[:1]) > np.where(still, np.inf, CLOSE * span)
    numbers = np.empty(x.shape, np.int64)
    np.put_along_axis(numbers, order, steps.cumsum(0), 0)
    return numbers


def binned(columns: np.ndarray | Tensor, bins: int) -> np.ndarray:
    """Every column ``(n, K)`` cut into bins of equal width between its ends, numbered from 0; edges go up."""
    x = np.asarray(columns, np.float64)
    low, high = x.min(0), x.max(0)
    edges = np.linspace(low, high, bins + 1)
    return (x[None] >= edges[1:-1, None]).sum(0) * (high > low)


def entropies(numbers: np.ndarray) -> np.ndarray:
    """Entropy in nats of every column of category numbers ``(n, K)``."""
    found = np.empty(numbers.shape[1])
    for k, column in enumerate(numbers.T):
        share = np.bincount(column) / len(column)
        share = share[share > 0]
        found[k] = -(share * np.log(share)).sum()
    return found


def nmi_discrete(sources: np.ndarray | Tensor, latents: np.ndarray | Tensor) -> np.ndarray:
    """``I(s_i; z_j) / H(s_i)`` from counts, ``(S, L)``; NaN for constant sources.

    Args:
        sources: ``(n, S)`` of few values.
        latents: ``(n, L)`` of few values.
    """
    s, z = codes(sources), codes(latents)
    found = np.zeros((s.shape[1], z.shape[1]))
    own = entropies(s)
    for i, source in enumerate(s.T):
        for j, latent in enumerate(z.T):
            width = int(latent.max()) + 1
            joint = np.bincount(source * width + latent, minlength=(int(source.max()) + 1) * width).reshape(-1, width)
            joint = joint / len(source)
            apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
            some = joint > 0
            found[i, j] = (joint[some] * np.log(joint[some] / apart[some])).sum()
    return _shares(found, own)


def nmi_continuous(
    sources: np.ndarray | Tensor, latents: np.ndarray | Tensor, neighbours: int = 10, seed: int = 0
) -> np.ndarray:
    """``I(s_i; z_j) / H(s_i)`` from nearest neighbours, ``(S, L)``; NaN for constant sources.

    Args:
        sources: ``(n, S)`` of few values. Values met once are left out of the estimate; of rarer ones than there are
            neighbours, all are neighbours.
        latents: ``(n, L)`` real.
        neighbours: k, within the same category.
        seed: of the noise of relative size 1e-10 that parts equal values.

    Raises:
        ValueError: not more samples than neighbours.
    """
    s, z = codes(sources), np.asarray(latents, np.float64)
    if len(z) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more samples than that, got {len(z)}.")
    deviation = z.std(0)
    z = (z - z.mean(0)) / np.where(deviation > 0, deviation, 1)
    noise = np.random.default_rng(seed).standard_normal(z.shape)
    z = z + 1e-10 * np.maximum(1, np.abs(z).mean(0)) * noise
    found = np.empty((s.shape[1], z.shape[1]))
    order = np.argsort(z, 0)
    for j, latent in enumerate(z.T):
        ranked = latent[order[:, j]]
        for i in range(s.shape[1]):
            found[i, j] = _ross(ranked, s[order[:, j], i], neighbours)
    return _shares(found, entropies(s))


def _ross(x: np.ndarray, category: np.ndarray, neighbours: int) -> float:
    """Ross's estimate for ascending ``x`` ``(n,)`` and their categories, at least 0."""
    sizes = np.bincount(category)
    kept = sizes[category] > 1
    if not kept.all():
        x, category = x[kept], category[kept]
        sizes = np.bincount(category)
    n = len(x)
    if n == 0:
        return 0.0
    grouped = np.argsort(category, kind="stable")  # category by category, ascending within
    own, size = x[grouped], sizes[category[grouped]]
    begin = (np.cumsum(sizes) - sizes)[category[grouped]]
    place, k = np.arange(n), np.minimum(neighbours, size - 1)
    # The k nearest in a sorted row are a window of k + 1 places; the nearest window has the smallest larger end.
    distance, left = np.full(n, np.inf), np.zeros(n, np.int64)
    for back in range(int(k.max()) + 1):
        first, last = place - back, place - back + k
        inside = (back <= k) & (first >= begin) & (last < begin + size)
        ends = np.maximum(own - own[np.where(inside, first, 0)], own[np.where(inside, last, 0)] - own)
        better = inside & (ends < distance)
        distance[better], left[better] = ends[better], first[better]
    # Counted are all points nearer than the k-th neighbour. That one ends one side of the interval: its own value is
    # the exact bound there, which x ± distance, rounded, is not.
    low, high = own[left], own[left + k]
    leftwards = own - low >= high - own
    low, high = np.where(leftwards, low, own - distance), np.where(leftwards, own + distance, high)
    count = np.searchsorted(x, high, "left") - np.searchsorted(x, low, "right")
    estimate = digamma(n) + (digamma(k) - digamma(size) - digamma(np.maximum(count, 1))).mean()
    return max(0.0, float(estimate))


def _shares(information: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """Mutual information over entropy; rounding below 0 is 0."""
    some = entropy[:, None] > 0
    return np.where(some, np.maximum(information, 0) / np.where(some, entropy[:, None], 1), np.nan)
