"""Log-mel spectrograms: Kaldi's filter bank to the digit, and a plain centred one."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_KALDI_FLOOR = torch.finfo(torch.float32).eps
_PLAIN_FLOOR = 1e-5


def log_mel(
    wave: Tensor,
    rate: int,
    bands: int,
    kaldi: bool = False,
    *,
    window: float = 0.025,
    hop: float = 0.010,
    low: float = 20.0,
    high: float | None = None,
) -> Tensor:
    """Logarithm of the energy in mel bands.

    With ``kaldi`` it is Kaldi's ``fbank`` with a Hann window, no dither and no energy column, as the audio checkpoints
    of AST and UniRepLKNet expect: frames wholly inside the signal, each without its mean and pre-emphasised by 0.97,
    a symmetric window, power spectrum, triangles on the mel axis, floor 1.2e-7. Without, frames are centred on
    multiples of the hop (the ends are mirrored), the window is periodic, magnitudes are summed by triangles on the
    frequency axis, and the result is log(x + 1e-5).

    Args:
        wave: ``(B, L)`` samples, usually in [-1, 1].
        rate: samples a second.
        bands: number of mel bands.
        kaldi: which of the two.
        window: length of a frame in seconds.
        hop: distance of frames in seconds.
        low: lower end of the lowest band in Hz.
        high: upper end of the highest band in Hz; half the rate by default.

    Returns:
        ``(B, T, bands)``; T = 1 + (L - window) // hop frames with ``kaldi``, L // hop without.

    Raises:
        ValueError: ``wave`` is not ``(B, L)``, shorter than a frame, or the band limits are out of order.
    """
    size, step = int(rate * window), int(rate * hop)
    high = rate / 2 if high is None else high
    if wave.ndim != 2 or wave.shape[1] < size or min(size, step, bands) < 1:
        raise ValueError(
            f"a wave {tuple(wave.shape)} is not (batch, samples) with at least one frame of {size} samples."
        )
    if not 0 <= low < high <= rate / 2:
        raise ValueError(f"bands from {low} to {high} Hz: 0 ≤ low < high ≤ {rate / 2} Hz (half the rate) is needed.")
    length = 2 ** math.ceil(math.log2(size))
    filters = mel_filters(bands, length, rate, low, high, kaldi).to(wave)
    if kaldi:
        frames = wave.unfold(1, size, step)
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], -1)
        frames = frames * torch.hann_window(size, periodic=False, dtype=wave.dtype, device=wave.device)
        power = torch.fft.rfft(frames, length).abs().square()
        return (power @ filters.T).clamp_min(_KALDI_FLOOR).log()
    padded = F.pad(wave.unsqueeze(1), (size // 2, size // 2), "reflect").squeeze(1)
    frames = padded.unfold(1, size, step)[:, : wave.shape[1] // step]
    frames = frames * torch.hann_window(size, dtype=wave.dtype, device=wave.device)
    return (torch.fft.rfft(frames, length).abs() @ filters.T + _PLAIN_FLOOR).log()


@functools.lru_cache(maxsize=16)
def mel_filters(bands: int, length: int, rate: int, low: float, high: float, kaldi: bool = False) -> Tensor:
    """Triangular filters ``(bands, length // 2 + 1)`` over the bins of an FFT of ``length``; mel = 1127 ln(1 + f/700).

    With ``kaldi`` the triangles are straight on the mel axis and the bin at half the rate is unused, otherwise they
    are straight on the frequency axis.
    """
    bottom, top = (1127.0 * math.log1p(f / 700.0) for f in (low, high))
    corners = torch.linspace(bottom, top, bands + 2, dtype=torch.float64)
    bins = torch.arange(length // 2 + 1, dtype=torch.float64) * (rate / length)
    place = 1127.0 * torch.log1p(bins / 700.0)
    if not kaldi:
        corners, place = 700.0 * torch.expm1(corners / 1127.0), bins
    left, centre, right = (c.unsqueeze(1) for c in (corners[:-2], corners[1:-1], corners[2:]))
    filters = torch.minimum((place - left) / (centre - left), (right - place) / (right - centre)).clamp_min(0)
    if kaldi:
        filters[:, -1] = 0
    return filters
