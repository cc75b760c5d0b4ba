"""Depthwise convolutions whose kernels reach from 5x5 to 31x31 and beyond, the fastest exact way.

On GPUs and for everything that is not float32 this is ``torch.nn.functional.conv2d`` and nothing else. On CPUs the
library's own routines for large depthwise kernels fall off a cliff in four places (oneDNN 3.11, AVX-512, maps of 56 to
7 pixels), and each has an exact way round:

* the gradient of the kernel runs at 1 to 3 GFLOP/s for every kernel above 3x3, thirty times slower than the forward
  pass. It is itself a depthwise convolution, of the input with the output's gradient as kernel, and as one it runs at
  the speed of the forward pass;
* the gradient of the input is slow for dilated kernels; it is the forward pass with the kernel turned by 180 degrees;
* taps that lie further from the centre than the map is long see zeros only, and are paid for like the others; they are
  left out, which on the last maps of small pictures leaves a tenth of the work;
* the forward pass leaves the vectorised kernel for widths above 13 in NCHW memory (4 instead of 100 GFLOP/s) and slows
  down threefold for widths of 11 and 13 in channels-last memory. The first go through channels-last memory, the others
  get zero columns until the width is 15.

What is left runs at 60 to 110 GFLOP/s on one core, two thirds of its peak of fused multiply-adds, so there is no more
than a factor of 1.5 to be had from any direct method. GEMMs on Toeplitz matrices or im2col patches move more memory
than they save. The FFT does fewer operations but runs at a tenth of the speed; it wins from 31x31 kernels on maps of
48 pixels, and ``"auto"`` takes it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from isthmus.layers.fft_conv import fft_conv

Backend = Literal["auto", "direct", "fft"]
Pair = tuple[int, int]

_FORWARD_LIMIT = 5  # padding below which the forward pass has no slow road
_NCHW_LIMIT = 6  # padding up to which oneDNN's vectorised kernel takes NCHW maps
_SMALL_MAP = 128  # cells below which to transpose a batch is cheaper than to go through it sample by sample
_FFT_KERNEL, _FFT_MAP = 31, 48


class DepthwiseConv(nn.Conv2d):
    """A depthwise ``nn.Conv2d`` with odd kernel and "same" padding; parameters and numbers are those of ``nn.Conv2d``.

    Args:
        channels: C.
        kernel: odd side, or ``(height, width)``.
        backend: ``"direct"`` is plain ``conv2d``, ``"fft"`` multiplies in the Fourier domain (float32 inside, stride 1
            and dilation 1 only), ``"auto"`` chooses by device and size as the module's docstring says.
        stride: output cells are every ``stride``-th.
        dilation: distance of the kernel's taps.
        bias: add one number a channel.

    Shapes: ``(B, C, H, W)`` → ``(B, C, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError: an even or non-positive kernel, or ``"fft"`` with a stride or dilation.
    """

    def __init__(
        self,
        channels: int,
        kernel: int | Pair,
        backend: Backend = "auto",
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        if min(kh, kw, stride, dilation) < 1 or kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(
                f"kernel {kernel} with stride {stride} and dilation {dilation}: a centred depthwise convolution needs "
                "an odd kernel, and a stride and dilation of at least 1."
            )
        if backend not in ("auto", "direct", "fft"):
            raise ValueError(f"backend {backend!r} is none of 'auto', 'direct', 'fft'.")
        if backend == "fft" and (stride, dilation) != (1, 1):
            raise ValueError(f"the FFT backend has stride 1 and dilation 1, not {stride} and {dilation}.")
        padding = (dilation * (kh // 2), dilation * (kw // 2))
        super().__init__(channels, channels, (kh, kw), stride, padding, dilation, groups=channels, bias=bias)
        self.backend: Backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W)`` → ``(B, C, ceil(H / stride), ceil(W / stride))``."""
        if self.backend == "fft":
            return _fft(input, self.weight, self.bias)
        pad: Any = self.padding
        if self.backend == "direct" or (max(pad) < _FORWARD_LIMIT and not torch.is_grad_enabled()):
            return super().forward(input)
        return depthwise_conv2d(input, self.weight, self.bias, self.stride[0], self.dilation[0])


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, dilation: int = 1
) -> Tensor:
    """Depthwise convolution with "same" padding, by the route that is fastest for the device and the sizes.

    Args:
        x: ``(B, C, H, W)``.
        weight: ``(C, 1, kh, kw)``, both sides odd.
        bias: ``(C,)`` or ``None``.
        stride: of the output.
        dilation: of the kernel.

    Returns:
        ``(B, C, ceil(H / stride), ceil(W / stride))``; equal to ``conv2d`` to rounding, also in its gradients.
    """
    pad = _padding(weight, dilation)
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if stride != 1 or not (learning or max(pad) >= _FORWARD_LIMIT) or not _is_slow_case(x, weight, dilation):
        return F.conv2d(x, weight, bias, stride, pad, dilation, groups=x.shape[1])
    weight = _reachable(weight, x.shape[-2:], dilation)
    if weight.shape[-2:] == (1, 1):
        y = x * weight.view(-1, 1, 1)
        return y if bias is None else y + bias.view(-1, 1, 1)
    if dilation == 1 and min(weight.shape[-2:]) >= _FFT_KERNEL and min(x.shape[-2:]) >= _FFT_MAP:
        return _fft(x, weight, bias)
    if learning:
        y = _Depthwise.apply(x, weight, dilation)
        return y if bias is None else y + bias.view(-1, 1, 1)
    return _same(x, weight, bias, dilation)


def is_plain_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer may take another road than the library's: float32 on a CPU, with nobody watching.

    Compilers, tracers, counters, tensor subclasses and interceptors of torch functions all get to see the library's.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
        and not torch._C._is_torch_function_mode_enabled()
    )


def _is_slow_case(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Whether ``conv2d`` would take one of oneDNN's slow roads."""
    large = weight.shape[-1] * weight.shape[-2] > 9 or dilation > 1
    return large and is_plain_cpu(x, weight) and torch.backends.mkldnn.is_available()


def _padding(weight: Tensor, dilation: int) -> Pair:
    return dilation * (weight.shape[-2] // 2), dilation * (weight.shape[-1] // 2)


def _reachable(weight: Tensor, size: Sequence[int], dilation: int) -> Tensor:
    """The taps that meet the map somewhere; those as far from the centre as the map is long see zeros only."""
    for axis, side in zip((-2, -1), size, strict=True):
        beyond = weight.shape[axis] // 2 - (side - 1) // dilation
        if beyond > 0:
            weight = weight.narrow(axis, beyond, weight.shape[axis] - 2 * beyond)
    return weight


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1


def _channels_last(x: Tensor) -> Tensor:
    """``x.contiguous(memory_format=torch.channels_last)``, written so that vmap takes it."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _fft(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by FFT. ``conv2d`` correlates, so the kernel is flipped; its centre is lag 0."""
    kernel = weight[:, 0].flip(-2, -1)
    y = fft_conv(x.contiguous(), kernel, causal=False)  # transforms over strided axes are slow
    return y if bias is None else y + bias.view(-1, 1, 1).to(y.dtype)


def _same(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Forward pass in the memory format that has a fast kernel for this size."""
    pad = _padding(weight, dilation)
    if max(pad) > _NCHW_LIMIT and not _is_channels_last(x):
        x = _channels_last(x)
    kh, kw = weight.shape[-2:]
    if dilation == 1 and kh * kw > 60 and kw in (11, 13) and _is_channels_last(x):
        weight, pad = F.pad(weight, ((15 - kw) // 2,) * 2), (pad[0], 7)
    return F.conv2d(x, weight, bias, 1, pad, dilation, groups=x.shape[1])


def _kernel_gradient(x: Tensor, g: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """dL/dW[c, i, j] = Σ_bhw g[b, c, h, w] · x[b, c, h + d·i - p, w + d·j - p]: x convolved with g as the kernel.

    In NCHW memory samples and channels become one axis and one call does it all; where oneDNN has no fast kernel for
    that, sample by sample in channels-last memory, which is cheaper than to transpose the batch.
    """
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[-2:]
    pad = _padding(weight, dilation)
    small = height * width <= _SMALL_MAP
    if (small or not _is_channels_last(x)) and max(pad) <= _NCHW_LIMIT and dilation <= 2:
        maps, kernels = x.reshape(1, -1, height, width), g.reshape(-1, 1, height, width)
        out = F.conv2d(maps, kernels, None, dilation, pad, groups=batch * channels)
        return out[..., :kh, :kw].reshape(batch, channels, 1, kh, kw).sum(0)
    x, g = _channels_last(x), _channels_last(g)
    total = x.new_zeros(1, channels, kh, kw)
    for sample, gradient in zip(x.split(1), g.unbind(), strict=True):
        out = F.conv2d(sample, gradient.unsqueeze(1), None, dilation, pad, groups=channels)
        total = total + out[..., :kh, :kw]
    return total.transpose(0, 1)


class _Depthwise(torch.autograd.Function):
    """Stride-1 "same" depthwise convolution whose gradients are depthwise convolutions too (differentiable again)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        return _same(x, weight, None, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        x, weight, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = depthwise_conv2d(g, weight.flip(-2, -1), None, 1, ctx.dilation) if ctx.needs_input_grad[0] else None
        dw = _kernel_gradient(x, g, weight, ctx.dilation) if ctx.needs_input_grad[1] else None
        return dx, dw, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, _: None) -> Tensor:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(_same(dx, weight, None, ctx.dilation))
        if dw is not None:
            terms.append(_same(x, dw, None, ctx.dilation))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]
