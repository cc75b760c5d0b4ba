"""From logits to probabilities to tokens: guidance, filters, drawing. Everything takes any leading axes, so that the
positions of a window are handled at once: ``(B, V)`` and ``(B, L, V)`` alike. ::

    logits = guide(conditional, unconditional, scale=3.0)
    probabilities = top_k_top_p(logits, k=2000, temperature=1.0).softmax(-1)
    tokens = draw(probabilities, generator)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, u + s (c - u), of two tensors of logits of one shape.

    A token that is impossible (-inf) on either side stays impossible.

    Raises:
        ValueError: the shapes differ.
    """
    if cond.shape != uncond.shape:
        raise ValueError(f"guidance needs two tensors of one shape, got {tuple(cond.shape)} and {tuple(uncond.shape)}.")
    guided = uncond + scale * (cond - uncond)
    return guided.masked_fill(cond.isneginf() | uncond.isneginf(), -torch.inf)


def top_k_top_p(
    logits: Tensor, k: int | Tensor | None = None, p: float | None = None, temperature: float = 1.0
) -> Tensor:
    """Logits divided by ``temperature``, with -inf where a token is cut away.

    Args:
        logits: ``(…, V)``.
        k: keep the k largest, and those equal to the k-th; a tensor ``(…)`` gives every row its own number. ``None``
            or 0 keep all.
        p: of what is left, keep the smallest set of largest tokens whose probability reaches p, at least one;
            ``None`` or 1 keep all.
        temperature: above 0; it acts before ``p`` is measured, as in transformers.

    Raises:
        ValueError: a setting out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; decode greedily to take the likeliest.")
    if p is not None and not 0 < p <= 1:
        raise ValueError(f"top-p must lie in (0, 1], got {p}.")
    vocabulary = logits.shape[-1]
    if temperature != 1:
        logits = logits / temperature
    if isinstance(k, Tensor):
        limit = torch.where(k > 0, k, vocabulary).clamp_max(vocabulary).to(logits.device)
        least = logits.sort(-1, descending=True).values.gather(-1, limit.broadcast_to(logits.shape[:-1])[..., None] - 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    elif k is not None and k < 0:
        raise ValueError(f"top-k must be at least 1 (or 0 for all), got {k}.")
    elif k and k < vocabulary:
        logits = logits.masked_fill(logits < logits.topk(k, -1).values[..., -1:], -torch.inf)
    if p is not None and p < 1:
        ordered, order = logits.sort(-1, descending=True)
        mass = ordered.softmax(-1)
        before = mass.cumsum(-1) - mass  # a token goes when those above it reach p without it
        cut = (before >= p).scatter(-1, torch.zeros_like(order[..., :1]), False)
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -torch.inf)
    return logits


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token of every row: ``(…, V)``, which need not sum to 1, to int64 ``(…)``; a token of mass 0 is never drawn.

    By inversion of the cumulated distribution, so that one uniform a row is used, from a generator on any device.
    """
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64
    below = probabilities.to(wide).cumsum(-1)
    total = below[..., -1:]
    point = uniform((*probabilities.shape[:-1], 1), generator, total) * total
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(below, point, right=True)[..., 0]


def uniform(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Uniforms in [0, 1) with the dtype and on the device of ``like``, from a generator that may live elsewhere."""
    device = like.device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=like.dtype, device=device).to(like.device)
