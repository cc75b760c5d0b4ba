"""Does anything leak? Run before a training, on the very encoder and image size that will be trained.

Zeroing hidden pixels of the image makes "change the hidden pixels" pass trivially, so that is not enough. Here every
operation's hidden places are filled with NaN (*poison*): an operation whose sparse form reads them, or a module that
gets at them by another way, shows it in its visible output. The other checks catch forms that are wrong rather than
leaking.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import UserError

from .context import SparseContext, upsample_mask
from .features import dense_maps, run_sparse


def check_leaks(
    encoder: Callable[[Tensor], Any],
    size: int | tuple[int, int],
    stride: int,
    *,
    channels: int = 3,
    batch: int = 2,
    tolerance: float = 1e-7,
    seed: int = 0,
    strict: bool = True,
) -> list[str]:
    """Check that hidden pixels reach no output of an encoder, in evaluation and in training mode.

    A module is copied and checked in float64, so neither its weights, its statistics nor its gradients are touched.
    For both modes: hidden outputs are exactly zero; other hidden image pixels give bit-identical outputs; NaN in every
    hidden place after every operation leaves visible outputs as they are; tiles give the values and the batch-norm
    statistics of the masked-dense algorithm. In evaluation mode, with everything visible, the outputs are the plain
    encoder's.

    Args:
        encoder: as for :func:`~isthmus.layers.sparse_conv.sparse_features`.
        size: image side, or (rows, columns), in pixels.
        stride: side of a cell in pixels; must divide ``size``.
        channels: of the image.
        batch: number of images.
        tolerance: largest relative difference between two ways of computing the same in float64.
        seed: of the images and of the visible cells.
        strict: raise when something is found.

    Returns:
        What was found, one sentence each; empty when nothing leaks.

    Raises:
        UserError: an operation has no sparse form; ``size`` does not fit ``stride``; or, with ``strict``, a finding.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height % stride or width % stride:
        raise UserError(f"an image of {height}x{width} pixels cannot be cut into cells of {stride} pixels.")
    generator = torch.Generator().manual_seed(seed)
    grid = (height // stride, width // stride)
    if grid[0] * grid[1] < 2:
        raise UserError(
            f"an image of {height}x{width} pixels has only one cell of {stride} pixels; use a larger image."
        )
    device = torch.device("cpu")
    if isinstance(encoder, nn.Module):
        encoder = copy.deepcopy(getattr(encoder, "_orig_mod", encoder)).double()
        device = next((p.device for p in encoder.parameters()), device)
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator)
    keep = max(1, round(0.4 * noise.shape[1]))
    visible = (noise.argsort(1).argsort(1) < keep).view(batch, *grid).to(device)
    draw = lambda: torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(device)  # noqa: E731
    trial = _Trial(encoder, draw(), visible)
    other = torch.where(upsample_mask(visible, (height, width)), trial.x, 10 * draw())

    found: list[str] = []
    for training in (False, True) if isinstance(encoder, nn.Module) else (False,):
        when = "training" if training else "evaluation"
        clean, statistics = trial.run(training)
        for level, output in enumerate(clean):
            if output[~trial.mask(output)].any():
                found.append(f"output {level} is not zero where hidden ({when} mode).")
        changed, _ = trial.run(training, x=other)
        found += _differ(changed, clean, 0, f"changes with the hidden pixels of the image ({when} mode)")
        context = SparseContext(visible, poison=True)
        poisoned, _ = trial.run(training, context=context)
        where = f"; first seen in {context.leaks[0]}" if context.leaks else ""
        shown = [[output.masked_fill(~trial.mask(output), 0) for output in outputs] for outputs in (poisoned, clean)]
        found += _differ(shown[0], shown[1], tolerance, f"reads hidden places ({when} mode){where}")
        if SparseContext(visible).tile_size((height, width)) is not None:
            tiled, tiled_statistics = trial.run(training, context=SparseContext(visible, "tiled"))
            found += _differ(tiled, clean, tolerance, f"of tiles is not that of masked maps ({when} mode)")
            found += _differ(
                tiled_statistics, statistics, tolerance, "of the statistics of tiles is not that of masked maps"
            )
    if isinstance(encoder, nn.Module):
        whole, _ = trial.run(False, context=SparseContext(torch.ones_like(visible)))
        with torch.no_grad():
            plain = encoder(trial.x)
        plain = [plain] if isinstance(plain, Tensor) else list(plain)
        found += _differ(whole, plain, tolerance, "with everything visible is not the plain encoder's")
    if found and strict:
        more = f" And {len(found) - 3} more." if len(found) > 3 else ""
        raise UserError(f"the encoder leaks or has a wrong sparse form: {' '.join(found[:3])}{more}")
    return found


class _Trial:
    """One encoder, images and visible cells; every run starts from the same statistics and random state."""

    def __init__(self, encoder: Callable[[Tensor], Any], x: Tensor, visible: Tensor) -> None:
        self.encoder, self.x, self.visible = encoder, x, visible
        self.start = (
            {name: buffer.clone() for name, buffer in encoder.named_buffers()} if isinstance(encoder, nn.Module) else {}
        )

    def mask(self, output: Tensor) -> Tensor:
        """The visible places of an output."""
        return upsample_mask(self.visible, (output.shape[2], output.shape[3])).expand_as(output)

    def run(
        self, training: bool, x: Tensor | None = None, context: SparseContext | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and the floating-point buffers (running statistics) after the run."""
        context = context or SparseContext(self.visible)
        module = self.encoder if isinstance(self.encoder, nn.Module) else None
        if module is not None:
            module.train(training)
            for name, buffer in module.named_buffers():
                buffer.copy_(self.start[name])
        devices = [self.x.device] if self.x.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            context.grad = False
            outputs = dense_maps(run_sparse(self.encoder, self.x if x is None else x, context))
        buffers = [] if module is None else [b.clone() for b in module.buffers() if b.is_floating_point()]
        if module is not None:
            module.eval()
            for name, buffer in module.named_buffers():
                buffer.copy_(self.start[name])
        return outputs, buffers


def _differ(ours: list[Tensor], theirs: list[Tensor], tolerance: float, what: str) -> list[str]:
    """A sentence for every pair that differs by more than ``tolerance`` times its largest value."""
    found = []
    scales = [float(b.abs().max()) if b.numel() else 0.0 for b in theirs]
    floor = 1e-3 * max(scales, default=0.0)  # some statistics are zero but for rounding
    for level, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape or not bool((a - b).abs().max() <= tolerance * max(scales[level], floor)):
            found.append(f"output {level} {what}.")
    return found
