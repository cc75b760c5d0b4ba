"""Depthwise convolution of any number of axes in the Fourier domain: O(N log N) whatever the kernel's length."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def fft_conv(u: Tensor, k: Tensor, causal: bool = True, k_back: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own kernel; the output has the input's size.

    Causal: ``y[t] = Σ_{s=0}^{L-1} k[s] u[t - s]`` along every axis, so nothing from ahead is seen. Centred: the same
    with tap ``s = L // 2`` as lag 0, on every axis. With ``k_back`` (causal only) the other direction is added, as
    bidirectional sequence layers do: ``y[t] += Σ_s k_back[s] u[t + 1 + s]``, every position from ahead once.

    The transform is computed in float32 (float64 stays float64) because half-precision FFTs are inaccurate and exist
    for few sizes; the result has ``u``'s dtype.

    Args:
        u: ``(B, C, *S)``, one to three axes.
        k: ``(C, *K)`` or ``(1, *K)``; taps that no output can reach are left out.
        causal: whether tap 0 is lag 0 (else the middle tap is).
        k_back: ``(C, L)``, or ``None``.

    Returns:
        ``(B, C, *S)``.

    Raises:
        ValueError: the axes or channels of kernel and input differ, or ``k_back`` comes without ``causal``.
    """
    axes = u.ndim - 2
    for name, kernel in (("k", k), ("k_back", k_back)):
        if kernel is not None and (kernel.ndim - 1 != axes or kernel.shape[0] not in (1, u.shape[1])):
            raise ValueError(
                f"{name} is {tuple(kernel.shape)} for an input of {tuple(u.shape)}; it must be (channels, ...) with "
                f"{axes} further axes."
            )
    if k_back is not None and (not causal or axes != 1):
        raise ValueError("k_back is the other direction of a causal kernel on one axis; use it with causal=True.")
    sizes = u.shape[2:]
    wide = torch.promote_types(u.dtype, torch.float32)
    ahead = []  # taps ahead of lag 0, on every axis
    lengths = []
    for axis, size in enumerate(sizes):
        centre = 0 if causal else k.shape[axis + 1] // 2
        first = max(centre - size + 1, 0)
        k = k.narrow(axis + 1, first, min(centre + size, k.shape[axis + 1]) - first)
        centre -= first
        ahead.append(centre)
        # What wraps around may fall on the margins that are cut off, but not on the output.
        lengths.append(size + max(centre, k.shape[axis + 1] - 1 - centre))
    reach = k_back[:, : sizes[0] - 1] if k_back is not None else None
    if reach is not None:
        lengths[0] = max(lengths[0], sizes[0] + reach.shape[1])
    lengths = [fast_length(length) for length in lengths]
    dims = tuple(range(-axes, 0))
    with torch.autocast(u.device.type, enabled=False):
        spectrum = torch.fft.rfftn(k.to(wide), s=lengths, dim=dims)
        if reach is not None:
            turned = torch.nn.functional.pad(reach.to(wide).flip(-1), (lengths[0] - reach.shape[1], 0))
            spectrum = spectrum + torch.fft.rfftn(turned, s=lengths, dim=dims)
        y = torch.fft.irfftn(torch.fft.rfftn(u.to(wide), s=lengths, dim=dims) * spectrum, s=lengths, dim=dims)
    for dim, (size, start) in enumerate(zip(sizes, ahead, strict=True), start=2):
        y = y.narrow(dim, start, size)
    return y.to(u.dtype)


@functools.cache
def fast_length(length: int) -> int:
    """The smallest length of at least ``length`` whose only prime factors are 2, 3 and 5, where FFTs are fast."""
    size = max(length, 1)
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
