"""Recursive gated convolution (HorNet, arXiv 2207.14284, section 3.1): products of features and convolved features.

Self-attention multiplies features by features; this does it n times in a row with convolutions alone. The first
product has C / 2^(n-1) channels and every further one twice as many, so that the whole costs about as much as one
depthwise convolution between two 1x1 convolutions. Put it where a 3x3 convolution or an attention layer stood:

    from isthmus.layers.gnconv import GnConv
    mix = GnConv(64, 128, order=3)          # (B, 64, H, W) -> (B, 128, H, W), any H and W
    mix = GnConv(64, order=3, filter=(14, 8))   # global filter, learnt for maps of 14 x 14

Products of n factors grow with the n-th power of their size: normalise in front, and keep ``scale`` at 1/3 where
half precision is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.layers import trunc_normal_ as trunc_normal
from torch import Tensor, nn

from isthmus.layers.large_kernel import DepthwiseConv, depthwise_conv2d

Pair = tuple[int, int]


class GnConv(nn.Module):
    """g^n Conv, equations 3.2 to 3.5.

    With C the width and c_k = C / 2^(n-1-k) for k = 0 … n-1: [p, q_0 … q_{n-1}] = W_in x, p of c_0 channels and q_k of
    c_k; then p = p · s f(q)_0 and, for k = 1 … n-1, p = W_k p · s f(q)_k; the output is W_out p. f is one depthwise
    convolution, or one :class:`GlobalLocalFilter`, of all q together. Order 1 is a plain gated convolution.

    Args:
        in_channels: of the input.
        out_channels: of the output; those of the input where it is left out.
        order: n, the number of products.
        kernel: odd side of the depthwise convolution.
        scale: s; 1/3 in every published backbone, 1 in the published neck.
        filter: a global filter in place of the depthwise convolution: the size ``(h, h // 2 + 1)`` in which it is
            stored, for maps of ``h x h``.
        width: C; ``in_channels`` where it is left out.
        project_out: whether there is a W_out; without one the output has C channels.

    Shapes: ``(B, in_channels, H, W)`` → ``(B, out_channels, H, W)``.

    Raises:
        ValueError: an order below 1; a width that does not divide by 2^(order-1), or, with a filter, by 2^order; an
            even kernel; an output width that differs from C without ``project_out``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        order: int = 5,
        kernel: int | Pair = 7,
        scale: float = 1 / 3,
        filter: Pair | None = None,
        *,
        width: int | None = None,
        project_out: bool = True,
    ) -> None:
        super().__init__()
        out = in_channels if out_channels is None else out_channels
        width = in_channels if width is None else width
        self.in_channels, self.order, self.scale = in_channels, order, scale
        self.widths = split_widths(width, order, filtered=filter is not None)
        if not project_out and out != width:
            raise ValueError(f"without project_out the output has the {width} channels of the width, not {out}.")
        convolved = sum(self.widths)
        self.proj_in = nn.Conv2d(in_channels, 2 * width, 1)
        self.dwconv: DepthwiseConv | GlobalLocalFilter = (
            DepthwiseConv(convolved, kernel) if filter is None else GlobalLocalFilter(convolved, filter)
        )
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.widths, self.widths[1:], strict=False))
        self.proj_out: nn.Module = nn.Conv2d(width, out, 1) if project_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` → ``(B, out_channels, H, W)``."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"the input is {tuple(x.shape)}; this g^n Conv takes (B, {self.in_channels}, H, W).")
        p, q = torch.split(self.proj_in(x), [self.widths[0], sum(self.widths)], dim=1)
        conv = self.dwconv
        if isinstance(conv, GlobalLocalFilter):
            q = conv(q, self.scale)
        else:  # s goes into kernel and bias, which are smaller than the map
            bias = conv.bias
            q = depthwise_conv2d(q, conv.weight * self.scale, None if bias is None else bias * self.scale)
        first, *rest = torch.split(q, self.widths, dim=1)
        p = p * first
        for pointwise, factor in zip(self.pws, rest, strict=True):
            p = pointwise(p) * factor
        return self.proj_out(p)


class GlobalLocalFilter(nn.Module):
    """Half of the channels through a 3x3 depthwise convolution, half through a learnt filter of the whole map.

    The filter multiplies the spectrum, x' = F⁻¹(K ⊙ F(x)), which is a circular convolution as large as the map (Rao et
    al., arXiv 2107.00645). K is kept for one size and resized for others, real and imaginary parts bilinearly with
    aligned corners. Local channel c and global channel c come out side by side, as 2c and 2c + 1. Layer norms over
    channels stand in front and behind.

    The transforms are computed in float32 (float64 stays) whatever the input is, and the result has the input's dtype.
    ONNX has no such complex product; export a network with ordinary kernels.

    Args:
        channels: C, even.
        size: ``(h, w)`` of the stored K; ``w = h // 2 + 1`` for square maps.

    Shapes: ``(B, C, H, W)`` → the same, for any H and W.

    Raises:
        ValueError: an odd number of channels, or an empty size.
    """

    def __init__(self, channels: int, size: Pair) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"{channels} channels have no two halves; a global-local filter takes an even number.")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size {tuple(size)}: a filter is stored as (h, w) of at least 1, such as (14, 8).")
        self.pre_norm = LayerNorm2d(channels, eps=1e-6)
        self.dw = DepthwiseConv(channels // 2, 3, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(channels // 2, *size, 2))  # real and imaginary part
        self.post_norm = LayerNorm2d(channels, eps=1e-6)
        trunc_normal(self.complex_weight, std=0.02)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """``(B, C, H, W)`` → the same; the output is multiplied by ``scale``, for nothing, inside the last norm."""
        if torch.onnx.is_in_onnx_export():
            raise ValueError("a global filter has no ONNX form; export a HorNet with ordinary kernels (…_7x7).")
        local, whole = torch.chunk(self.pre_norm(x), 2, dim=1)
        mixed = torch.stack((self.dw(local).to(x.dtype), self.filtered(whole).to(x.dtype)), dim=2).flatten(1, 2)
        norm = self.post_norm
        mixed = F.layer_norm(
            mixed.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight * scale, norm.bias * scale, norm.eps
        )
        return mixed.permute(0, 3, 1, 2).to(x.dtype)

    def filtered(self, x: Tensor) -> Tensor:
        """The global filter alone: ``(B, C / 2, H, W)`` → the same, float32 or float64."""
        size = x.shape[-2:]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if not torch.compiler.is_compiling() and not len(x):  # CPUs' transforms refuse empty batches
            return wide
        spectrum = torch.fft.rfft2(wide, norm="ortho")
        return torch.fft.irfft2(spectrum * self.resized(size).to(spectrum.dtype), s=size, norm="ortho")

    def resized(self, size: tuple[int, ...]) -> Tensor:
        """K for maps of ``size`` H x W: complex ``(C / 2, H, W // 2 + 1)``."""
        weight = self.complex_weight.to(torch.promote_types(self.complex_weight.dtype, torch.float32))
        if weight.shape[1:3] != (size[0], size[1] // 2 + 1):
            weight = F.interpolate(
                weight.permute(3, 0, 1, 2), (size[0], size[1] // 2 + 1), mode="bilinear", align_corners=True
            ).permute(1, 2, 3, 0)
        return torch.view_as_complex(weight.contiguous())


def split_widths(width: int, order: int, filtered: bool = False) -> list[int]:
    """c_0 … c_{n-1}, ascending: ``width`` halved ``order - 1`` times.

    Raises:
        ValueError: an order below 1, or a width that cannot be halved so often; with a filter c_0 must be even too,
            because all of the channels together are cut into two halves.
    """
    if order < 1:
        raise ValueError(f"order {order}: it is the number of products, at least 1.")
    unit = 2 ** (order - 1 + filtered)
    if width < 1 or width % unit:
        below, above = width // unit * unit, -(-width // unit) * unit
        legal = [str(w) for w in dict.fromkeys((below, above, above + unit)) if w > 0]
        told = " with a global filter" if filtered else ""
        raise ValueError(
            f"width {width} does not divide by {unit}, as order {order}{told} needs; near are {', '.join(legal)}."
        )
    return [width >> k for k in reversed(range(order))]
