"""The halves of TransNeXt's aggregated attention, each alone, for comparisons of equal size (arXiv 2311.17132)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.encoders.images.aggregated_attention import AggregatedAttention, CosineAttention, Grid, unit
from isthmus.encoders.images.transnext import TransNeXt


class WindowAttention(AggregatedAttention):
    """The sharp half alone: nothing outside the window is seen."""

    def __init__(self, dim: int, heads: int, window: int = 3, attn_drop: float = 0.0) -> None:
        super().__init__(dim, heads, window, attn_drop)
        del self.sr, self.norm, self.cpb

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        unit_queries = unit(self.split(self.q(x)), 2)
        queries = self.scaled(unit_queries, self.query_embedding.transpose(1, 2), grid)
        keys, values = self.split(self.kv(x)).chunk(2, 1)
        attention = self.local_logits(queries, keys, grid).softmax(2)
        return self.join(self.local_sum(attention, unit_queries, values, grid), grid)

    def count(self, grid: Grid) -> Tensor | int:
        """The window's places inside the map."""
        return grid.visible.sum(0)


class PooledAttention(AggregatedAttention):
    """The coarse half alone."""

    def __init__(self, dim: int, heads: int, window: int = 3, attn_drop: float = 0.0) -> None:
        super().__init__(dim, heads, window, attn_drop)
        del self.local_bias, self.learnable_tokens, self.learnable_bias

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        queries = self.scaled(unit(self.split(self.q(x)), 2), self.query_embedding.transpose(1, 2), grid)
        keys, values = self.split(self.kv(self.pooled(x, grid.keys))).chunk(2, 1)
        return self.join(values @ self.coarse_logits(queries, keys, grid).softmax(2).to(values.dtype), grid)

    def count(self, grid: Grid) -> Tensor | int:
        """The pooled keys."""
        return grid.keys[0] * grid.keys[1]


def fix_scale(network: TransNeXt, size: int) -> None:
    """Scale queries for the number of keys that inner places see in images of ``size``, at every size."""
    for i, grid in enumerate(network.grids(size, size)):
        for module in network.stages[i].modules():
            if isinstance(module, CosineAttention):
                count = module.count(grid)
                module.fixed_count = int(count.max()) if isinstance(count, Tensor) else count


def widened(make: Callable[..., Any], ratios: Sequence[float], attention: Callable[..., nn.Module]) -> list[float]:
    """Ratios of the gated units that make up for the parameters that another attention lacks, one a stage.

    Args:
        make: the network from ``mlp_ratios`` and ``attention``.
        ratios: of the network with aggregated attention.
        attention: as :class:`TransNeXt` takes it.
    """
    with torch.device("meta"):
        wanted = make(mlp_ratios=ratios).stages
        without = make(mlp_ratios=ratios, attention=attention).stages
    return [_widened(*stage) for stage in zip(wanted, without, ratios, strict=True)]


def _widened(wanted: nn.Module, without: nn.Module, ratio: float) -> float:
    """Likewise of one stage."""
    a, b = (sum(p.numel() for p in stage.parameters()) for stage in (wanted, without))
    blocks: Any = without.blocks
    units = [block.mlp for block in blocks]
    dim = units[0].fc2.out_features
    # A hidden channel has two rows of fc1, a column of fc2, a 3x3 kernel and three biases.
    hidden = units[0].fc2.in_features + round((a - b) / (len(units) * (3 * dim + 12)))
    return (-(-3 * hidden // 2) + 0.5) / dim if a != b else ratio
