"""Sparse forms of normalisations: statistics are those of visible pixels, hidden pixels stay exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import UserError

from .ops import channel_axes
from .reduce import _variance
from .tensor import NCHW, SparseTensor, calling_module, no_form, sparse_form
from .tiles import PutRows, TakeRows


def rows_of(x: SparseTensor) -> Tensor:
    """The visible pixels of a map ``(B, C, H, W)`` as rows ``(M, C)``; a view of tiles held channels-last."""
    if x.tiled:
        return x.values.permute(0, 2, 3, 1).reshape(-1, x.values.shape[1])
    rows = x.values.permute(0, 2, 3, 1).reshape(-1, x.values.shape[1])
    return TakeRows.apply(rows, x.context.pixels(x.extent))


def map_of(rows: Tensor, x: SparseTensor) -> SparseTensor:
    """The inverse of :func:`rows_of`: a map of the geometry of ``x`` from its visible pixels."""
    if x.tiled:
        shape = (x.values.shape[0], *x.values.shape[2:], rows.shape[1])
        return x.like(rows.view(shape).permute(0, 3, 1, 2))
    height, width = x.extent
    canvas = PutRows.apply(rows, x.context.pixels(x.extent), x.context.batch * height * width)
    values = canvas.view(x.context.batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)
    return x.finish(values, clean=True)


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, where activation checkpointing repeats a forward pass."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


@sparse_form(F.batch_norm, torch.batch_norm)
def batch_norm(
    function: Any,
    x: SparseTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *unused: Any,
) -> SparseTensor:
    """Batch norm over the visible pixels of the batch (unbiased variance into the running statistics)."""
    if x.axes != NCHW:
        raise no_form(function, x)
    channel_axes(function, x, [])
    rows = rows_of(x)
    if training and len(rows) < 2 and not (x.context.sync and _world() > 1):
        raise UserError(
            f"batch norm in {calling_module(x.context)} has a single visible pixel to train on; use a larger batch or "
            "larger images, or hide less."
        )
    if _recomputing():  # the first pass has moved the running statistics already
        running_mean, running_var = _copy(running_mean), _copy(running_var)
    if training and x.context.sync and _world() > 1:
        rows = _synchronised(rows, running_mean, running_var, weight, bias, momentum, eps, None)
    else:
        rows = normalise_rows(rows, running_mean, running_var, weight, bias, training, momentum, eps)
    return map_of(rows, x)


def normalise_rows(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm of rows ``(M, C)`` as M pictures of one pixel, torch's fastest form.

    Not as one picture of M pixels: torch's CPU gradient is wrong for a channels-last batch of one.
    """
    pictures = rows[:, :, None, None]
    return F.batch_norm(pictures, running_mean, running_var, weight, bias, training, momentum, eps)[:, :, 0, 0]


def _copy(statistic: Tensor | None) -> Tensor | None:
    return None if statistic is None else statistic.clone()


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _synchronised(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """Batch norm of the rows of all ranks together, whose numbers may differ."""
    channels = rows.shape[1]
    local = torch.cat([rows.sum(0), rows.new_full((1,), len(rows))])
    sums = _SumOverRanks.apply(local, group)
    number = sums[channels].detach()
    mean = sums[:channels] / number
    centred = rows - mean
    variance = _SumOverRanks.apply(centred.square().sum(0), group) / number
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * number / (number - 1).clamp_min(1)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    result = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        result = result * weight
    return result if bias is None else result + bias


class SyncForward:
    """Stands before ``SyncBatchNorm.forward``, whose CUDA kernels know no masks; dense inputs go the usual way."""

    def __init__(self, module: nn.SyncBatchNorm) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        if not isinstance(x, SparseTensor):
            return type(module).forward(module, x)
        training = module.training or module.running_mean is None
        if module.training and module.num_batches_tracked is not None and not _recomputing():
            module.num_batches_tracked.add_(1)
        momentum = module.momentum
        if momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked) if module.num_batches_tracked is not None else 0.0
        group = module.process_group
        arguments = (module.running_mean, module.running_var, module.weight, module.bias)
        if _recomputing():
            arguments = (_copy(arguments[0]), _copy(arguments[1]), arguments[2], arguments[3])
        if training and _world() > 1:
            result = map_of(_synchronised(rows_of(x), *arguments, momentum, module.eps, group), x)
        else:
            result = F.batch_norm(x, *arguments, training, momentum, module.eps)
        # timm's SyncBatchNormAct adds dropout and activation.
        for name in ("drop", "act"):
            extra = getattr(module, name, None)
            if extra is not None:
                result = extra(result)
        return result


@sparse_form(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def layer_norm(
    function: Any, x: SparseTensor, normalized_shape: Sequence[int], weight: Any = None, *args: Any, **kwargs: Any
) -> SparseTensor:
    """Layer norm over channels, pixel by pixel, on channels-last maps; the bias does not reach hidden pixels."""
    channel_axes(function, x, range(-len(normalized_shape), 0))
    return x.finish(function(x.values, normalized_shape, weight, *args, **kwargs))


@sparse_form(F.group_norm, torch.group_norm)
def group_norm(
    function: Any,
    x: SparseTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> SparseTensor:
    """Group norm of every image over its visible pixels."""
    if x.axes != NCHW:
        raise no_form(function, x)
    channels = x.values.shape[1]
    grouped: Any = x.unflatten(1, (num_groups, channels // num_groups))
    variance, mean = _variance(grouped, [-3, -2, -1], 0)
    scale = torch.rsqrt(variance + eps)
    ones = x.values.new_ones(channels) if weight is None else weight
    scale = (scale * ones.view(1, num_groups, -1, 1, 1)).flatten(1, 2)
    shift = -(mean.expand(-1, -1, channels // num_groups, -1, -1).flatten(1, 2) * scale)
    if bias is not None:
        shift = shift + bias.view(1, -1, 1, 1)
    return torch.addcmul(shift, x, scale)  # type: ignore[return-value]


@sparse_form(F.instance_norm, torch.instance_norm)
def instance_norm(
    function: Any,
    x: SparseTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *unused: Any,
) -> SparseTensor:
    """Instance norm over visible pixels, without running statistics."""
    if running_mean is not None or not use_input_stats:
        raise no_form(function, x, None, "running statistics of instance norm")
    return group_norm(function, x, x.values.shape[1], weight, bias, eps)
