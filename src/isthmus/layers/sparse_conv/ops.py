"""Sparse forms of functions that act on every pixel alone, and of those that only rearrange channels.

They are the same on a canvas and on tiles. What needs care is a canvas's hidden places: a function with ``f(0) = 0``
keeps them zero, after any other they are made zero again, and a function that is singular at zero gets ones there.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensor import NCHW, SparseTensor, no_form, sparse_form

_OPERATORS = {"add", "sub", "mul", "div", "truediv", "pow", "neg", "abs", "gt", "lt", "ge", "le", "eq", "ne"}


def variants(*names: str) -> list[Any]:
    """Every function of these names in torch, Tensor and torch.nn.functional, in-place twins included."""
    found: list[Any] = []
    for name in names:
        for space in (torch, Tensor, F, torch.special):
            dunders = (f"__{name}__", f"__i{name}__", f"__r{name}__") if name in _OPERATORS else ()
            for spelling in (name, f"{name}_", *dunders):
                function = getattr(space, spelling, None)
                if callable(function) and function not in found:
                    found.append(function)
    return found


def _inplace_position(function: Any) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (TypeError, ValueError):
        return None


def is_inplace(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call writes its result into its first argument."""
    name = function.__name__
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__",)
    if name.endswith("_") or kwargs.get("inplace"):
        return True
    position = _POSITIONS.get(function)
    return position is not None and len(args) > position and bool(args[position])


def out_of_place(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    """The same call without writing into its argument. Needed where the result is masked after it (its old values may
    be wanted for a gradient), and better on views, whose in-place gradients torch computes by copying."""
    name = function.__name__
    if name.startswith("__i"):
        return getattr(Tensor, f"__{name[3:]}"), args, kwargs
    if name.endswith("_"):
        twin = getattr(Tensor, name[:-1], None) or getattr(torch, name[:-1], None) or getattr(F, name[:-1])
        return twin, args, kwargs
    if "inplace" in kwargs:
        return function, args, {**kwargs, "inplace": False}
    position = _POSITIONS[function]
    return function, [*args[:position], False, *args[position + 1 :]], kwargs


# ------------------------------------------------------------------------------------------------------- pointwise

#: f(0) = 0 whatever the other operands are.
ZERO = variants(
    "relu", "relu6", "gelu", "silu", "mish", "hardswish", "leaky_relu", "elu", "celu", "selu", "tanh", "rrelu",
    "hardshrink", "softshrink", "tanhshrink", "softsign", "abs", "neg", "square", "mul", "multiply", "sin", "erf",
    "sign", "dropout", "nan_to_num", "contiguous", "clone", "detach", "float", "double", "half", "bfloat16",
    "type_as", "to",
)  # fmt: skip
#: Zero where every operand is.
ALL = variants("add", "sub", "subtract", "rsub", "maximum", "minimum", "lerp", "addcmul")
#: Not zero at zero.
OTHER = variants(
    "sigmoid", "hardsigmoid", "softplus", "logsigmoid", "exp", "cos", "clamp", "clip", "clamp_min", "clamp_max",
    "hardtanh", "threshold", "where", "masked_fill", "gt", "lt", "ge", "le", "eq", "ne", "logical_not", "erfc", "expm1",
    "floor", "round", "ceil", "addcdiv", "zeros_like", "ones_like", "rand_like", "randn_like", "empty_like",
    "full_like",
)  # fmt: skip
#: Not zero at zero, and its value or its gradient there is not finite.
SINGULAR = variants("sqrt", "rsqrt", "reciprocal", "log", "log1p", "log2", "pow")
#: Division: singular where the carrier divides.
DIVISION = variants("div", "divide", "true_divide", "truediv")

_POSITIONS = {f: p for f in (*ZERO, *OTHER) if (p := _inplace_position(f)) is not None}


def align(carriers: Sequence[SparseTensor], function: Any) -> list[SparseTensor]:
    """The same carriers, all as tiles or all as canvases; refused unless their pixels correspond.

    Raises:
        UserError: maps of different sizes, different axes, or with padding that no convolution has used yet.
    """
    first = carriers[0]
    for other in carriers:
        if other.padding is not None:
            raise no_form(function, carriers, None, "it follows a padding that only a convolution or a pool may follow")
        if other.context is not first.context:
            raise no_form(function, carriers, None, "it mixes maps of two different forward passes")
        if other.axes != first.axes or other.extent != first.extent:
            raise no_form(function, carriers, None, "it mixes maps whose pixels do not correspond")
    if len({carrier.tiled for carrier in carriers}) > 1:
        return [carrier.as_tiles() for carrier in carriers]
    return list(carriers)


def localise(dense: Tensor, lead: SparseTensor) -> Tensor:
    """A dense operand in the form of ``lead``: per-image values are repeated for the tiles of the image, whole maps
    are cut into tiles, anything else broadcasts as it is."""
    if not lead.tiled:
        return dense
    image, row, column = lead.axes
    long = [axis for axis in (row, column) if dense.dim() >= -axis and dense.shape[axis] > 1]
    for axis in list(long):
        if dense.stride(axis) == 0:  # an expanded view, as ECA makes: one value for the whole map
            dense = dense.narrow(axis, 0, 1)
            long.remove(axis)
    if long:
        shape = [1] * (lead.values.dim() - dense.dim()) + list(dense.shape)
        shape[image], shape[row], shape[column] = lead.context.batch, *lead.extent
        canvas = SparseTensor(dense.expand(shape), lead.context, lead.extent, False, lead.axes)
        return canvas.as_tiles().values
    if dense.dim() >= -image and dense.shape[image] > 1:
        return dense.index_select(image, lead.context.cells[0])
    return dense


def _pointwise(function: Any, args: Sequence[Any], kwargs: dict[str, Any], clean: bool, ones: bool = False) -> Any:
    """Apply a function to the values of all carriers; ``ones`` puts 1 in hidden places first (singular functions)."""
    inplace = is_inplace(function, args, kwargs)
    target = args[0] if args else None
    if inplace and not isinstance(target, SparseTensor):
        raise no_form(function, args, kwargs, "it writes a sparse map into a dense tensor")
    operands = [*args, *kwargs.values()]
    carriers = align([operand for operand in operands if isinstance(operand, SparseTensor)], function)
    lead, remaining = carriers[0], iter(carriers)
    plain: list[Any] = []
    for operand in operands:
        if isinstance(operand, SparseTensor):
            carrier = next(remaining)
            spare = ones and not carrier.tiled
            plain.append(carrier.values.masked_fill(~carrier.mask_like(), 1) if spare else carrier.values)
        elif isinstance(operand, Tensor) and operand.dim() > 0:
            plain.append(localise(operand, lead))
        else:
            plain.append(operand)
    positional, named = plain[: len(args)], dict(zip(kwargs, plain[len(args) :], strict=True))
    if inplace and (not clean or ones or (torch.is_grad_enabled() and plain[0]._is_view())):
        function, positional, named = out_of_place(function, positional, named)
    result = lead.finish(function(*positional, **named), clean=clean)
    return target.become(result) if inplace and isinstance(target, SparseTensor) else result


@sparse_form(*ZERO)
def zero_preserving(function: Any, *args: Any, **kwargs: Any) -> Any:
    """ReLU and its kind, products, casts and copies."""
    if function is Tensor.contiguous and args[0].tiled:
        return args[0]  # how tiles are held cannot be seen, and channels-last is what every kernel here likes
    if not isinstance(args[0], SparseTensor) and function in (Tensor.type_as, Tensor.to):
        return args[0].to(dtype=args[1].dtype, device=args[1].device)
    return _pointwise(function, args, kwargs, clean=True)


@sparse_form(*ALL)
def sum_like(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Sums: a dense or constant operand makes hidden places non-zero, so they are masked again."""
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, (Tensor, float, int))]
    return _pointwise(function, args, kwargs, clean=all(isinstance(a, SparseTensor) for a in operands))


@sparse_form(*OTHER)
def masked_again(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Sigmoid and its kind."""
    return _pointwise(function, args, kwargs, clean=False)


@sparse_form(*SINGULAR)
def kept_from_zero(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Square roots, logarithms, powers."""
    return _pointwise(function, args, kwargs, clean=False, ones=True)


@sparse_form(*DIVISION)
def division(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A carrier over a dense tensor keeps zeros; over a carrier it must be kept from zero over zero."""
    reverse = function.__name__.startswith("__r")
    singular = reverse or any(isinstance(a, SparseTensor) for a in (*args[1:], *kwargs.values()))
    return _pointwise(function, args, kwargs, clean=not singular, ones=singular)


@sparse_form(F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, F.alpha_dropout)
def channel_dropout(
    function: Any, x: SparseTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Dropout of whole channels of an image: drawn once an image, not once a tile."""
    if function is not F.dropout2d or x.axes != NCHW:
        raise no_form(function, x)
    return x * F.dropout2d(x.values.new_ones(x.context.batch, x.values.shape[1], 1, 1), p, training)


@sparse_form(
    F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.normalize
)
def over_channels(function: Any, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Functions along one axis: allowed along channels."""
    dim = kwargs.get("dim", args[1] if function is F.normalize and len(args) > 1 else args[0] if args else 1)
    channel_axes(function, x, dim)
    return x.finish(function(x.values, *args, **kwargs))


@sparse_form(*variants("prelu"))
def prelu(function: Any, x: SparseTensor, weight: Tensor) -> SparseTensor:
    """The weight lies along the second axis, which is the channels of ``(B, C, H, W)``."""
    if x.axes != NCHW:
        raise no_form(function, x)
    channel_axes(function, x, 1)
    return x.finish(function(x.values, weight), clean=True)


@sparse_form(F.linear)
def linear(function: Any, x: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    """A linear layer on channels-last maps: a 1 x 1 convolution."""
    channel_axes(function, x, -1)
    x.context.work["tiles" if x.tiled else "canvas"] += x.pixels * weight.numel()
    return x.finish(F.linear(x.values, weight, bias), clean=bias is None)


@sparse_form(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(function: Any, x: Any, weight: Any) -> SparseTensor:
    """``x @ W`` on channels-last maps."""
    if not isinstance(x, SparseTensor) or isinstance(weight, SparseTensor) or weight.dim() != 2:
        raise no_form(function, (x, weight), None, "only a channels-last map times a matrix is pointwise")
    channel_axes(function, x, -1)
    return x.finish(x.values @ weight, clean=True)


@sparse_form(torch.einsum)
def einsum(function: Any, equation: str, *operands: Any) -> SparseTensor:
    """``einsum`` of one map with dense tensors that leaves image, row and column axes alone."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    carriers = [n for n, operand in enumerate(operands) if isinstance(operand, SparseTensor)]
    if len(carriers) == 1 and arrow and "." not in equation:
        n = carriers[0]
        x = operands[n]
        special = [letters[n][axis] for axis in x.axes]
        others = "".join(part for k, part in enumerate(letters) if k != n)
        if all(s in output and s not in others for s in special):
            axes = tuple(output.index(s) - len(output) for s in special)
            values = torch.einsum(equation, *(x.values if k == n else o for k, o in enumerate(operands)))
            return x.finish(values, axes, clean=True)  # type: ignore[arg-type]
    raise no_form(function, operands, None, "it mixes pixels or images")


# -------------------------------------------------------------------------------------------------------- channels


def channel_axes(function: Any, x: SparseTensor, dims: Any) -> list[int]:
    """``dims`` counted from the right; refused where one is the image, row or column axis, or padding is pending."""
    if not isinstance(x, SparseTensor):
        raise no_form(function, x)
    if x.padding is not None:
        raise no_form(function, x, None, "it follows a padding that only a convolution or a pool may follow")
    count = x.values.dim()
    listed = [dims] if isinstance(dims, int) else list(dims)
    axes = [dim if dim < 0 else dim - count for dim in listed]
    if any(axis in x.axes for axis in axes):
        raise no_form(function, x, None, "it works across images, rows or columns")
    return axes


@sparse_form(torch.cat, torch.concat, torch.concatenate, torch.stack)
def cat(function: Any, tensors: Sequence[Any], dim: int = 0) -> SparseTensor:
    """Concatenation or stacking of maps along channels."""
    if not all(isinstance(t, SparseTensor) for t in tensors):
        raise no_form(function, tensors, None, "it joins a sparse map with a dense tensor")
    aligned = align(tensors, function)
    first = aligned[0]
    count = first.values.dim()
    values = [t.values for t in aligned]
    if function is not torch.stack:
        channel_axes(function, first, dim)
        return first.finish(function(values, dim), clean=True)
    position = dim - count - 1 if dim >= 0 else dim  # of the new axis, counted from the right of the result
    axes = tuple(a if a > position else a - 1 for a in first.axes)
    return first.finish(torch.stack(values, dim), axes, clean=True)  # type: ignore[arg-type]


@sparse_form(*variants("chunk", "split", "tensor_split", "narrow", "index_select", "roll", "flip", "cumsum", "glu"))
def along_channels(function: Any, x: SparseTensor, *args: Any, **kwargs: Any) -> Any:
    """Cutting, picking and turning channels: the axis must be one of theirs."""
    name = function.__name__
    if name in ("narrow", "index_select"):
        dim = kwargs.get("dim", args[0] if args else 0)
    elif name in ("roll", "flip"):
        dim = kwargs.get("dims", args[-1] if args else ())
    elif name == "glu":
        dim = kwargs.get("dim", args[0] if args else -1)
    elif name == "cumsum":
        dim = kwargs.get("dim", args[0] if args else 0)
    else:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    channel_axes(function, x, dim)
    result = function(x.values, *args, **kwargs)
    if isinstance(result, (list, tuple)):
        return type(result)(x.finish(r, clean=True) for r in result)
    return x.finish(result, clean=True)


@sparse_form(torch.unbind, Tensor.unbind, torch.select, Tensor.select)
def dropping(function: Any, x: SparseTensor, dim: int = 0, *args: Any, **kwargs: Any) -> Any:
    """One channel axis is taken apart."""
    (gone,) = channel_axes(function, x, dim)
    axes: Any = tuple(a if a > gone else a + 1 for a in x.axes)
    result = function(x.values, dim, *args, **kwargs)
    if isinstance(result, tuple):
        return tuple(x.finish(r, axes, clean=True) for r in result)
    return x.finish(result, axes, clean=True)


@sparse_form(Tensor.__getitem__)
def getitem(function: Any, x: SparseTensor, index: Any) -> SparseTensor:
    """Indexing of channels; image, row and column axes must be taken whole."""
    if not isinstance(x, SparseTensor):
        raise no_form(function, (x, index), None, "a map cannot be an index")
    parts = list(index) if isinstance(index, tuple) else [index]
    count = x.values.dim()
    used = sum(part is not None and part is not Ellipsis for part in parts)
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    at = next(k for k, part in enumerate(parts) if part is Ellipsis)
    parts[at : at + 1] = [slice(None)] * (count - used)
    channel_axes(function, x, [])
    if x.axes == NCHW and count == used == 4 and all(isinstance(part, slice) for part in parts):
        image, channel, row, column = parts
        if image == slice(None) and (row, column) != (slice(None), slice(None)):
            from .convs import crop

            x, row, column = crop(x, row, column), slice(None), slice(None)
            parts = [image, channel, row, column]
    kept: list[int | None] = []  # for every axis of the result, the axis of x that it came from
    axis = -count
    for part in parts:
        if part is None:
            kept.append(None)
            continue
        if axis in x.axes:
            length = x.shape[axis]
            if not isinstance(part, slice) or part.indices(length) != (0, length, 1):
                raise no_form(function, x, None, "it takes a part of the images, rows or columns")
        if not isinstance(part, int):
            kept.append(axis)
        axis += 1
    axes: Any = tuple(kept.index(a) - len(kept) for a in x.axes)
    return x.finish(x.values[tuple(parts)], axes, clean=True)
