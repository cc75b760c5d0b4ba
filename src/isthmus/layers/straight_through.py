"""Rounding, clamping and quantising with gradients that pass.

``straight_through(x, q)`` has the value of q and the gradient of x (Bengio et al., arXiv 1308.3432); ``lower_bound``
keeps a parameter above a bound without trapping it there (Ballé, arXiv 1802.01436's companion code); ``fake_quant``
is symmetric uniform quantisation with a threshold (CoDeNet, arXiv 2006.08357, section 4.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    """The value of ``q``, with the gradient passed on to ``x`` as if q were x; one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != q.shape:
        raise ValueError(f"straight_through wants two tensors of one shape, got {tuple(x.shape)} and {tuple(q.shape)}.")
    return _StraightThrough.apply(x, q)  # type: ignore[no-any-return]


def lower_bound(x: Tensor, bound: float | Tensor) -> Tensor:
    """``max(x, bound)``; below the bound only a gradient that moves x up, under descent, passes."""
    return _LowerBound.apply(x, torch.as_tensor(bound, dtype=x.dtype, device=x.device))  # type: ignore[no-any-return]


def fake_quant(x: Tensor, bits: int, threshold: float | Tensor | None = None, axis: int | None = None) -> Tensor:
    """Quantise to the 2^bits - 1 values ``Δ·{-(2^(bits-1) - 1), …, 2^(bits-1) - 1}`` with Δ = t / (2^(bits-1) - 1).

    Gradients pass to x where |x| ≤ t, and to t where x is clamped (through Δ elsewhere), if t is a tensor that learns.

    Args:
        x: any shape.
        bits: at least 2, as one bit has no value but 0.
        threshold: t ≥ 0; one number, or one for every index of ``axis``. ``None`` takes the largest |x|, which then
            gets no gradient. Where t is 0 everything becomes 0.
        axis: quantises every index of it by itself, such as 0 for a convolution's output channels.

    Raises:
        ValueError: fewer than 2 bits, a threshold of another shape, or one that is negative or NaN.
    """
    if bits < 2:
        raise ValueError(f"symmetric quantisation needs at least 2 bits, got {bits}.")
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = x.shape[axis]
    if threshold is None:
        others = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
        t = x.detach().abs().amax(others, keepdim=True) if others else x.detach().abs()
    else:
        t = torch.as_tensor(threshold, dtype=x.dtype, device=x.device)
        if t.numel() not in (1, shape[axis] if axis is not None else 1):
            raise ValueError(f"threshold has {t.numel()} values; axis {axis} of {tuple(x.shape)} wants {shape}.")
        t = t.reshape(shape if t.numel() > 1 else [1] * x.ndim)
    if not bool((t >= 0).all()):
        raise ValueError("thresholds of quantisation must not be negative or NaN.")
    most = 2 ** (bits - 1) - 1
    step = t / most
    scaled = torch.minimum(torch.maximum(x, -t), t) / torch.where(step > 0, step, 1)
    return straight_through(scaled, scaled.detach().round()) * step


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor) -> Tensor:
        return q.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        ctx.save_for_backward(x, bound)
        return torch.maximum(x, bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, bound = ctx.saved_tensors
        return grads[0] * ((x >= bound) | (grads[0] < 0)), None
