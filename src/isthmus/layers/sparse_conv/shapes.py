"""Sparse forms of functions that only move axes, and what a carrier answers about itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import channel_axes, variants
from .tensor import SparseTensor, no_form, sparse_form

# ----------------------------------------------------------------------------------------------- what it says of itself

_ATTRIBUTES = (
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "is_mkldnn", "is_nested", "is_mps", "is_xpu", "itemsize", "names",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "get_device", "element_size",
    "stride", "is_contiguous", "is_inference", "type", "__len__", "__hash__",
)  # fmt: skip


@sparse_form(
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
)
def metadata(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Shape, type and device of the whole map."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


@sparse_form(Tensor.requires_grad.__get__, Tensor.grad_fn.__get__, Tensor.is_leaf.__get__)  # type: ignore[attr-defined]
def history(function: Any, x: SparseTensor) -> Any:
    """The autograd history is that of the values."""
    return function(x.values)


@sparse_form(torch.is_tensor)
def is_tensor(function: Any, x: Any) -> bool:
    """A carrier is one."""
    return True


@sparse_form(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor)
def new_dense(function: Any, x: SparseTensor, *args: Any, **kwargs: Any) -> Tensor:
    """A dense tensor of the same type on the same device (drop path draws into one)."""
    return function(x.values, *args, **kwargs)


# ------------------------------------------------------------------------------------------------------- moving axes


@sparse_form(Tensor.permute, torch.permute)
def permute(function: Any, x: SparseTensor, *dims: Any) -> SparseTensor:
    """Any order of axes."""
    channel_axes(function, x, [])
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    count = x.values.dim()
    order = [d % count for d in order]
    axes: Any = tuple(order.index(a % count) - count for a in x.axes)
    return x.like(x.values.permute(order), axes)


@sparse_form(*variants("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"))
def transpose(function: Any, x: SparseTensor, source: Any, target: Any) -> SparseTensor:
    """Two axes exchanged, or some moved: found by moving numbers instead of values."""
    numbers = torch.arange(math.prod(range(2, x.values.dim() + 2))).view(tuple(range(2, x.values.dim() + 2)))
    moved = function(numbers, source, target)
    return permute(function, x, [size - 2 for size in moved.shape])


@sparse_form(Tensor.unsqueeze, torch.unsqueeze)
def unsqueeze(function: Any, x: SparseTensor, dim: int) -> SparseTensor:
    """A new channel axis."""
    channel_axes(function, x, [])
    position = dim - x.values.dim() - 1 if dim >= 0 else dim
    axes: Any = tuple(a if a > position else a - 1 for a in x.axes)
    return x.like(x.values.unsqueeze(dim), axes)


@sparse_form(Tensor.squeeze, torch.squeeze)
def squeeze(function: Any, x: SparseTensor, dim: int) -> SparseTensor:
    """A channel axis of one channel taken away."""
    (gone,) = channel_axes(function, x, dim)
    if x.values.shape[gone] != 1:
        return x
    axes: Any = tuple(a if a > gone else a + 1 for a in x.axes)
    return x.like(x.values.squeeze(gone), axes)


@sparse_form(*variants("view", "reshape", "flatten", "unflatten"), Tensor.view_as, Tensor.reshape_as)
def reshape(function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Channels split into groups or joined again. Image, row and column axes must survive."""
    if not isinstance(x, SparseTensor):  # dense.view_as(map)
        return function(x, args[0].shape)
    channel_axes(function, x, [])
    old = list(x.shape)
    name = function.__name__
    if name == "flatten":
        start, end = (*args, *(0, -1)[len(args) :])
        start, end = kwargs.get("start_dim", start) % len(old), kwargs.get("end_dim", end) % len(old)
        new = old[:start] + [math.prod(old[start : end + 1])] + old[end + 1 :]
    elif name == "unflatten":
        dim, sizes = args[0] % len(old), list(args[1])
        new = old[:dim] + sizes + old[dim + 1 :]
        if -1 in sizes:
            new[new.index(-1)] = old[dim] // -math.prod(sizes)
    elif name in ("view_as", "reshape_as"):
        new = list(args[0].shape)
    else:
        shape = kwargs.get("shape", kwargs.get("size", args[0] if len(args) == 1 else args))
        if isinstance(shape, torch.dtype):
            raise no_form(function, x)
        new = [shape] if isinstance(shape, int) else list(shape)
        if -1 in new:
            new[new.index(-1)] = math.prod(old) // -math.prod(new)
    axes = _surviving(old, new, x.axes)
    if axes is None:
        raise no_form(function, x, None, f"its new shape {tuple(new)} joins pixels or images")
    held = list(new)
    for axis_new, axis_old in zip(axes, x.axes, strict=True):
        held[axis_new] = x.values.shape[axis_old]
    return x.like(x.values.reshape(held), axes)


def _surviving(old: Sequence[int], new: Sequence[int], axes: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Where the axes are after a reshape: the product of the sizes before an axis, and its size, must reappear."""
    found: dict[int, int] = {}
    start = 0
    for axis in sorted(axes):
        before, length = math.prod(old[: len(old) + axis]), old[axis]
        for position in range(start, len(new)):
            if math.prod(new[:position]) == before and new[position] == length:
                found[axis] = position - len(new)
                start = position + 1
                break
        else:
            return None
    return (found[axes[0]], found[axes[1]], found[axes[2]])


@sparse_form(Tensor.expand, Tensor.expand_as, Tensor.repeat)
def expand(function: Any, x: Any, *args: Any) -> Any:
    """Channels repeated; or a dense tensor expanded to the shape of a map, which stays dense."""
    if not isinstance(x, SparseTensor):
        return x.expand(args[0].shape)
    channel_axes(function, x, [])
    sizes = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
    sizes = list(sizes.shape) if isinstance(sizes, Tensor) else list(sizes)
    keep = 1 if function is Tensor.repeat else -1
    for axis in x.axes:
        if sizes[axis] not in ((1,) if function is Tensor.repeat else (-1, x.shape[axis])):
            raise no_form(function, x, None, "it repeats images, rows or columns")
        sizes[axis] = keep
    if function is Tensor.repeat:
        return x.like(x.values.repeat(sizes))
    return x.like(x.values.expand(sizes))


@sparse_form(F.channel_shuffle, torch.channel_shuffle)
def channel_shuffle(function: Any, x: SparseTensor, groups: int) -> SparseTensor:
    """Groups of channels dealt out."""
    channel_axes(function, x, -3)
    return x.finish(x.values.unflatten(-3, (groups, -1)).transpose(-3, -4).flatten(-4, -3), clean=True)
