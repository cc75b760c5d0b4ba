"""g^n Conv and its global filter: what they compute, at which sizes and precisions, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.encoders.images.metanext import MetaNeXt
from isthmus.layers.gnconv import GlobalLocalFilter, GnConv


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@torch.no_grad()
def test_order_three_holds_the_product_of_four_features_at_four_places() -> None:
    """Capacity, by weights set by hand; they also say in which order the channels stand: p, then q ascending."""
    conv = GnConv(8, 1, order=3, kernel=5, scale=1.0)
    assert conv.widths == [2, 4, 8]
    for p in conv.parameters():
        p.zero_()
    for channel, row in enumerate((0, 2, 4, 8)):  # p of 2 channels; q of 2, 4 and 8
        conv.proj_in.weight[row, channel] = 1
    for row, (dy, dx) in zip((0, 2, 6), ((0, 2), (2, 0), (-2, 1)), strict=True):
        conv.dwconv.weight[row, 0, 2 + dy, 2 + dx] = 1  # type: ignore[index]
    for pointwise in (*conv.pws, conv.proj_out):
        pointwise.weight[0, 0] = 1  # type: ignore[index]
    x = noise(2, 8, 9, 9)
    a, b, c, d = x[:, 0], x[:, 1].roll(-2, 2), x[:, 2].roll(-2, 1), x[:, 3].roll((2, -1), (1, 2))
    inside = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(conv(x)[:, 0][inside], (a * b * c * d)[inside])


@pytest.mark.parametrize("order", [1, 2, 4])
def test_order_n_is_a_polynomial_of_degree_n_plus_one(order: int) -> None:
    """Along a ray the differences of order n + 2 vanish, those of order n + 1 do not."""
    conv = GnConv(16, 3, order=order, scale=0.5).double()
    x = noise(1, 16, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        values = torch.stack([conv(t * x) for t in range(order + 3)])
    difference = values.diff(n=order + 1, dim=0)
    assert difference[0].abs().max() > 1e-6
    assert difference.diff(dim=0).abs().max() < 1e-9 * values.abs().max()


@pytest.mark.parametrize("filter", [None, (6, 4)])
@torch.no_grad()
def test_scale_multiplies_the_convolved_features_with_their_bias(filter: Any) -> None:
    conv, x = GnConv(8, order=1, scale=1.0, filter=filter), noise(2, 8, 6, 6)
    whole = conv(x) - conv.proj_out.bias.view(-1, 1, 1)  # type: ignore[operator, union-attr]
    conv.scale = 0.25
    torch.testing.assert_close(conv(x) - conv.proj_out.bias.view(-1, 1, 1), 0.25 * whole)  # type: ignore[operator, union-attr]


def test_input_and_output_may_differ_and_the_projection_may_be_left_out() -> None:
    x = noise(2, 8, 1, 3)  # smaller than the kernel
    assert GnConv(8, 20, order=3)(x).shape == (2, 20, 1, 3)
    assert GnConv(8, 5, order=2, width=12)(x).shape == (2, 5, 1, 3)
    bare = GnConv(8, 16, order=2, width=16, project_out=False)
    assert bare(x).shape == (2, 16, 1, 3)
    assert sum(p.numel() for p in bare.parameters()) == 8 * 32 + 32 + 24 * 50 + 8 * 16 + 16


def test_a_pyramid_takes_it_as_its_mixer() -> None:
    model = MetaNeXt((1, 1), (8, 16), lambda dim, stage: GnConv(dim, order=stage + 2), mlp_ratios=2, num_classes=3)
    assert model.eval()(noise(2, 3, 40, 32)).shape == (2, 3)


# ------------------------------------------------------------------------------------------------------------- filter


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 4), (3, 1)])
@torch.no_grad()
def test_filter_is_a_circular_convolution_with_its_own_map(size: tuple[int, int]) -> None:
    """Of the size of the picture, odd sides included; with another norm than "ortho" it would be off by a factor."""
    part = GlobalLocalFilter(4, (size[0], size[1] // 2 + 1))
    x = noise(2, 2, *size)
    kernel = torch.fft.irfft2(torch.view_as_complex(part.complex_weight), s=size)
    wanted = sum(
        kernel[:, i, j].view(-1, 1, 1) * x.roll((i, j), (2, 3)) for i in range(size[0]) for j in range(size[1])
    )
    torch.testing.assert_close(part.filtered(x), wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_halves_come_out_side_by_side() -> None:
    """With a filter and a kernel that change nothing, even channels are the first half and odd ones the second."""
    part = GlobalLocalFilter(12, (5, 4))
    part.complex_weight.copy_(torch.tensor([1.0, 0.0]).expand_as(part.complex_weight))
    part.dw.weight.zero_()[:, :, 1, 1] = 1
    x = noise(2, 12, 5, 6)
    y, normed = part(x), part.pre_norm(x)
    torch.testing.assert_close(y[:, 0::2], normed[:, :6], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y[:, 1::2], normed[:, 6:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_filter_is_resized_in_real_and_imaginary_part_with_aligned_corners() -> None:
    """A filter that is linear over the grid is the same linear function over any other grid."""

    def plane(h: int, w: int) -> Tensor:
        y, x = torch.linspace(0, 1, h).view(-1, 1), torch.linspace(0, 1, w)
        return torch.stack((2 * y - x, y + 3 * x - 1), -1)

    part = GlobalLocalFilter(4, (5, 3))
    part.complex_weight.copy_(plane(5, 3).expand_as(part.complex_weight))
    for height, width in ((9, 12), (3, 2), (5, 9)):
        wanted = torch.view_as_complex(plane(height, width // 2 + 1))
        torch.testing.assert_close(part.resized((height, width)), wanted.expand(2, -1, -1))
    single = GlobalLocalFilter(4, (1, 1))
    assert torch.equal(single.resized((4, 6)), single.resized((1, 1)).expand(2, 4, 4))


def test_filter_keeps_the_dtype_and_computes_spectra_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    transform = torch.fft.rfft2
    monkeypatch.setattr(torch.fft, "rfft2", lambda x, **kwargs: seen.append(x.dtype) or transform(x, **kwargs))
    part, x = GlobalLocalFilter(8, (7, 4)), noise(2, 8, 11, 13)
    with torch.no_grad():
        wanted = part(x)
        for dtype in (torch.float16, torch.bfloat16):
            half = GlobalLocalFilter(8, (7, 4)).to(dtype)
            half.load_state_dict(part.state_dict())
            got = half(x.to(dtype))
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(part(x), wanted, atol=0.1, rtol=0.1)
            assert part(x.bfloat16()).dtype == torch.bfloat16
        assert set(seen) == {torch.float32}
        assert part.double()(x.double()).dtype == torch.float64
    assert seen[-1] == torch.float64


def test_filter_has_no_onnx_form_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ValueError, match="no ONNX form; export a HorNet with ordinary kernels"):
        GnConv(8, order=1, filter=(4, 3))(noise(1, 8, 4, 4))
    assert GnConv(8, order=1)(noise(1, 8, 4, 4)).shape == (1, 8, 4, 4)


# -------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GnConv(60, order=4), "width 60 does not divide by 8, as order 4 needs; near are 56, 64, 72"),
        (lambda: GnConv(3, order=3), "width 3 does not divide by 4, as order 3 needs; near are 4, 8"),
        (lambda: GnConv(8, order=0), "order 0: it is the number of products, at least 1"),
        (lambda: GnConv(8, order=-1), "order -1"),
        (lambda: GnConv(12, order=3, filter=(7, 4)), "does not divide by 8, as order 3 with a global filter needs"),
        (lambda: GnConv(8, order=1, kernel=6), "odd kernel"),
        (lambda: GnConv(8, 9, order=1, project_out=False), "the 8 channels of the width, not 9"),
        (lambda: GnConv(8, order=1)(noise(2, 6, 4, 4)), "the input is (2, 6, 4, 4); this g^n Conv takes (B, 8, H, W)"),
        (lambda: GlobalLocalFilter(7, (4, 3)), "7 channels have no two halves"),
        (lambda: GlobalLocalFilter(8, (0, 3)), "stored as (h, w) of at least 1"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_an_empty_batch_goes_through_a_filter() -> None:
    assert GnConv(8, order=2, filter=(4, 3))(torch.zeros(0, 8, 5, 6)).shape == (0, 8, 5, 6)
