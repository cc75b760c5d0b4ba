"""The front door: any encoder, run on the visible part of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from isthmus.codec import UserError

from . import convs, norms, ops, reduce, shapes  # noqa: F401 - they fill the table of sparse forms
from .context import SparseContext, check_visible
from .norms import SyncForward
from .tensor import NCHW, SparseTensor

MODES = ("auto", "masked", "tiled")
WORTHWHILE = 0.8  # visible share above which finding neighbours costs more than hidden cells save


@torch.compiler.disable
def sparse_features(
    encoder: Callable[[Tensor], Any], x: Tensor, visible: Tensor, mode: str = "auto", *, sync: bool = False
) -> list[Tensor]:
    """Run an unmodified convnet on the visible cells of its images (SparK, arXiv 2301.03580, section 3.2).

    The values, gradients and batch-norm statistics are those of the published masked-dense algorithm in every mode;
    ``"tiled"`` computes only the visible cells. Runs outside of ``torch.compile`` (a graph break). Tiles have first
    derivatives only, and activation checkpointing must be of the non-reentrant kind, timm's default.

    Args:
        encoder: maps images to a list of maps, finest first, or to one map (a timm ``Backbone``, any module).
        x: images ``(B, C, H, W)``.
        visible: ``(B, h, w)`` bool, True where a cell is visible. Usually ``h = H / total stride``.
        mode: ``"masked"``, ``"tiled"``, or ``"auto"``: tiled where the grid divides the image and hides enough of it.
        sync: batch-norm statistics over all ranks (``SyncBatchNorm`` modules do so anyway).

    Returns:
        Maps ``(B, C_l, H_l, W_l)``, exactly zero where hidden.

    Raises:
        UserError: ``visible`` does not fit, or the encoder has an operation without a sparse form; it names the
            operation and the module.
    """
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}; got {mode!r}.")
    context = SparseContext(visible, mode, sync=sync)
    return dense_maps(run_sparse(encoder, x, context))


def run_sparse(encoder: Callable[[Tensor], Any], x: Tensor, context: SparseContext) -> list[SparseTensor]:
    """Like :func:`sparse_features` in a given context; returns the carriers."""
    check_visible(x, context.visible)
    encoder = getattr(encoder, "_orig_mod", encoder)  # a compiled module: the carrier needs its Python form
    if isinstance(encoder, nn.Module):
        prepare(encoder, context)
    outputs = encoder(image_carrier(x, context))
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    for level, output in enumerate(outputs):
        if not isinstance(output, SparseTensor) or output.axes != NCHW or output.padding is not None:
            kind = f"{tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"output {level} of the encoder is no sparse map (B, C, H, W): {kind}.")
    return cast(list[SparseTensor], outputs)


def image_carrier(x: Tensor, context: SparseContext) -> SparseTensor:
    """The images with hidden pixels made zero, whatever stood there."""
    extent = (x.shape[2], x.shape[3])
    if context.mode == "tiled" and context.tile_size(extent) is None:
        raise UserError(
            f"an image of {extent[0]}x{extent[1]} pixels cannot be cut into {context.grid[0]}x{context.grid[1]} equal "
            "cells, so it has no tiles; use mode='masked' or another grid."
        )
    gains = context.tile_size(extent) is not None and float(context.visible.float().mean()) <= WORTHWHILE
    if context.mode == "tiled" or (context.mode == "auto" and gains):
        context.tiling = True
        return SparseTensor(x, context, extent, False).as_tiles()
    mask = context.mask(extent)
    return SparseTensor(x, context, extent, False).finish(x.masked_fill(~mask, 0), clean=True)


def prepare(encoder: nn.Module, context: SparseContext) -> None:
    """Let SyncBatchNorm take carriers (it calls CUDA kernels itself), and remember whose names refusals use."""
    context.root = encoder
    for module in encoder.modules():
        if isinstance(module, nn.SyncBatchNorm) and "forward" not in module.__dict__:
            module.__dict__["forward"] = SyncForward(module)


def dense_maps(carriers: Sequence[SparseTensor]) -> list[Tensor]:
    """The carriers as ordinary tensors with exact zeros where hidden."""
    return [carrier.as_canvas().values for carrier in carriers]
