"""Where the visible pixels are: cutting maps into tiles, and the tables that find a visible pixel's neighbours.

Everything hidden is zero at the input of every operation and is cut away at its output. So it is enough to compute the
visible cells, each as a tile of ``p x q`` pixels, reading values of visible neighbours and zero for hidden ones: the
result is exact. The pixels of all tiles, one after the other, are the *rows* of a matrix ``(K * p * q, C)``, which is
a view of tiles held channels-last; tables number pixels by their row. A table belongs to one forward pass and is made
once for all layers of the same geometry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .context import SparseContext

Pair = tuple[int, int]
HIDDEN, OUTSIDE = -1, -2


class PutRows(torch.autograd.Function):
    """Rows written to distinct places of a zero matrix; the gradient reads them back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(index)
        return put_rows(rows, index, length)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return TakeRows.apply(gradient, index), None, None


class TakeRows(torch.autograd.Function):
    """Distinct rows read; the gradient writes them back among zeros (torch's own would add, which is slower)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return PutRows.apply(gradient, index, ctx.length), None


def put_rows(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """A zero matrix of ``length`` rows with ``rows`` at ``index``."""
    return rows.new_zeros(length, rows.shape[1]).index_copy_(0, index, rows)


def tile_pixels(context: SparseContext, extent: Pair) -> Tensor:
    """For every row, its pixel among the ``B * H * W`` of the map: ``(K * p * q,)``."""
    key = ("tile_pixels", extent)
    if key not in context.tables:
        size = context.tile_size(extent)
        assert size is not None
        image, row, column = (index[:, None, None] for index in context.cells)
        rows = row * size[0] + torch.arange(size[0], device=row.device)[:, None]
        columns = column * size[1] + torch.arange(size[1], device=row.device)
        context.tables[key] = ((image * extent[0] + rows) * extent[1] + columns).flatten()
    return context.tables[key]


def as_rows(picture: Tensor) -> Tensor:
    """``(N, C, H, W)`` to ``(N * H * W, C)``: a view where it is held channels-last."""
    return picture.permute(0, 2, 3, 1).reshape(-1, picture.shape[1])


def as_picture(rows: Tensor, size: Pair) -> Tensor:
    """``(N * p * q, C)`` to ``(N, C, p, q)``, a view, channels-last."""
    return rows.view(-1, *size, rows.shape[1]).permute(0, 3, 1, 2)


def canvas_to_tiles(canvas: Tensor, context: SparseContext, extent: Pair) -> Tensor:
    """``(B, …, H, W)`` to ``(K, …, p, q)``, held channels-last."""
    size = context.tile_size(extent)
    assert size is not None
    channels = canvas.shape[1:-2]
    picture = canvas.flatten(1, -3) if canvas.dim() > 3 else canvas[:, None]
    tiles = as_picture(TakeRows.apply(as_rows(picture), tile_pixels(context, extent)), size)
    return tiles if len(channels) == 1 else tiles.reshape(tiles.shape[0], *channels, *size)


def tiles_to_canvas(tiles: Tensor, context: SparseContext, extent: Pair) -> Tensor:
    """``(K, …, p, q)`` to ``(B, …, H, W)`` with zeros where hidden, held channels-last."""
    channels = tiles.shape[1:-2]
    picture = tiles.flatten(1, -3) if tiles.dim() > 3 else tiles[:, None]
    length = context.batch * extent[0] * extent[1]
    canvas = as_picture(PutRows.apply(as_rows(picture), tile_pixels(context, extent), length), extent)
    return canvas if len(channels) == 1 else canvas.reshape(canvas.shape[0], *channels, *extent)


# ------------------------------------------------------------------------------------------------------- neighbours


def find_rows(context: SparseContext, extent: Pair, rows: Tensor, columns: Tensor) -> Tensor:
    """The row numbers of pixels of the image a tile belongs to.

    Args:
        extent: size of the map.
        rows: ``(K, n)`` row coordinates in the map, for every tile; may lie outside.
        columns: ``(K, m)`` column coordinates.

    Returns:
        ``(K, n, m)``: a row number, ``HIDDEN`` or ``OUTSIDE``.
    """
    size = context.tile_size(extent)
    assert size is not None
    p, q = size
    outside = ((rows < 0) | (rows >= extent[0]))[:, :, None] | ((columns < 0) | (columns >= extent[1]))[:, None, :]
    rows, columns = rows.clamp(0, extent[0] - 1), columns.clamp(0, extent[1] - 1)
    image = context.cells[0][:, None, None]
    tile = context.tile_of[image, (rows // p)[:, :, None], (columns // q)[:, None, :]]
    number = (tile * p + (rows % p)[:, :, None]) * q + (columns % q)[:, None, :]
    return number.masked_fill(tile < 0, HIDDEN).masked_fill(outside, OUTSIDE)


class Window(NamedTuple):
    """What every tile reads: its window of ``size`` pixels, as rows (0 where there is nothing to read)."""

    index: Tensor
    hidden: Tensor  # places in the window that are hidden pixels
    outside: Tensor  # places outside of the image
    size: Pair


def window(context: SparseContext, extent: Pair, reach: Pair, stride: Pair, before: Pair) -> Window:
    """The windows of an operation whose kernel reaches over ``reach`` pixels, with ``before`` padding top and left."""
    key = ("window", extent, reach, stride, before)
    if key not in context.tables:
        size = context.tile_size(extent)
        assert size is not None
        sides = tuple((p // s - 1) * s + r for p, s, r in zip(size, stride, reach, strict=True))
        _, row, column = context.cells
        rows = row[:, None] * size[0] - before[0] + torch.arange(sides[0], device=row.device)
        columns = column[:, None] * size[1] - before[1] + torch.arange(sides[1], device=row.device)
        number = find_rows(context, extent, rows, columns).flatten()
        context.tables[key] = Window(
            number.clamp_min(0),
            (number == HIDDEN).nonzero()[:, 0],
            (number == OUTSIDE).nonzero()[:, 0],
            (sides[0], sides[1]),
        )
    return context.tables[key]


def taps(
    context: SparseContext, extent: Pair, kernel: Pair, stride: Pair, before: Pair, dilation: Pair
) -> list[tuple[Tensor, Tensor]]:
    """The rule book of submanifold convolution: for every tap of the kernel, the input rows that it reads and the
    output rows that it adds to, visible pairs only."""
    key = ("taps", extent, kernel, stride, before, dilation)
    if key not in context.tables:
        size = context.tile_size(extent)
        assert size is not None
        _, row, column = context.cells
        coordinates = []
        for axis, start in enumerate((row, column)):
            places = torch.arange(size[axis] // stride[axis], device=row.device) * stride[axis] - before[axis]
            reach = torch.arange(kernel[axis], device=row.device) * dilation[axis]
            coordinates.append(start[:, None] * size[axis] + (reach[:, None] + places).flatten())
        number = find_rows(context, extent, *coordinates)
        out = (size[0] // stride[0], size[1] // stride[1])
        number = number.view(-1, kernel[0], out[0], kernel[1], out[1]).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        target = [(row_of_tap >= 0).nonzero()[:, 0] for row_of_tap in number]
        context.tables[key] = [(n.index_select(0, t), t) for n, t in zip(number, target, strict=True)]
    return context.tables[key]
