"""Sparse forms of convolutions, pools, padding and resizing: the operations that read neighbours.

On a canvas they are the published algorithm: the ordinary operation on a map that is zero where hidden, times the mask
of the *output* size (bias included). On tiles, :mod:`.tiles` computes the same values without the hidden part where it
can; otherwise the map takes the way over a canvas.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.codec import UserError

from .ops import channel_axes
from .tensor import NCHW, Padding, SparseTensor, calling_module, hide, no_form, sparse_form

Pair = tuple[int, int]


def pair(value: Any) -> Pair:
    """One number, or one for rows and one for columns."""
    if isinstance(value, int):
        return value, value
    listed = list(value)
    return (listed[0], listed[0]) if len(listed) == 1 else (listed[0], listed[1])


def new_map(function: Any, x: SparseTensor, canvas: Tensor, owned: bool = False) -> SparseTensor:
    """A carrier for a freshly computed dense map of any size; hidden places become zero, by the mask of that size.

    ``owned`` says that nobody else reads ``canvas``, so that it can be masked in place.
    """
    extent = (canvas.shape[-2], canvas.shape[-1])
    try:
        if owned and not x.context.poison:
            values = canvas.mul_(x.context.mask(extent, canvas.dtype))
        else:
            values = hide(canvas, x.context, extent, NCHW, False)
    except UserError as error:
        raise UserError(f"{function.__name__} in {calling_module(x.context)}: {error}") from None
    return SparseTensor(values, x.context, extent, False)


def back(x: SparseTensor, result: SparseTensor) -> SparseTensor:
    """A result computed on a canvas returns to tiles where this pass works on tiles and a map of its size has them."""
    return result.as_tiles() if (x.tiled or x.context.tiling) and result.tile is not None else result


@sparse_form(F.pad, torch.constant_pad_nd)
def pad(function: Any, x: SparseTensor, pad: Any, mode: str = "constant", value: float | None = None) -> SparseTensor:
    """Padding of rows and columns waits for the convolution or pool that follows; channels are padded with zeros."""
    pad = list(pad)
    value = 0.0 if value is None else float(value)
    if (x.axes == NCHW and len(pad) <= 4) or not any(pad[4:]):  # negative numbers crop
        left, right, top, bottom = (pad + [0, 0, 0, 0])[:4]
        if x.axes != NCHW:
            raise no_form(function, x, None, "it pads rows and columns of a channels-last map")
        if x.padding is not None:
            if (x.padding.mode, x.padding.value) != (mode, value) or mode != "constant":
                raise no_form(function, x, None, "two paddings of different kinds in a row")
            left, right = left + x.padding.left, right + x.padding.right
            top, bottom = top + x.padding.top, bottom + x.padding.bottom
        padding = Padding(left, right, top, bottom, mode, value)
        return SparseTensor(x.values, x.context, x.extent, x.tiled, x.axes, padding if any(padding[:4]) else None)
    padded = [-1 - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1]]
    channel_axes(function, x, padded)
    return x.finish(F.pad(x.values, pad, mode, value), clean=value == 0)


def padded_canvas(x: SparseTensor) -> Tensor:
    """The dense map with the padding that was waiting."""
    canvas = x.as_canvas().cleaned()
    if x.padding is None:
        return canvas
    sides = x.padding[:4]
    if x.padding.mode == "constant":
        return F.pad(canvas, sides, "constant", x.padding.value)
    return F.pad(canvas, sides, x.padding.mode)


@sparse_form(F.conv2d)
def conv2d(
    function: Any,
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> SparseTensor:
    """Convolution of any kernel, stride, dilation and groups; depthwise included."""
    if not isinstance(x, SparseTensor) or x.axes != NCHW or x.values.dim() != 4:
        raise no_form(function, x)
    if x.tiled:
        from .tiled import tiled_conv2d

        result = tiled_conv2d(x, weight, bias, pair(stride), padding, pair(dilation), groups)
        if result is not None:
            x.context.work["tiles"] += result.pixels * weight.numel()
            return result
    canvas = F.conv2d(padded_canvas(x), weight, bias, stride, padding, dilation, groups)
    x.context.work["canvas"] += canvas.shape[0] * canvas.shape[2] * canvas.shape[3] * weight.numel()
    return back(x, new_map(function, x, canvas, owned=True))


@sparse_form(F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices)
def max_pool2d(
    function: Any,
    x: SparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> SparseTensor:
    """Max pool: hidden neighbours are zeros, outside the image is minus infinity."""
    if x.axes != NCHW or return_indices:
        raise no_form(function, x)
    if x.tiled:
        from .tiled import tiled_pool2d

        result = tiled_pool2d(
            "max", x, pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation), ceil_mode
        )
        if result is not None:
            return result
    canvas = F.max_pool2d(padded_canvas(x), kernel_size, stride, padding, dilation, ceil_mode)
    return back(x, new_map(function, x, canvas))


@sparse_form(F.avg_pool2d)
def avg_pool2d(
    function: Any,
    x: SparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> SparseTensor:
    """Average pool, not renormalised by the visible count (as published)."""
    if x.axes != NCHW:
        raise no_form(function, x)
    if x.tiled and divisor_override is None:
        from .tiled import tiled_pool2d

        result = tiled_pool2d(
            "avg",
            x,
            pair(kernel_size),
            pair(stride or kernel_size),
            pair(padding),
            (1, 1),
            ceil_mode,
            count_include_pad,
        )
        if result is not None:
            return result
    canvas = F.avg_pool2d(
        padded_canvas(x), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return back(x, new_map(function, x, canvas))


@sparse_form(F.interpolate, F.upsample)
def interpolate(
    function: Any,
    x: SparseTensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> SparseTensor:
    """Resizing; nearest enlargement by whole factors stays inside cells, anything else goes over a canvas."""
    if x.axes != NCHW or x.padding is not None:
        raise no_form(function, x)
    if x.tiled and mode == "nearest":
        height, width = x.extent
        if size is not None:
            target = pair(size)
            factors = (target[0] / height, target[1] / width)
        else:
            factors = (scale_factor, scale_factor) if isinstance(scale_factor, (int, float)) else tuple(scale_factor)
        if all(factor >= 1 and float(factor).is_integer() for factor in factors):
            rows, columns = int(factors[0]), int(factors[1])
            values = x.values.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
            return SparseTensor(values, x.context, (height * rows, width * columns), True)
    canvas = F.interpolate(
        x.as_canvas().cleaned(), size, scale_factor, mode, align_corners, recompute_scale_factor, antialias=antialias
    )
    return back(x, new_map(function, x, canvas))


def crop(x: SparseTensor, rows: slice, columns: slice) -> SparseTensor:
    """Part of a map, or every second pixel of it, as a map of its new size."""
    step = rows.step or 1
    whole = rows.indices(x.extent[0]) == (0, x.extent[0], step) and columns.indices(x.extent[1]) == (
        0,
        x.extent[1],
        step,
    )
    if x.tiled and whole and not any(p % step for p in x.values.shape[-2:]):
        values = x.values[:, :, ::step, ::step]
        return SparseTensor(values, x.context, (x.extent[0] // step, x.extent[1] // step), True)
    return back(x, new_map(Tensor.__getitem__, x, x.as_canvas().cleaned()[:, :, rows, columns]))


@sparse_form(F.pixel_unshuffle, F.pixel_shuffle)
def pixel_shuffle(function: Any, x: SparseTensor, factor: int) -> SparseTensor:
    """Space to depth and back, inside cells."""
    if x.axes != NCHW or x.padding is not None:
        raise no_form(function, x)
    if x.tiled and (function is F.pixel_shuffle or not any(p % factor for p in x.values.shape[-2:])):
        values = function(x.values, factor)
        h, w = x.context.grid
        return SparseTensor(values, x.context, (values.shape[-2] * h, values.shape[-1] * w), True)
    return back(x, new_map(function, x, function(x.as_canvas().cleaned(), factor)))
