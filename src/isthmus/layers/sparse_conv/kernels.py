"""Convolutions on the rows of tiles, with gradients that stay as sparse as the forward pass.

Three ways, chosen by :mod:`.tiled` from the size of a tile: windows for large tiles, taps for small ones, and the
canvas for depthwise kernels on small tiles. The gradient towards the input of a stride-1 convolution is itself a
sparse convolution, with the kernel turned by half a turn; torch's own backward pass would also compute the gradient of
every window's rim, which is thrown away. Windows are not kept for the backward pass but gathered anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .context import SparseContext
from .tiles import Pair, Window, as_picture, as_rows, put_rows, taps, tile_pixels, window


def gather(rows: Tensor, plan: Window, outside: float = 0.0) -> Tensor:
    """The windows of all tiles ``(K, C, u, v)``, channels-last."""
    picked = rows.index_select(0, plan.index).index_fill_(0, plan.hidden, 0)
    return as_picture(picked.index_fill_(0, plan.outside, outside), plan.size)


def spread(gradient: Tensor, plan: Window, length: int) -> Tensor:
    """The gradient of :func:`gather`: every pixel sums what its readers send; ``gradient`` is overwritten."""
    gradient = as_rows(gradient).index_fill_(0, plan.hidden, 0).index_fill_(0, plan.outside, 0)
    return gradient.new_zeros(length, gradient.shape[1]).index_add_(0, plan.index, gradient)


class GatherWindows(torch.autograd.Function):
    """:func:`gather` with its gradient, for pools."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Window, outside: float) -> Tensor:
        ctx.plan, ctx.length = plan, rows.shape[0]
        return gather(rows, plan, outside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return spread(gradient.clone(), ctx.plan, ctx.length), None, None


class Geometry:
    """A convolution's numbers, and the map and context it runs in."""

    def __init__(
        self,
        context: SparseContext,
        extent: Pair,
        kernel: Pair,
        stride: Pair,
        before: Pair,
        dilation: Pair,
        groups: int,
    ) -> None:
        self.context, self.extent = context, extent
        self.kernel, self.stride, self.before, self.dilation, self.groups = kernel, stride, before, dilation, groups
        self.reach: Pair = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))  # type: ignore[assignment]
        size = context.tile_size(extent)
        assert size is not None
        self.tile = size
        self.out_tile: Pair = (size[0] // stride[0], size[1] // stride[1])

    @property
    def turned(self) -> Pair:
        """Padding before, of the convolution that computes the gradient towards the input (stride 1)."""
        return (self.reach[0] - 1 - self.before[0], self.reach[1] - 1 - self.before[1])

    def window(self) -> Window:
        """What the forward pass reads."""
        return window(self.context, self.extent, self.reach, self.stride, self.before)

    def turned_window(self) -> Window:
        """What the gradient towards the input reads."""
        return window(self.context, self.extent, self.reach, (1, 1), self.turned)

    def taps(self) -> list[tuple[Tensor, Tensor]]:
        """The rule book."""
        return taps(self.context, self.extent, self.kernel, self.stride, self.before, self.dilation)


def turn(weight: Tensor, groups: int) -> Tensor:
    """``(O, I / g, k, l)`` to the weight of the transposed convolution ``(I, O / g, k, l)``, by half a turn."""
    out, inner = weight.shape[:2]
    weight = weight.flip(2, 3).view(groups, out // groups, inner, *weight.shape[2:])
    return weight.transpose(1, 2).reshape(groups * inner, out // groups, *weight.shape[3:])


class WindowConv(torch.autograd.Function):
    """Every tile's window, convolved without padding."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.g = g
        out = F.conv2d(gather(rows, g.window()), weight, bias, g.stride, 0, g.dilation, g.groups)
        return as_rows(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        g: Geometry = ctx.g
        for_rows, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_rows = grad_weight = None
        strided = g.stride != (1, 1) or min(g.turned) < 0
        picture = as_picture(gradient.contiguous(), g.out_tile)
        if for_weight or (for_rows and strided):
            windows = gather(rows, g.window())
            grad_windows, grad_weight, _ = torch.ops.aten.convolution_backward(
                picture, windows, weight, None, g.stride, (0, 0), g.dilation, False, (0, 0), g.groups,
                (for_rows and strided, for_weight, False),
            )  # fmt: skip
            if for_rows and strided:
                grad_rows = spread(grad_windows, g.window(), rows.shape[0])
            del windows
        if for_rows and not strided:
            turned = turn(weight, g.groups)
            grad_rows = as_rows(
                F.conv2d(gather(gradient.contiguous(), g.turned_window()), turned, None, 1, 0, g.dilation, g.groups)
            )
        return grad_rows, grad_weight, gradient.sum(0) if for_bias else None, None


class TapConv(torch.autograd.Function):
    """Submanifold convolution by rule book: one matrix product a tap, over the visible pairs of that tap only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        # (O, k, l, I): for every tap a matrix (O, I) that BLAS takes as it is; no copy of a channels-last weight.
        matrices = weight.permute(0, 2, 3, 1).contiguous().flatten(1, 2)
        ctx.save_for_backward(rows, matrices)
        ctx.g = g
        length = rows.shape[0] // (g.stride[0] * g.stride[1])
        out: Tensor | None = None
        pending = []
        for tap, (source, target) in enumerate(g.taps()):
            if len(target) == length and out is None:  # usually the central tap: every output reads through it
                out = F.linear(rows.index_select(0, source), matrices[:, tap], bias)
            elif len(target):
                pending.append(tap)
        if out is None:
            out = rows.new_zeros(length, weight.shape[0]) if bias is None else bias.expand(length, -1).clone()
        for tap in pending:
            source, target = g.taps()[tap]
            out.index_add_(0, target, rows.index_select(0, source) @ matrices[:, tap].t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, matrices = ctx.saved_tensors
        g: Geometry = ctx.g
        for_rows, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_rows = rows.new_zeros(rows.shape) if for_rows else None
        grad_matrices = torch.empty_like(matrices) if for_weight else None
        for tap, (source, target) in enumerate(g.taps()):
            if not len(target):
                if grad_matrices is not None:
                    grad_matrices[:, tap] = 0
                continue
            sent = gradient.index_select(0, target)
            if grad_matrices is not None:
                torch.mm(sent.t(), rows.index_select(0, source), out=grad_matrices[:, tap])
            if grad_rows is not None:
                grad_rows.index_add_(0, source, sent @ matrices[:, tap])
        grad_weight = None
        if grad_matrices is not None:
            grad_weight = grad_matrices.unflatten(1, g.kernel).permute(0, 3, 1, 2)
        return grad_rows, grad_weight, gradient.sum(0) if for_bias else None, None


class DepthwiseConv(torch.autograd.Function):
    """Depthwise convolution of stride 1 that keeps the size of its map.

    It has so little arithmetic that on small tiles, whose windows are mostly rim, a pass over the whole canvas costs
    less than gathering. Its weight's gradient is a correlation of input and gradient; written as a depthwise
    convolution whose *kernel* is the gradient, it runs several times faster on a CPU than torch's own.
    """

    LARGE = 8  # pixels a side from which windows are better

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.g = g
        return DepthwiseConv.run(rows, weight, bias, g, g.before)

    @staticmethod
    def run(rows: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, before: Pair) -> Tensor:
        """The convolution itself, with this padding before rows and columns."""
        if min(g.tile) >= DepthwiseConv.LARGE:
            windows = gather(rows, window(g.context, g.extent, g.reach, (1, 1), before))
            return as_rows(F.conv2d(windows, weight, bias, 1, 0, g.dilation, g.groups))
        index = tile_pixels(g.context, g.extent)
        after = [r - 1 - b for r, b in zip(g.reach, before, strict=True)]
        canvas = as_picture(put_rows(rows, index, g.context.batch * g.extent[0] * g.extent[1]), g.extent)
        if after == list(before):
            out = F.conv2d(canvas, weight, bias, 1, before, g.dilation, g.groups)
        else:
            canvas = F.pad(canvas, (before[1], after[1], before[0], after[0]))
            out = F.conv2d(canvas, weight, bias, 1, 0, g.dilation, g.groups)
        return as_rows(out).index_select(0, index)

    @staticmethod
    def weight_gradient(rows: Tensor, gradient: Tensor, g: Geometry) -> Tensor:
        """``(C, 1, k, l)``: every tap's sum over pixels of input times gradient."""
        channels = rows.shape[1]
        if min(g.tile) >= DepthwiseConv.LARGE:
            inputs = gather(rows, g.window())
            sent = as_picture(gradient.contiguous(), g.tile)
        else:
            index, length = tile_pixels(g.context, g.extent), g.context.batch * g.extent[0] * g.extent[1]
            inputs = as_picture(put_rows(rows, index, length), g.extent)
            after = [r - 1 - b for r, b in zip(g.reach, g.before, strict=True)]
            inputs = F.pad(inputs, (g.before[1], after[1], g.before[0], after[0]))
            sent = as_picture(put_rows(gradient, index, length), g.extent)
        count = inputs.shape[0]
        inputs = inputs.contiguous().view(1, count * channels, *inputs.shape[2:])
        sent = sent.contiguous().view(count * channels, 1, *sent.shape[2:])
        taps_of_all = F.conv2d(inputs, sent, None, g.dilation, 0, 1, count * channels)
        return taps_of_all.view(count, channels, *g.kernel).sum(0)[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        g: Geometry = ctx.g
        for_rows, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_rows = DepthwiseConv.run(gradient, weight.flip(2, 3), None, g, g.turned) if for_rows else None
        grad_weight = DepthwiseConv.weight_gradient(rows, gradient, g) if for_weight else None
        return grad_rows, grad_weight, gradient.sum(0) if for_bias else None, None
