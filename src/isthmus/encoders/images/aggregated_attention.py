"""Aggregated attention, the token mixer of TransNeXt (arXiv 2311.17132, section 3): a sharp window and a coarse whole.

Every query sees the keys of a small window around it and those of a pooled view of the whole map, in one softmax. The
attention of the last stage, where the map is small, is plain. Keys and values of windows are never copied: see
:mod:`isthmus.layers.neighbourhood`.

A layer maps ``(B, H, W, C)`` to itself and is told by a :class:`Grid` what the stage looks like;
``TransNeXt.grids(height, width)`` makes them for images of any size.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_ as trunc_normal
from torch import Tensor, nn

from isthmus.layers.neighbourhood import neighbour_mix, neighbour_scores

Pair = tuple[int, int]


class Grid(NamedTuple):
    """Rows and columns at one stage: of the map, of the pooled keys, of both where the bias is made, and of the map in
    pretraining; and which places of a window are inside the map, bool ``(k·k, H, W)``."""

    size: Pair
    keys: Pair
    bias_size: Pair
    bias_keys: Pair
    pretrained: Pair
    visible: Tensor


class PositionBias(nn.Module):
    """Bias of keys from log-spaced relative coordinates: MLP(sign(δ)·log2(|δ| + 1) / 3).

    δ = 8·(query - key) / (P - 1) along each axis, P the side of the map in pretraining. Where the map is not the one
    that the bias is made for, the bias is interpolated, over keys and then over queries.

    Args:
        heads: h.
        hidden: width of the MLP.
    """

    def __init__(self, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, hidden), nn.Linear(hidden, heads)

    def forward(self, grid: Grid) -> Tensor:
        """``(h, keys, places)``."""
        (height, width), (key_rows, key_columns) = grid.bias_size, grid.bias_keys
        axes = zip(grid.bias_size, grid.bias_keys, grid.pretrained, strict=True)
        (y, row_of), (x, column_of) = ((torch.from_numpy(a) for a in _distances(*axis)) for axis in axes)
        weight = self.fc1.weight
        pairs = torch.stack([y[:, None].expand(-1, len(x)), x.expand(len(y), -1)], -1).to(weight.device, weight.dtype)
        # The bias of every distinct pair of distances, spread to keys and places one axis after the other, so that
        # long rows are gathered and, in the backward pass, summed.
        table = self.fc2(F.relu(self.fc1(pairs), inplace=True))
        table = table.index_select(0, row_of.to(weight.device)).transpose(0, 1).flatten(1)
        table = table.index_select(0, column_of.to(weight.device))
        bias = table.view(key_columns, width, key_rows, height, -1).permute(4, 2, 0, 3, 1)
        return _resize(bias, grid.keys, grid.size).flatten(3).flatten(1, 2)


class CosineAttention(nn.Module):
    """What all kinds of attention share: the temperature t and the query embedding QE of every head.

    Attributes:
        fixed_count: number of keys that queries are scaled for at every place and size, for comparison; None, as
            published, is the number that a place sees.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}.")
        self.heads = heads
        self.fixed_count: int | None = None
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, dim // heads))
        trunc_normal(self.query_embedding, std=0.02)

    def count(self, grid: Grid) -> Tensor | int:
        """How many keys are seen: a number, or one for every place, ``(H, W)``."""
        return grid.keys[0] * grid.keys[1]

    def scaled(self, queries: Tensor, embedding: Tensor, grid: Grid) -> Tensor:
        """(q̂ + QE)·softplus(t)·log(number of keys seen), the scale in float32.

        Args:
            queries: of unit length, ``(B, h, d, N)``, or ``(B, h, N, d)`` where all places see the same keys.
            embedding: QE, with its head's dimensions in the place of those of the queries.
            grid: of the stage.
        """
        count = self.count(grid) if self.fixed_count is None else self.fixed_count
        log_count = count.flatten().float().log() if isinstance(count, Tensor) else math.log(count)
        scale = F.softplus(self.temperature.float()) * log_count
        return (queries + embedding.to(queries.dtype)) * scale.to(queries.dtype)


class PlainAttention(CosineAttention):
    """Cosine attention of every place to every place, for the last stage.

    Shapes: ``(B, H, W, C)`` → the same.
    """

    def __init__(self, dim: int, heads: int, attn_drop: float = 0.0) -> None:
        super().__init__(dim, heads)
        self.qkv, self.proj, self.cpb = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), PositionBias(heads)
        self.attn_drop = attn_drop

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        parts = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = self.scaled(unit(parts[0], 3), self.query_embedding, grid), unit(parts[1], 3), parts[2]
        bias = self.cpb(grid).transpose(1, 2).to(q.dtype)[None]
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, drop, scale=1.0)
        return self.proj(y.transpose(1, 2).flatten(2)).view(x.shape)


class AggregatedAttention(CosineAttention):
    """Attention to a window and to a pooled view of the map in one softmax, with learnable tokens T for the window.

    y = (a_local + q̂ T + β) v_local + a_pooled v_pooled. The part of T and β is not normalised with the rest.

    Args:
        dim: C.
        heads: h.
        window: odd side k of the window.
        attn_drop: dropout of attention.

    Shapes: ``(B, H, W, C)`` → the same.

    Raises:
        ValueError: an even window, or ``heads`` that does not divide ``dim``.
    """

    def __init__(self, dim: int, heads: int, window: int = 3, attn_drop: float = 0.0) -> None:
        super().__init__(dim, heads)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window {window}: the window around a place has an odd side.")
        self.window, self.attn_drop = window, attn_drop
        cells = window * window
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm, self.cpb = nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim), PositionBias(heads)
        self.local_bias = nn.Parameter(torch.empty(heads, cells))
        self.learnable_tokens = nn.Parameter(torch.empty(heads, dim // heads, cells))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, cells))
        trunc_normal(self.local_bias, std=0.0004)
        trunc_normal(self.learnable_tokens, std=0.02)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        unit_queries = unit(self.split(self.q(x)), 2)
        queries = self.scaled(unit_queries, self.query_embedding.transpose(1, 2), grid)
        keys, values = self.split(self.kv(x)).chunk(2, 1)
        coarse_keys, coarse_values = self.split(self.kv(self.pooled(x, grid.keys))).chunk(2, 1)
        logits = [self.local_logits(queries, keys, grid), self.coarse_logits(queries, coarse_keys, grid)]
        a = F.dropout(torch.cat(logits, 2).softmax(2), self.attn_drop, self.training)
        local, coarse = a.split([part.shape[2] for part in logits], 2)
        y = (coarse_values @ coarse.to(coarse_values.dtype)).add_(self.local_sum(local, unit_queries, values, grid))
        return self.join(y, grid)

    # Inside, maps are (B, h, d, N): places last, because everything runs along them.

    def split(self, x: Tensor) -> Tensor:
        """``(B, H, W, n·C)`` → ``(B, n·h, d, N)``."""
        return x.flatten(1, 2).transpose(1, 2).contiguous().unflatten(1, (-1, self.query_embedding.shape[2]))

    def join(self, y: Tensor, grid: Grid) -> Tensor:
        """``(B, h, d, N)`` → ``(B, H, W, C)``, through the last linear layer."""
        return self.proj(y.flatten(1, 2).transpose(1, 2)).unflatten(1, grid.size)

    def count(self, grid: Grid) -> Tensor | int:
        """The window's places inside the map, and the pooled keys, ``(H, W)``."""
        return grid.visible.sum(0) + grid.keys[0] * grid.keys[1]

    def pooled(self, x: Tensor, keys: Pair) -> Tensor:
        """The coarse view, ``(B, H, W, C)`` → ``(B, *keys, C)``: 1x1 convolution, GELU, mean, LayerNorm."""
        y = F.gelu(F.linear(x, self.sr.weight.flatten(1), self.sr.bias)).permute(0, 3, 1, 2)
        return self.norm(F.adaptive_avg_pool2d(y, keys).permute(0, 2, 3, 1))

    def local_logits(self, queries: Tensor, keys: Tensor, grid: Grid) -> Tensor:
        """``(B, h, k·k, N)``; -∞ outside the map."""
        bias = self.local_bias[:, :, None, None].masked_fill(~grid.visible, -math.inf)
        logits = neighbour_scores(queries.unflatten(3, grid.size), unit(keys, 2).unflatten(3, grid.size), self.window)
        return (logits + bias.to(logits.dtype)).flatten(3)

    def coarse_logits(self, queries: Tensor, keys: Tensor, grid: Grid) -> Tensor:
        """``(B, h, pooled keys, N)``."""
        logits = unit(keys, 2).transpose(2, 3) @ queries
        return logits.add_(self.cpb(grid).to(logits.dtype))

    def local_sum(self, attention: Tensor, unit_queries: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """(a_local + q̂ T + β) v_local, ``(B, h, d, N)``."""
        tokens, beta = self.learnable_tokens.transpose(1, 2), self.learnable_bias.transpose(1, 2)
        weights = (attention + beta + tokens @ unit_queries).to(values.dtype)
        return neighbour_mix(weights.unflatten(3, grid.size), values.unflatten(3, grid.size), self.window).flatten(3)


def unit(x: Tensor, dim: int) -> Tensor:
    """Vectors along ``dim`` to length 1; the norm is taken in float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=dim, eps=1e-12).to(x.dtype)


@functools.lru_cache(maxsize=256)
def _distances(side: int, keys: int, pretrained: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: the distinct log-spaced distances, and for every (key, query) the number of its distance."""
    number = np.arange(keys)
    first, end = number * side // keys, -(-(number + 1) * side // keys)  # the cells that adaptive pooling averages
    delta = (np.arange(side) - (first + end - 1)[:, None] / 2) * 8 / max(pretrained - 1, 1)
    distinct, of = np.unique(delta, return_inverse=True)
    return np.sign(distinct) * np.log2(np.abs(distinct) + 1) / 3, of.reshape(-1)


def _resize(bias: Tensor, keys: Pair, size: Pair) -> Tensor:
    """Bilinear, ``(h, Hk, Wk, H, W)`` → ``(h, *keys, *size)``: over keys, then over places."""
    heads, rows, columns, height, width = bias.shape
    if (rows, columns) != keys:
        over_keys = bias.permute(0, 3, 4, 1, 2).reshape(heads, height * width, rows, columns)
        over_keys = F.interpolate(over_keys, keys, mode="bilinear", align_corners=False)
        bias = over_keys.view(heads, height, width, *keys).permute(0, 3, 4, 1, 2)
    if (height, width) != size:
        places = bias.reshape(heads, -1, height, width)
        bias = F.interpolate(places, size, mode="bilinear", align_corners=False).view(heads, *keys, *size)
    return bias
