"""How well predictions find what they predict among candidates."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(similarity: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every row, how many candidates score above its own, and how many others score the same.

    Args:
        similarity: ``(N, M)``, higher is nearer.
        targets: int64 ``(N,)``, column of each row's own candidate; the diagonal where left out.

    Returns:
        two int64 ``(N,)``.

    Raises:
        ValueError: fewer candidates than rows need, targets out of range, NaN.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity must be (N, M) with N and M of 1 or more, got {tuple(similarity.shape)}.")
    rows, columns = similarity.shape
    if targets is None:
        if columns < rows:
            raise ValueError(f"there are {columns} candidates for {rows} predictions; give targets, or one for each.")
        targets = torch.arange(rows, device=similarity.device)
    if targets.shape != (rows,) or int(targets.min()) < 0 or int(targets.max()) >= columns:
        raise ValueError(f"targets must be {rows} columns below {columns}, got {tuple(targets.shape)}.")
    if bool(similarity.isnan().any()):
        raise ValueError("the similarity has NaN; a prediction of zero length or with NaN makes one.")
    own = similarity.gather(1, targets[:, None])
    return (similarity > own).sum(1), (similarity == own).sum(1) - 1


def topk_accuracy(similarity: Tensor, k: int = 5, targets: Tensor | None = None) -> float:
    """Share of rows whose own candidate is among the k highest; candidates of equal score take turns.

    So that predictions that say nothing get chance, k / M, a tie counts by the share of its orders that put the own
    candidate among the first k.

    Args:
        similarity: ``(N, M)``, higher is nearer.
        k: how many candidates may come first.
        targets: ``(N,)``; the diagonal where left out.

    Raises:
        ValueError: as :func:`ranks`, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}.")
    above, same = ranks(similarity, targets)
    return float(((k - above) / (same + 1)).clamp(0, 1).double().mean())


def two_way_identification(similarity: Tensor, targets: Tensor | None = None) -> float:
    """Share of pairs (own candidate, another one) in which the own scores higher, over all pairs; a tie is a half.

    Args:
        similarity: ``(N, M)``, such as :func:`correlation` of predicted and true features; M of 2 or more.
        targets: ``(N,)``; the diagonal where left out.

    Raises:
        ValueError: as :func:`ranks`, or a single candidate.
    """
    if similarity.shape[-1] < 2:
        raise ValueError("two-way identification needs two candidates or more.")
    above, same = ranks(similarity, targets)
    others = similarity.shape[1] - 1
    return float(((others - above - same + same / 2) / others).double().mean())


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r between every row of ``a`` ``(N, D)`` and every row of ``b`` ``(M, D)``: ``(N, M)``.

    A row without variance correlates with nothing: 0.
    """
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=1)[:, None] * torch.linalg.vector_norm(b, dim=1)
    return torch.where(norms > 0, a @ b.mT / norms.where(norms > 0, torch.ones_like(norms)), torch.zeros_like(norms))


def columnwise_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each column over samples: two ``(N, D)`` → ``(D,)``; 0 where a column does not vary."""
    a, b = a - a.mean(0), b - b.mean(0)
    norms = torch.linalg.vector_norm(a, dim=0) * torch.linalg.vector_norm(b, dim=0)
    return torch.where(
        norms > 0, (a * b).sum(0) / norms.where(norms > 0, torch.ones_like(norms)), torch.zeros_like(norms)
    )
