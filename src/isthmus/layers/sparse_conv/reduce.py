"""Sparse forms of reductions and global pools: the mean over a map is the mean over its visible pixels.

Squeeze-and-excite, ECA, global response norm and every global pool become sparse through these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import variants
from .tensor import NCHW, SparseTensor, no_form, sparse_form


def _dims(function: Any, x: SparseTensor, dim: Any) -> list[int]:
    """The reduced axes counted from the right; all of them where none is given."""
    if x.padding is not None:
        raise no_form(function, x, None, "it follows a padding that only a convolution or a pool may follow")
    count = x.values.dim()
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(-count, 0))
    listed = [dim] if isinstance(dim, int) else list(dim)
    return [d if d < 0 else d - count for d in listed]


def _spatial(function: Any, x: SparseTensor, dims: Sequence[int]) -> bool:
    """Whether the reduction runs over pixels (True) or only over channels (False); anything between is refused."""
    image, row, column = x.axes
    if row in dims and column in dims:
        return True
    if row in dims or column in dims or image in dims:
        raise no_form(function, x, None, "it reduces rows, columns or images alone")
    return False


def _axes_after(x: SparseTensor, dims: Sequence[int], keepdim: bool) -> tuple[int, int, int]:
    if keepdim:
        return x.axes
    return tuple(a + sum(d > a for d in dims) for a in x.axes)  # type: ignore[return-value]


def per_image(x: SparseTensor, per_tile: Tensor, how: str = "sum") -> Tensor:
    """Join values of tiles (their first axis in NCHW order, spatial axes of size one) into values of images."""
    image = x.axes[0] % per_tile.dim()
    shape = list(per_tile.shape)
    shape[image] = x.context.batch
    if how == "sum":
        return per_tile.new_zeros(shape).index_add(image, x.context.cells[0], per_tile)
    start = per_tile.new_full(shape, -math.inf)
    index = x.context.cells[0].view([-1 if k == image else 1 for k in range(len(shape))]).expand_as(per_tile)
    joined = start.scatter_reduce(image, index, per_tile, "amax")
    return joined.masked_fill(joined == -math.inf, 0)  # an image of which nothing is visible


def total(x: SparseTensor, dims: list[int], how: str = "sum") -> Tensor:
    """Sum or maximum over visible pixels, kept axes."""
    values = x.cleaned()
    if how == "amax":
        if not x.tiled:
            values = values.masked_fill(~x.mask_like(), -math.inf).amax(dims, keepdim=True)
            return values.masked_fill(values == -math.inf, 0)
        inside = values.amax([d for d in dims if d != x.axes[0]], keepdim=True)
        return inside.amax(x.axes[0], keepdim=True) if x.axes[0] in dims else per_image(x, inside, "amax")
    inside = values.sum(dims, keepdim=True)
    return per_image(x, inside) if x.tiled and x.axes[0] not in dims else inside


def count(x: SparseTensor, dims: Sequence[int]) -> Tensor:
    """Number of visible entries that a reduction over ``dims`` adds, shaped to broadcast against its result."""
    pixels = x.context.counts(x.extent).to(x.values.dtype)
    if x.axes[0] in dims:
        pixels = pixels.sum()
    else:
        shape = [1] * x.values.dim()
        shape[x.axes[0]] = -1
        pixels = pixels.view(shape)
    channels = math.prod(x.values.shape[d] for d in dims if d not in x.axes)
    return (pixels * channels).clamp_min(1)


def _drop(values: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return values if keepdim else values.squeeze(tuple(dims))


def mean(x: SparseTensor, dims: list[int]) -> Tensor:
    """Mean over visible pixels, kept axes."""
    return total(x, dims) / count(x, dims)


@sparse_form(*variants("mean", "sum"))
def mean_or_sum(
    function: Any, x: SparseTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None
) -> Any:
    """Mean and sum, over visible pixels or over channels."""
    if dtype is not None:
        x = x.to(dtype)  # type: ignore[assignment]
    dims = _dims(function, x, axis if axis is not None else dim)
    averaging = function.__name__ == "mean"
    if not _spatial(function, x, dims):
        values = x.values.mean(dims, keepdim) if averaging else x.values.sum(dims, keepdim)
        return x.finish(values, _axes_after(x, dims, keepdim), clean=True)
    return _drop(mean(x, dims) if averaging else total(x, dims), dims, keepdim)


@sparse_form(*variants("amax", "amin", "max", "min"))
def extreme(function: Any, x: SparseTensor, dim: Any = None, keepdim: bool = False) -> Any:
    """Maximum and minimum, over visible pixels or over channels."""
    name = function.__name__.removeprefix("a")
    if isinstance(dim, Tensor):  # torch.max(a, b)
        return getattr(torch, f"{name}imum")(x, dim)
    dims = _dims(function, x, dim)
    if not _spatial(function, x, dims):
        result = function(x.values, dim, keepdim)
        axes = _axes_after(x, dims, keepdim)
        if isinstance(result, Tensor):
            return x.finish(result, axes, clean=True)
        return type(result)((x.finish(result[0], axes, clean=True), x.finish(result[1], axes)))
    if isinstance(dim, int):
        raise no_form(function, x)
    high = total(x, dims, "amax") if name == "max" else -total(-x, dims, "amax")  # type: ignore[arg-type]
    return _drop(high, dims, keepdim)


def _variance(x: SparseTensor, dims: list[int], correction: float) -> tuple[Tensor, Tensor]:
    """Variance and mean over visible pixels, kept axes."""
    centre = mean(x, dims)
    deviation = x - centre
    number = count(x, dims)
    return total(deviation * deviation, dims) / (number - correction).clamp_min(1), centre  # type: ignore[arg-type]


@sparse_form(*variants("var", "std", "var_mean", "std_mean"))
def spread(
    function: Any,
    x: SparseTensor,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    """Variance and standard deviation, over visible pixels or over channels."""
    dims = _dims(function, x, dim)
    name = function.__name__
    correction = float(unbiased) if correction is None else correction
    if not _spatial(function, x, dims):
        values = x.values if x.tiled else x.values.masked_fill(~x.mask_like(), 0)
        axes = _axes_after(x, dims, keepdim)
        variance, centre = torch.var_mean(values, dims, correction=correction, keepdim=keepdim)
        spread_: Any = x.finish(variance, axes)
        centre_: Any = x.finish(centre, axes, clean=True)
    else:
        spread_, centre_ = (_drop(v, dims, keepdim) for v in _variance(x, dims, correction))
    if name.startswith("std"):
        spread_ = spread_.sqrt()
    return (spread_, centre_) if name.endswith("mean") else spread_


@sparse_form(*variants("norm"), torch.linalg.vector_norm, torch.linalg.norm)
def norm(
    function: Any, x: SparseTensor, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, **kw: Any
) -> Any:
    """Vector norms, over visible pixels (global response norm) or over channels."""
    p = kw.get("ord", p)
    p = 2.0 if p in (None, "fro") else float(p)
    dims = _dims(function, x, dim)
    if not _spatial(function, x, dims):
        values = x.cleaned()
        return x.finish(
            torch.linalg.vector_norm(values, p, dims, keepdim, dtype=dtype), _axes_after(x, dims, keepdim), True
        )
    if p <= 0 or p == math.inf:
        raise no_form(function, x, None, f"order {p}")
    if not x.tiled or x.axes[0] in dims:  # zeros add nothing
        return torch.linalg.vector_norm(x.cleaned(), p, dims, keepdim, dtype=dtype)
    inside = torch.linalg.vector_norm(x.values, p, [d for d in dims if d != x.axes[0]], True, dtype=dtype)
    power = per_image(x, inside**p)
    positive = power > 0  # the root's derivative at zero is infinite, the norm's is taken as zero
    return _drop(torch.where(positive, power.where(positive, 1) ** (1 / p), 0), dims, keepdim)


@sparse_form(F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices)
def adaptive_pool(function: Any, x: SparseTensor, output_size: Any, return_indices: bool = False) -> Any:
    """Global pools see visible pixels; finer ones are allowed where every output pixel lies inside one cell."""
    if x.axes != NCHW or return_indices:
        raise no_form(function, x)
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    height, width = height or x.extent[0], width or x.extent[1]
    averaging = "avg" in function.__name__
    if (height, width) == (1, 1):
        dims = _dims(function, x, (-2, -1))
        return mean(x, dims) if averaging else total(x, dims, "amax")
    if (height, width) == x.extent:
        return x
    grid = x.context.grid
    if height % grid[0] or width % grid[1] or x.extent[0] % height or x.extent[1] % width:
        raise no_form(function, x, None, f"an output of {height}x{width} pixels mixes cells")
    kernel = (x.extent[0] // height, x.extent[1] // width)
    return F.avg_pool2d(x, kernel) if averaging else F.max_pool2d(x, kernel)
