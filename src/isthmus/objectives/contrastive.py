"""Tell each sample's own candidate from the others: CLIP's loss and its published variants, and SigLIP's.

Which side is normalised, whether there is a temperature, and whether both directions count differ from paper to paper
(CLIP, arXiv 2103.00020; speech decoding, arXiv 2208.12266, normalises the candidates alone and has no temperature), so
all three are arguments.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Side = Literal["both", "estimates", "candidates"] | None


def similarity(
    a: Tensor, b: Tensor, scale: Tensor | float = 1.0, normalize: Side = "both", eps: float = 1e-8
) -> Tensor:
    """``scale · <a_i, b_j>`` with one side, both or none divided by its norm.

    Args:
        a: estimates ``(N, …)``; everything behind the first axis counts as one vector.
        b: candidates ``(M, …)``.
        scale: 1 / temperature.
        normalize: whose norms are divided out.
        eps: added to norms.

    Returns:
        ``(N, M)``; in 32 bits for inputs of 16, whose products would overflow.

    Raises:
        ValueError: vectors of different lengths.
    """
    a, b = a.flatten(1), b.flatten(1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"estimates have {a.shape[1]} numbers and candidates {b.shape[1]}; they must agree.")
    if a.dtype in (torch.float16, torch.bfloat16) or b.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    with torch.autocast(a.device.type, enabled=False):
        scores = a @ b.mT
        # Dividing the scores makes no normalised copy of the candidates, which may be many.
        if normalize in ("both", "estimates"):
            scores = scores / (eps + torch.linalg.vector_norm(a, dim=1, keepdim=True))
        if normalize in ("both", "candidates"):
            scores = scores / (eps + torch.linalg.vector_norm(b, dim=1))
    return scale * scores


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float = 1.0,
    normalize: Side = "both",
    symmetric: bool = True,
    targets: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Mean cross entropy of finding each estimate's own candidate among all.

    Args:
        a: estimates ``(N, D)``.
        b: candidates ``(M, D)``, M ≥ N: the first N belong to the estimates, the others are further negatives.
        scale: 1 / temperature; CLIP learns its logarithm from ln(1 / 0.07).
        normalize: see :func:`similarity`.
        symmetric: average with the other direction, an estimate for each candidate; needs M = N.
        targets: int64 ``(N,)``, the place of each estimate's candidate, or probabilities ``(N, M)``, in place of the
            first N.
        eps: added to norms.

    Returns:
        A scalar; zero, with a warning, where there is one candidate, because nothing can be told from it.

    Raises:
        ValueError: fewer candidates than estimates, or both directions with further negatives.
    """
    scores = similarity(a, b, scale, normalize, eps)
    count, candidates = scores.shape
    if targets is None and candidates < count:
        raise ValueError(
            f"there are {candidates} candidates for {count} estimates; give each estimate its candidate first, then "
            "further negatives."
        )
    if candidates == 1:
        warnings.warn("a contrastive loss over one candidate is zero; use batches of two or more.", stacklevel=2)
        return scores.sum() * 0.0
    if symmetric and candidates != count:
        raise ValueError(
            f"both directions need as many candidates as estimates, got {candidates} and {count}; set symmetric=False."
        )
    own = torch.arange(count, device=scores.device) if targets is None else targets
    loss = F.cross_entropy(scores, own)
    if not symmetric:
        return loss
    back = own
    if own.ndim == 2:
        back = own.mT / own.sum(0).clamp_min(eps)[:, None]
    elif targets is not None:
        back = own.argsort()
        if not torch.equal(own[back], torch.arange(count, device=own.device)):
            raise ValueError("both directions need targets that name every candidate once, or probabilities.")
    return (loss + F.cross_entropy(scores.mT, back)) / 2


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float = 10.0,
    bias: Tensor | float = -10.0,
    normalize: Side = "both",
    same: float | None = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    """Every pair judged by itself (SigLIP, arXiv 2303.15343): the sum of binary cross entropies.

    Args:
        a, b, normalize, eps: as in :func:`contrastive_loss`.
        scale, bias: of the logits; SigLIP learns ln(10) and -10.
        same: candidates whose cosine with an estimate's own is at least this are right as well (duplicates); ``None``
            counts the own alone.

    Raises:
        ValueError: fewer candidates than estimates.
    """
    logits = similarity(a, b, scale, normalize, eps) + bias
    count, candidates = logits.shape
    if candidates < count:
        raise ValueError(f"there are {candidates} candidates for {count} estimates; there must be at least as many.")
    right = torch.eye(count, candidates, device=logits.device, dtype=torch.bool)
    if same is not None:
        right = right | (similarity(b[:count], b, normalize="both", eps=eps) >= same)
    return F.binary_cross_entropy_with_logits(logits, right.to(logits.dtype), reduction="sum")
