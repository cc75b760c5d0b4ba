"""Are these samples from that distribution? Tests and distances for samplers.

``chi_square`` judges counts against exact probabilities, ``same_marginals`` two sets of sequences against each other,
``total_variation`` compares distributions, ``frechet_distance`` and ``sliced_wasserstein`` sets of vectors. ::

    chi_square(torch.bincount(codes, minlength=1024), probabilities).p_value
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChiSquare(NamedTuple):
    """Pearson's statistic, its degrees of freedom, and how often chance alone reaches it."""

    statistic: float
    degrees: int
    p_value: float


def chi_square(counts: Tensor, probabilities: Tensor, least: float = 5.0) -> ChiSquare:
    """Pearson's test that counts come from a distribution.

    Args:
        counts: ``(C,)`` how often every outcome was seen, in independent draws.
        probabilities: ``(C,)``, of sum 1 after scaling.
        least: outcomes expected less often than this are judged together; if they are expected less than this even
            so, they join the rarest of the others. An outcome of probability 0 that was seen makes the p-value 0.

    Raises:
        ValueError: shapes that differ, negative or NaN values, or fewer than two groups left.
    """
    seen, share = counts.double().cpu(), probabilities.double().cpu()
    if seen.shape != share.shape or seen.ndim != 1:
        raise ValueError(f"counts and probabilities must be (C,), got {tuple(seen.shape)} and {tuple(share.shape)}.")
    if not bool((seen >= 0).all() and (share >= 0).all()) or not float(share.sum()) > 0:
        raise ValueError("counts and probabilities must not be negative or NaN, and some must be positive.")
    expected = share / share.sum() * seen.sum()
    if bool(((expected == 0) & (seen > 0)).any()):
        return ChiSquare(float("inf"), int((expected > 0).sum()) - 1, 0.0)
    often = expected >= least
    groups_seen, groups_expected = [seen[often]], [expected[often]]
    rest = expected[~often].sum()
    if rest >= least:
        groups_seen.append(seen[~often].sum()[None])
        groups_expected.append(rest[None])
    elif rest > 0 and bool(often.any()):
        rarest = int(groups_expected[0].argmin())
        groups_seen[0][rarest] += seen[~often].sum()
        groups_expected[0][rarest] += rest
    observed, wanted = torch.cat(groups_seen), torch.cat(groups_expected)
    if len(observed) < 2:
        raise ValueError(f"{len(observed)} groups of outcomes are expected {least:g} times, 2 are needed; draw more.")
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return ChiSquare(statistic, len(observed) - 1, survival(statistic, len(observed) - 1))


def survival(statistic: float, degrees: float) -> float:
    """Probability that a chi-square variable of so many degrees of freedom is at least ``statistic``."""
    from scipy.stats import chi2  # here and not above: it takes longer to import than all else

    return float(chi2.sf(statistic, degrees))


def same_marginals(
    a: Tensor, b: Tensor, vocabulary: int, generator: torch.Generator | None = None, rounds: int = 999
) -> float:
    """p-value of the chi-square of all places' token counts between two sets of sequences.

    Tokens of one sequence depend on each other, so the statistic has no chi-square distribution; it is compared with
    its values when whole sequences change sides at random, which is exact.

    Args:
        a: int64 ``(N, T)``.
        b: int64 ``(M, T)``, drawn independently of ``a``.
        vocabulary: number of tokens V.
        generator: of the changes of sides.
        rounds: how many; the smallest p-value is 1 / (rounds + 1).

    Raises:
        ValueError: shapes that do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"two sets of sequences (N, T) and (M, T) are wanted, got {tuple(a.shape)}, {tuple(b.shape)}.")
    both = torch.cat([a, b]).cpu()
    cells = both + vocabulary * torch.arange(both.shape[1])
    seen, cells = cells.unique(return_inverse=True)  # the others are empty on both sides
    flags = torch.zeros(len(both), len(seen)).scatter_(1, cells, 1.0)
    totals = flags.sum(0)
    order = torch.rand(rounds, len(both), generator=generator).argsort(1)
    sides = torch.zeros(rounds + 1, len(both))
    sides[0, : len(a)] = 1
    sides[1:].scatter_(1, order[:, : len(a)], 1.0)
    first = sides @ flags
    share = len(a) / len(both)
    statistics = ((first - share * totals) ** 2 / totals).sum(1)  # but for a factor that all share
    reached = (statistics[1:] >= statistics[0] * (1 - 1e-6)).sum()
    return (int(reached) + 1) / (rounds + 1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of differences of two distributions ``(…, C)``: ``(…)`` in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if p.shape != q.shape:
        raise ValueError(f"two distributions of one shape are wanted, got {tuple(p.shape)} and {tuple(q.shape)}.")
    return (p - q).abs().sum(-1) / 2


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) of the normal distributions of two sets of vectors, in float64.

    Args:
        a: ``(N, D)``.
        b: ``(M, D)``; for images, features of any encoder.

    Raises:
        ValueError: shapes that do not fit, fewer than two vectors, or NaN.
    """
    a, b = _vectors(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError("covariances need at least two vectors on each side.")
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # Σa Σb and Σa^½ Σb Σa^½ have the same eigenvalues, and the latter is symmetric.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp_min(0))


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, generator: torch.Generator | None = None) -> float:
    """Root mean square, over random directions, of the 2-Wasserstein distance of two sets of vectors along them.

    Args:
        a: ``(N, D)``.
        b: ``(M, D)``; sets of different sizes are compared at as many quantiles as the larger has vectors.
        projections: number of directions.
        generator: of the directions.

    Raises:
        ValueError: shapes that do not fit, or NaN.
    """
    a, b = _vectors(a, b)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0).clamp_min(1e-30)
    lines = [(x @ directions).sort(0).values for x in (a, b)]
    size = max(len(a), len(b))
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    left, right = (x[(at * len(x)).long().clamp_max(len(x) - 1)] for x in lines)
    return float((left - right).square().mean().sqrt())


def _vectors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"two sets of vectors (N, D) and (M, D) are wanted, got {tuple(a.shape)}, {tuple(b.shape)}.")
    a, b = a.double().cpu(), b.double().cpu()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("some of the vectors are NaN or infinite.")
    return a, b
