"""Attention to a small window around every place of a map, without a copy of keys or values for every place.

The usual way, ``unfold``, writes k·k copies of keys and values. Here the map is laid out once with a margin, so that
every neighbour of every place is the same map read from another starting point: ``neighbour_scores`` multiplies queries
with k·k such views, ``neighbour_mix`` sums k·k such views with weights. Each is the other's derivative, so the backward
pass copies nothing either.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED = 2**18  # bytes


def neighbour_scores(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Inner products of every query with the keys around it; zero where the neighbour is outside the map.

    Args:
        queries: ``(B, h, d, H, W)``.
        keys: the same shape.
        window: odd side k of the window.

    Returns:
        ``(B, h, k·k, H, W)``, neighbours row by row.

    Raises:
        ValueError: an even window, or shapes that differ.
    """
    _check(queries.shape == keys.shape and queries.ndim == 5, window, queries, keys)
    return _Scores.apply(queries, keys, window)  # type: ignore[no-any-return]


def neighbour_mix(weights: Tensor, values: Tensor, window: int) -> Tensor:
    """Sum of the values around every place, with weights; nothing is outside the map.

    Args:
        weights: ``(B, h, k·k, H, W)``, neighbours row by row.
        values: ``(B, h, d, H, W)``.
        window: odd side k of the window.

    Returns:
        ``(B, h, d, H, W)``.

    Raises:
        ValueError: an even window, or shapes that do not fit.
    """
    wanted = (*values.shape[:2], window * window, *values.shape[3:])
    _check(values.ndim == 5 and tuple(weights.shape) == wanted, window, weights, values)
    return _Mix.apply(weights, values, window)  # type: ignore[no-any-return]


def visible_neighbours(height: int, width: int, window: int, device: torch.device | None = None) -> Tensor:
    """Which neighbours are inside the map: bool ``(k·k, H, W)``."""
    reach = window // 2
    steps = torch.arange(-reach, reach + 1, device=device)
    rows = torch.arange(height, device=device) + steps[:, None]  # (k, H)
    columns = torch.arange(width, device=device) + steps[:, None]
    rows, columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)


def _check(fits: bool, window: int, first: Tensor, second: Tensor) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window}: a window around a place has an odd side.")
    if not fits:
        raise ValueError(f"{tuple(first.shape)} and {tuple(second.shape)} do not fit with a window of {window}.")


class _Scores(torch.autograd.Function):
    """s[o, i] = Σ_d q[d, i] k[d, i + o]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, window: int) -> Tensor:
        ctx.save_for_backward(queries, keys)
        ctx.window = window
        batch, heads, _, height, width = queries.shape
        scores = queries.new_empty(batch, heads, window * window, height, width)
        for some in _portions(queries):
            q, views = _rows(queries[some], window), _views(_margin(keys[some], window), keys.shape, window)
            lines = q.new_empty(*q.shape[:2], len(views), q.shape[3])
            for o, view in enumerate(views):
                if torch.compiler.is_compiling():  # a graph that is exported with gradients has no out=
                    lines[:, :, o] = (q * view).sum(2)
                else:
                    torch.sum(q * view, 2, out=lines[:, :, o])
            scores[some] = _cut(lines, keys.shape)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys = ctx.saved_tensors
        to_queries, to_keys, _ = ctx.needs_input_grad
        return (
            _Mix.apply(grads[0], keys, ctx.window) if to_queries else None,
            _Spread.apply(grads[0], queries, ctx.window) if to_keys else None,
            None,
        )


class _Mix(torch.autograd.Function):
    """y[d, i] = Σ_o w[o, i] v[d, i + o]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, window: int) -> Tensor:
        ctx.save_for_backward(weights, values)
        ctx.window = window
        mixed = torch.empty_like(values, memory_format=torch.contiguous_format)
        for some in _portions(values):
            w, views = _rows(weights[some], window), _views(_margin(values[some], window), values.shape, window)
            lines = views[0] * w[:, :, :1]
            for o in range(1, len(views)):
                lines.addcmul_(views[o], w[:, :, o : o + 1])
            mixed[some] = _cut(lines, values.shape)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, values = ctx.saved_tensors
        to_weights, to_values, _ = ctx.needs_input_grad
        return (
            _Scores.apply(grads[0], values, ctx.window) if to_weights else None,
            _Spread.apply(weights, grads[0], ctx.window) if to_values else None,
            None,
        )


class _Spread(torch.autograd.Function):
    """z[d, j] = Σ_o w[o, j - o] x[d, j - o]: what a place sends to the places around it."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, window: int) -> Tensor:
        ctx.save_for_backward(weights, x)
        ctx.window = window
        spread = torch.empty_like(x, memory_format=torch.contiguous_format)
        for some in _portions(x):
            w, sent, margin = _rows(weights[some], window), _rows(x[some], window), _empty_margin(x[some], window)
            for o, view in enumerate(_views(margin, x.shape, window)):
                view.addcmul_(sent, w[:, :, o : o + 1])
            spread[some] = _inside(margin, x.shape, window)
        return spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, x = ctx.saved_tensors
        to_weights, to_x, _ = ctx.needs_input_grad
        return (
            _Scores.apply(x, grads[0], ctx.window) if to_weights else None,
            _Mix.apply(weights, grads[0], ctx.window) if to_x else None,
            None,
        )


def _portions(x: Tensor) -> list[slice]:
    """Samples that go together: on a CPU as many as its cache holds, because each map is read k·k times."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not len(x):
        return [slice(None)]
    step = max(1, _CACHED * len(x) // max(1, x.numel() * x.element_size()))
    return [slice(start, start + step) for start in range(0, len(x), step)]


# A map of H x W is one line of H rows of W + r places, the last r of each row zero (r = k // 2). A step beyond the end
# of a row, or before its start, lands on such zeros, so a neighbour is the same line from another starting point. The
# line of keys has r more rows, and r more places, on either side.


def _rows(x: Tensor, window: int) -> Tensor:
    """``(B, h, c, H, W)`` → ``(B, h, c, H·(W + r))``."""
    return F.pad(x, (0, window // 2)).flatten(3)


def _cut(lines: Tensor, shape: torch.Size) -> Tensor:
    """``(B, h, c, H·(W + r))`` → ``(B, h, c, H, W)``."""
    return lines.unflatten(3, (shape[3], -1))[..., : shape[4]]


def _empty_margin(x: Tensor, window: int) -> Tensor:
    """Zeros for ``(B, h, d, H, W)`` with its margin."""
    reach = window // 2
    return x.new_zeros(*x.shape[:3], (x.shape[3] + 2 * reach) * (x.shape[4] + reach) + 2 * reach)


def _inside(margin: Tensor, shape: torch.Size, window: int) -> Tensor:
    """The map within its margin, a view ``(B, h, d, H, W)``."""
    reach = window // 2
    pitch = shape[4] + reach
    start = reach * pitch + reach
    return margin[..., start : start + shape[3] * pitch].unflatten(3, (shape[3], pitch))[..., : shape[4]]


def _margin(x: Tensor, window: int) -> Tensor:
    """``(B, h, d, H, W)`` laid out with its margin."""
    margin = _empty_margin(x, window)
    _inside(margin, x.shape, window).copy_(x)
    return margin


def _views(margin: Tensor, shape: torch.Size, window: int) -> list[Tensor]:
    """The k·k views ``(B, h, d, H·(W + r))`` of a map with its margin, one for every neighbour."""
    pitch = shape[4] + window // 2
    starts = (row * pitch + column for row in range(window) for column in range(window))
    return [margin.narrow(3, start, shape[3] * pitch) for start in starts]
