"""Which way a convolution or pool takes on tiles. ``None`` means that a canvas serves it better, or that it has no
tiles (its output does not divide into cells)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import DepthwiseConv, GatherWindows, Geometry, TapConv, WindowConv
from .tensor import SparseTensor
from .tiles import Pair, as_picture, as_rows, window

# Pixels a side of an output tile up to which one matrix product a tap beats windows, for few and for many channels
# (measured forward and backward on one core, 16 to 256 channels, 8 and 64 images).
SMALL, MEDIUM, MANY = 2, 4, 256


def fits(
    x: SparseTensor, reach: Pair, stride: Pair, padding: tuple[Pair, Pair], ceil: bool = False, value: float = 0.0
) -> Pair | None:
    """Padding before rows and columns, pending padding included, if output tiles lie on input tiles; else None.

    ``padding`` holds (before, after) for rows and for columns; ``value`` is what the operation wants outside.
    """
    assert x.tile is not None
    (top, bottom), (left, right) = padding
    if x.padding is not None:
        if x.padding.mode != "constant" or x.padding.value != value:
            return None
        top, bottom = top + x.padding.top, bottom + x.padding.bottom
        left, right = left + x.padding.left, right + x.padding.right
    for axis, (before, after) in enumerate(((top, bottom), (left, right))):
        length = x.extent[axis] + before + after - reach[axis]
        s = stride[axis]
        if x.tile[axis] % s or (length + (s - 1 if ceil else 0)) // s + 1 != x.extent[axis] // s:
            return None
    return top, left


def _resolve(padding: Any, reach: Pair) -> tuple[Pair, Pair]:
    """``F.conv2d``'s padding as (before, after) for rows and for columns."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0), (0, 0)
        return tuple(((r - 1) // 2, r - 1 - (r - 1) // 2) for r in reach)  # type: ignore[return-value]
    rows, columns = (padding, padding) if isinstance(padding, int) else tuple(padding) * (2 // len(padding))
    return (rows, rows), (columns, columns)


def tiled_conv2d(
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Any,
    dilation: Pair,
    groups: int,
) -> SparseTensor | None:
    """Convolution of tiles, or None."""
    kernel: Pair = (weight.shape[2], weight.shape[3])
    reach: Pair = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))  # type: ignore[assignment]
    before = fits(x, reach, stride, _resolve(padding, reach))
    if before is None or not len(x.values):
        return None
    values = x.values
    device = values.device.type
    if torch.is_autocast_enabled(device) and values.dtype != torch.float64:  # as torch, which leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        values, weight, bias = values.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        out = _convolve(x, values, weight, bias, stride, before, dilation, groups, kernel, reach)
    if out is None:
        return None
    extent = (x.extent[0] // stride[0], x.extent[1] // stride[1])
    return SparseTensor(out, x.context, extent, True)


def _convolve(
    x: SparseTensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    before: Pair,
    dilation: Pair,
    groups: int,
    kernel: Pair,
    reach: Pair,
) -> Tensor | None:
    assert x.tile is not None
    out_tile = (x.tile[0] // stride[0], x.tile[1] // stride[1])
    if reach == (1, 1):  # a matrix product of pixels
        if stride != (1, 1):
            values = values[:, :, :: stride[0], :: stride[1]]
        if groups > 1:
            return F.conv2d(values, weight, bias, 1, 0, 1, groups)
        return as_picture(F.linear(as_rows(values), weight.flatten(1), bias), out_tile)
    if kernel == stride and dilation == (1, 1) and before == (0, 0):  # patches that do not overlap
        if groups > 1:
            return F.conv2d(values, weight, bias, stride, 0, 1, groups)
        patches = (
            values.permute(0, 2, 3, 1).unflatten(2, (out_tile[1], stride[1])).unflatten(1, (out_tile[0], stride[0]))
        )
        patches = patches.transpose(2, 3).flatten(3).flatten(0, 2)
        return as_picture(F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias), out_tile)
    geometry = Geometry(x.context, x.extent, kernel, stride, before, dilation, groups)
    depthwise = groups == weight.shape[0] == values.shape[1] and groups > 1
    if depthwise and stride == (1, 1) and values.device.type == "cpu":
        way: Any = DepthwiseConv
    elif min(out_tile) > (MEDIUM if groups == 1 and min(weight.shape[:2]) >= MANY else SMALL):
        way = WindowConv
    elif groups == 1:
        way = TapConv
    else:
        return None
    return as_picture(way.apply(as_rows(values), weight, bias, geometry), out_tile)


def tiled_pool2d(
    kind: str,
    x: SparseTensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    count_include_pad: bool = True,
) -> SparseTensor | None:
    """Max (zeros at hidden neighbours, minus infinity outside the image) or average pool of tiles, or None."""
    reach: Pair = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))  # type: ignore[assignment]
    outside = float("-inf") if kind == "max" else 0.0
    if any(padding) and not count_include_pad:
        return None
    if kind == "max" and x.padding is not None and not any(padding):
        outside = x.padding.value
    before = fits(x, reach, stride, ((padding[0], padding[0]), (padding[1], padding[1])), ceil_mode, outside)
    if before is None or not len(x.values):
        return None
    if reach == stride and before == (0, 0):
        windows = x.values
    else:
        windows = GatherWindows.apply(as_rows(x.values), window(x.context, x.extent, reach, stride, before), outside)
    out = F.max_pool2d(windows, kernel, stride, 0, dilation) if kind == "max" else F.avg_pool2d(windows, kernel, stride)
    return SparseTensor(out, x.context, (x.extent[0] // stride[0], x.extent[1] // stride[1]), True)
