"""Structural re-parameterisation: parallel convolutions while training, one convolution afterwards, the same outputs.

RepLKNet (arXiv 2203.06717) puts a small kernel beside a large one, UniRepLKNet (arXiv 2311.15599) several dilated ones,
FFNet rectangular ones. All are sums of convolution + batch norm on the same zero-padded input, so in eval mode the sum
is one convolution: fold each norm into its kernel, spread dilated taps, centre the small kernels in the large one, add.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from isthmus.layers.large_kernel import DepthwiseConv

Kernel = int | tuple[int, ...]
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def embed_kernel(w: Tensor, size: Kernel, dilation: int = 1) -> Tensor:
    """The kernel of side ``size`` without dilation that computes the same as ``w`` with ``dilation``.

    Tap ``(i, j)`` goes to ``(r·i, r·j)``, zeros between, and zeros all around up to ``size``.

    Args:
        w: ``(O, I, *k)``, depthwise, grouped or dense.
        size: side of the result, one number or one for every axis.
        dilation: r, the distance of the taps of ``w``.

    Returns:
        ``(O, I, *size)``.

    Raises:
        ValueError: the dilated kernel is larger than ``size``, or the centres cannot coincide because one side is even
            and the other odd.
    """
    if dilation < 1:
        raise ValueError(f"dilation {dilation}: the taps of a kernel are at least 1 apart.")
    taps = w.shape[2:]
    sides = (size,) * len(taps) if isinstance(size, int) else tuple(size)
    spans = tuple(dilation * (k - 1) + 1 for k in taps)
    if len(sides) != len(taps) or any(s < e or (s - e) % 2 for s, e in zip(sides, spans, strict=True)):
        raise ValueError(
            f"a kernel of {tuple(taps)} taps, {dilation} apart, spans {spans} and cannot be centred in {sides}: it "
            "must be no larger, and odd where the other is odd."
        )
    out = w.new_zeros(*w.shape[:2], *sides)
    starts = [(s - e) // 2 for s, e in zip(sides, spans, strict=True)]
    out[(..., *(slice(a, a + e, dilation) for a, e in zip(starts, spans, strict=True)))] = w
    return out


def check_mergeable(module: nn.Module) -> None:
    """Refuse to merge in training mode, where batch norm uses the batch's statistics and no constant kernel exists."""
    if module.training:
        raise ValueError(f"{type(module).__name__} is in training mode; call .eval() before reparameterize().")


def warn_if_untrained(norm: nn.Module) -> None:
    """Warn when a batch norm still has the statistics that it was born with; the merge would freeze them."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if isinstance(mean, Tensor) and isinstance(var, Tensor) and not mean.any() and bool((var == 1).all()):
        warnings.warn(
            "merging batch norms whose running statistics were never updated; train the network or load a checkpoint "
            "first.",
            stacklevel=3,
        )


def fuse_norm(conv: Any, norm: nn.Module) -> None:
    """Fold a batch norm into the convolution before it, in place; the caller replaces the norm by an identity."""
    warn_if_untrained(norm)
    weight, bias = _fused(conv, norm)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)


def _fused(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Kernel and bias of convolution + batch norm: W·γ/σ and β + (b - μ)·γ/σ."""
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )  # fmt: skip
    return weight.detach(), bias.detach()


class ReparamConv(nn.Module):
    """y = BN(conv_K(x)) + Σ_j BN_j(conv_{k_j, dilation r_j}(x)) while training; one convolution once merged.

    Args:
        channels: C; the convolutions are depthwise unless ``groups`` says otherwise.
        kernel: K, the odd side of the main kernel (or one side for every axis).
        branches: ``(kernel, dilation)`` of every further branch.
        stride: of all branches.
        ndim: 1, 2 or 3 spatial axes.
        groups: of all branches; ``None`` is depthwise.
        out_channels: of the output, C by default; several kernels a channel where it is a multiple of C.
        deploy: build the merged form at once, for a merged checkpoint.

    Shapes: ``(B, C, *S)`` → ``(B, out_channels, *ceil(S / stride))``.

    Raises:
        ValueError: an even kernel, a branch that spans more than the main kernel, or ``out_channels`` that are no
            multiple of the groups.
    """

    def __init__(
        self,
        channels: int,
        kernel: Kernel,
        branches: Sequence[tuple[Kernel, int]] = (),
        stride: int = 1,
        ndim: int = 2,
        *,
        groups: int | None = None,
        out_channels: int | None = None,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.kernel = _sides(kernel, ndim)
        for taps, dilation in ((kernel, 1), *branches):
            spans = tuple(dilation * (k - 1) + 1 for k in _sides(taps, ndim))
            if dilation < 1 or any(e < 1 or e % 2 == 0 or e > k for e, k in zip(spans, self.kernel, strict=True)):
                raise ValueError(
                    f"a branch with kernel {taps} and dilation {dilation} spans {spans}; it must be odd and no larger "
                    f"than the main kernel {self.kernel}."
                )
        self.channels, self.stride, self.ndim = channels, stride, ndim
        self.groups = channels if groups is None else groups
        self.out_channels = channels if out_channels is None else out_channels
        if self.out_channels < 1 or self.out_channels % self.groups:
            raise ValueError(f"{self.out_channels} output channels: they must be a multiple of {self.groups} groups.")
        self.dilations = tuple(dilation for _, dilation in branches)
        if deploy:
            self.conv: Any = self._conv(kernel, 1, bias=True)
        else:
            self.conv = None
            self.main: Any = self._branch(kernel, 1)
            self.branches: Any = nn.ModuleList(self._branch(taps, dilation) for taps, dilation in branches)

    @property
    def merged(self) -> bool:
        """Whether one convolution is all that is left."""
        return self.conv is not None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *S)`` → ``(B, out_channels, *ceil(S / stride))``."""
        if self.conv is not None:
            return self.conv(x)
        y = self.main(x)
        for branch in self.branches:
            y = y + branch(x)
        return y

    @torch.no_grad()
    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel ``(out, C / groups, *K)`` and bias ``(out,)`` of the one convolution equal to this in eval mode."""
        if self.conv is not None:
            return self.conv.weight.detach(), self.conv.bias.detach()
        weight, bias = _fused(self.main.conv, self.main.norm)
        for branch, dilation in zip(self.branches, self.dilations, strict=True):
            w, b = _fused(branch.conv, branch.norm)
            weight, bias = weight + embed_kernel(w, self.kernel, dilation), bias + b
        return weight, bias

    def reparameterize(self) -> None:
        """Replace the branches by one convolution, in place. A second call does nothing.

        Raises:
            ValueError: in training mode.
        """
        if self.merged:
            return
        check_mergeable(self)
        warn_if_untrained(self.main.norm)
        weight, bias = self.equivalent()
        conv = self._conv(self.kernel if self.ndim > 1 else self.kernel[0], 1, bias=True).to(weight)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.conv = conv.eval()
        del self.main, self.branches

    def absorb(self, norm: nn.Module) -> None:
        """Fold the batch norm that follows into the merged convolution; merges first where that is not done yet."""
        self.reparameterize()
        fuse_norm(self.conv, norm)

    def _branch(self, taps: Kernel, dilation: int) -> nn.Sequential:
        conv = self._conv(taps, dilation, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, norm=_NORMS[self.ndim](self.out_channels)))

    def _conv(self, taps: Kernel, dilation: int, bias: bool) -> Any:
        if self.ndim == 2 and self.groups == self.channels == self.out_channels:
            return DepthwiseConv(self.channels, taps, stride=self.stride, dilation=dilation, bias=bias)  # type: ignore[arg-type]
        padding = tuple(dilation * (k // 2) for k in _sides(taps, self.ndim))
        return _CONVS[self.ndim](
            self.channels, self.out_channels, taps, self.stride, padding, dilation, self.groups, bias
        )  # fmt: skip


def _sides(kernel: Kernel, ndim: int) -> tuple[int, ...]:
    return (kernel,) * ndim if isinstance(kernel, int) else tuple(kernel)
