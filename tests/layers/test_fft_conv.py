"""The FFT convolution equals sums written out, in one and two dimensions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from isthmus.layers.fft_conv import fast_length, fft_conv


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("length", "taps"), [(10, 4), (7, 7), (9, 30), (1, 5)])
def test_causal_convolution_sees_nothing_from_ahead(length: int, taps: int) -> None:
    u, k = _random(2, 3, length), _random(3, taps)
    y = fft_conv(u, k)
    direct = F.conv1d(F.pad(u, (taps - 1, 0)), k.flip(-1).unsqueeze(1), groups=3)
    torch.testing.assert_close(y, direct, atol=1e-5, rtol=1e-5)
    changed = u.clone()
    changed[..., -1] += 100
    torch.testing.assert_close(fft_conv(changed, k)[..., :-1], y[..., :-1], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("taps", [3, 9, 25])
def test_backward_kernel_reaches_every_later_position_once(taps: int) -> None:
    u, k, back = _random(2, 3, 9), torch.zeros(3, 1), _random(3, taps)
    later = F.pad(u[..., 1:], (0, taps))
    direct = F.conv1d(later, back.unsqueeze(1), groups=3)[..., :9]
    torch.testing.assert_close(fft_conv(u, k, k_back=back), direct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "kernel"), [((8, 11), (5, 7)), ((4, 4), (13, 13)), ((1, 6), (3, 3))])
def test_centred_convolution_is_conv2d_with_the_kernel_turned(size: tuple[int, int], kernel: tuple[int, int]) -> None:
    u, k = _random(2, 3, *size), _random(3, *kernel)
    direct = F.conv2d(u, k.flip(-2, -1).unsqueeze(1), padding=(kernel[0] // 2, kernel[1] // 2), groups=3)
    torch.testing.assert_close(fft_conv(u, k, causal=False), direct, atol=1e-5, rtol=1e-5)


def test_dtype_is_kept_and_float32_is_used_inside() -> None:
    u, k = _random(1, 2, 33), _random(2, 33)
    for dtype, bound in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)):
        y = fft_conv(u.to(dtype), k.to(dtype))
        assert y.dtype == dtype
        assert float((y.float() - fft_conv(u, k)).abs().max()) < bound


def test_gradients_are_those_of_the_sum() -> None:
    u, k = _random(1, 2, 5).double().requires_grad_(), _random(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda u, k: fft_conv(u, k, causal=False), (u, k))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"k is \(4, 3\) for an input of \(2, 3, 8\)"):
        fft_conv(_random(2, 3, 8), _random(4, 3))
    with pytest.raises(ValueError, match="k_back"):
        fft_conv(_random(2, 3, 8), _random(3, 3), causal=False, k_back=_random(3, 3))


def test_fast_lengths_have_small_factors_only() -> None:
    assert [fast_length(n) for n in (1, 7, 11, 97, 240, 241)] == [1, 8, 12, 100, 240, 243]
