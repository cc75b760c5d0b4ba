"""SparK's decoder: the holes of every scale are filled, then a small U-Net grows the picture (arXiv 2301.03580, 3.2).

:class:`Densify` fills the hidden places of a pyramid with learned tokens, :class:`SparKUNet` doubles the coarsest map
until it has the resolution of the image. Both take any pyramid whose reductions are powers of two.

Two things are computed in another order than they are written, with the same result (``fused=False`` computes them as
written). Multiply-accumulates are per 224-px image at 60 % hidden, width 768, ResNet-50 pyramid.

* *Densify*: a projection is linear, so it is applied to the visible rows alone, tap by tap, and added to the projected
  token pattern. 2.16 G become 0.88 G, the visible share. Scales of few channels are convolved whole, which is quicker.
* *Decoder*: between the transposed convolution (4 taps an output pixel) and the first 3x3 convolution (9 taps) stands
  nothing but a bias, so the two are one transposed convolution of side 6: 9 taps instead of 13. The seam at the border
  of the map, where the 3x3 convolution sees zeros and not the continuation, is put right on the outermost pixels. A
  block has 17.5 C² multiply-accumulates an output pixel as written and 13.5 C² composed; five blocks 10.12 G and
  7.81 G. Composing the kernels costs 144 C³ a step, whatever the batch, so a block is composed only where that pays
  (:func:`composition_pays`): 8.95 G at batch 8, 8.57 G at 64, 8.27 G at 512.

The batch norms of the decoder take their statistics over hidden and visible pixels alike, so every block has to compute
all pixels; only the last norm and projection could leave out visible ones, less than 0.1 % of the arithmetic. With a
tiled encoder a step of ResNet-50 falls from 16.36 G to 11.50 G at batch 8 (1.42 times), and at very large batches
to 10.36 G, so 1.58 is the limit; ConvNeXt-S from 19.58 G to 12.97 G (1.51) and 11.82 G (1.66). Beyond that there are
``width`` (cost about its square; 384 makes ResNet-50 4.33 G, 3.8 times) and ``output_stride`` (a block is a fifth of
the decoder; width 384 and stride 4 make it 3.54 G, 4.6 times, ConvNeXt-S 5.22 G, 3.8 times).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isthmus.bounds import Count, checked
from isthmus.codec import Condition, FeatureInfo, feature_levels, part

#: Channels from which nine small matrix products over visible rows beat one convolution of the filled map (on a CPU).
ROWS_PAY = 192

Info = Sequence[Any]  # of FeatureInfo, or of lists as a model file has them


@part
@checked
class Densify(nn.Module):
    """Fill the hidden places of every scale with a learned token, then project to the decoder's widths. A neck.

    Visible features are normalised over visible places only (batch norm with statistics of those, or layer norm),
    hidden ones become the token of the scale, and a projection that sees both (1x1 for the coarsest scale, identity
    where the width fits already, 3x3 for the others) mixes them.

    Args:
        feature_info: the encoder's, finest first.
        width: channels of the coarsest result; a scale that is 2^k times finer has ``width / 2^k``.
        norm: ``"batch"`` (published for ResNets), ``"layer"`` (for ConvNeXts) or ``"none"``.
        fused: project visible rows only (see the top of this file); False convolves the filled map.

    Raises:
        ValueError: a reduction that is no power of two, or occurs twice; a width that cannot be halved often enough.
    """

    conditions = frozenset({"visible"})

    def __init__(self, feature_info: Info, width: Count = 768, norm: str = "batch", fused: bool = True) -> None:
        super().__init__()
        levels = _check_pyramid(feature_info)
        norms = {"batch": nn.BatchNorm2d, "layer": partial(nn.LayerNorm, eps=1e-6), "none": nn.Identity}
        if norm not in norms:
            raise ValueError(f'norm is {norm!r}; it is "batch", "layer" or "none".')
        coarsest = levels[-1].reduction
        halvings = [int(math.log2(coarsest // level.reduction)) for level in levels]
        _check_width(width, max(halvings))
        self.fused = fused
        self.input_info = levels
        self.feature_info = [FeatureInfo(width >> k, r.reduction) for k, r in zip(halvings, levels, strict=True)]
        self.norms = nn.ModuleList(norms[norm](level.channels) for level in levels)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, level.channels, 1, 1)) for level in levels)
        self.projections = nn.ModuleList()
        for level, out in zip(levels, self.feature_info, strict=True):
            if level.reduction < coarsest:
                self.projections.append(nn.Conv2d(level.channels, out.channels, 3, padding=1))
            elif level.channels == out.channels:
                self.projections.append(nn.Identity())
            else:
                self.projections.append(nn.Conv2d(level.channels, out.channels, 1))
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)

    def forward(self, features: list[Tensor], condition: Condition | None = None) -> list[Tensor]:
        """Maps ``(B, C_l, H / r_l, W / r_l)`` to maps of the decoder's widths, the same sides.

        Args:
            features: the encoder's maps, finest first; what stands at hidden places is not read.
            condition: ``visible``, boolean ``(B, h, w)``, True is visible; its cells are as large as, or multiples
                of, the cells of the coarsest map. Everything is visible without it.

        Raises:
            ValueError: the number of maps, their channels or their sides do not fit.
        """
        visible = (condition or {}).get("visible")
        if len(features) != len(self.input_info):
            raise ValueError(f"{len(features)} maps were given; this neck was made for {len(self.input_info)}.")
        if visible is None:
            visible = torch.ones(features[-1].shape[0], *features[-1].shape[2:], dtype=torch.bool)
        cells = visible.to(features[0].device).nonzero()
        filled = []
        for index, (level, feature) in enumerate(zip(self.input_info, features, strict=True)):
            if feature.shape[1] != level.channels:
                raise ValueError(
                    f"the map of reduction {level.reduction} has {feature.shape[1]} channels; "
                    f"{level.channels} were expected."
                )
            filled.append(self._fill(index, feature, visible, cells))
        return filled

    def _fill(self, index: int, feature: Tensor, visible: Tensor, cells: Tensor) -> Tensor:
        channels, height, width = feature.shape[1:]
        patch = height // visible.shape[1]
        if (visible.shape[1] * patch, visible.shape[2] * patch) != (height, width):
            raise ValueError(
                f"a mask of {visible.shape[1]}x{visible.shape[2]} cells does not divide a map of {height}x{width}."
            )
        places = _pixels_of(cells, patch, height, width)
        rows = feature.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, places)
        norm = self.norms[index]
        if isinstance(norm, _BatchNorm):  # four axes, so that synchronised batch norm can stand here too
            rows = norm(rows[:, :, None, None])[:, :, 0, 0]
        else:
            rows = norm(rows)
        token, projection = self.mask_tokens[index].flatten(), self.projections[index]
        if self.fused and isinstance(projection, nn.Conv2d):
            if projection.kernel_size == (1, 1):
                weight, bias = projection.weight.flatten(1), projection.bias
                return _scatter(F.linear(rows, weight, bias), F.linear(token, weight, bias), places, feature)
            if channels >= ROWS_PAY and len(cells) <= 0.6 * visible.numel():
                hidden = ~visible.to(feature.device).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
                return _project_rows(rows, token, places, hidden, projection)
        return projection(_scatter(rows, token, places, feature))


@part
@checked
class SparKUNet(nn.Module):
    """LightDecoder of SparK for any pyramid of powers of two: image-sized prediction from coarse to fine.

    Every block doubles the side and halves the width: transposed convolution (side 4), 3x3 convolution, batch norm,
    ReLU6, 3x3 convolution to half the width, batch norm. The densified map of a scale is added before the block that
    starts there.

    Args:
        feature_info: the encoder's, finest first.
        width: channels at the coarsest scale; 768 is published.
        norm: that of :class:`Densify`.
        output_stride: 1 is published. With ``s`` the blocks stop at that reduction and the last projection predicts
            ``s x s`` pixels for each cell.
        channels: of the image.
        fused: compute the same with fewer multiply-accumulates (see the top of this file).

    Raises:
        ValueError: reductions that are no powers of two, a width that cannot be halved often enough, an output stride
            that is no power of two or coarser than a scale of the pyramid.
    """

    conditions = frozenset({"visible"})

    def __init__(
        self,
        feature_info: Info,
        width: Count = 768,
        norm: str = "batch",
        output_stride: Count = 1,
        channels: Count = 3,
        fused: bool = True,
    ) -> None:
        super().__init__()
        levels = _check_pyramid(feature_info)
        finest, coarsest = levels[0].reduction, levels[-1].reduction
        if output_stride < 1 or output_stride & (output_stride - 1):
            raise ValueError(f"output_stride is {output_stride}; it has to be a power of two.")
        if output_stride > finest:
            raise ValueError(
                f"output_stride {output_stride} would leave the scale of reduction {finest} unread; take at most "
                f"{finest}, or an encoder without that scale."
            )
        depth = int(math.log2(coarsest // output_stride))
        _check_width(width, depth)
        self.output_stride = output_stride
        self.densify = Densify(feature_info, width, norm, fused)
        self.blocks = nn.ModuleList(UpBlock(width >> k, fused) for k in range(depth))
        self.channels = channels
        self.proj = nn.Conv2d(width >> depth, channels * output_stride**2, 1)
        for module in [*self.blocks.modules(), self.proj]:
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def reduction(self) -> int:
        """Image pixels per cell of the coarsest scale."""
        return self.densify.input_info[-1].reduction

    def forward(self, features: list[Tensor], condition: Condition | None = None) -> Tensor:
        """Maps, finest first, and ``visible`` (see :class:`Densify`) to a prediction ``(B, channels, H, W)``."""
        return self.grow(self.densify(features, condition))

    def grow(self, filled: list[Tensor]) -> Tensor:
        """Densified maps, finest first, to the prediction."""
        scales = {info.reduction: x for info, x in zip(self.densify.feature_info, filled, strict=True)}
        reduction = self.reduction
        x = scales[reduction]
        for block in self.blocks:
            x = block(x)
            reduction //= 2
            if reduction in scales:
                x = x + scales[reduction]
        x = self.proj(x)
        return F.pixel_shuffle(x, self.output_stride) if self.output_stride > 1 else x


class UpBlock(nn.Module):
    """``(B, C, H, W)`` to ``(B, C/2, 2H, 2W)``; see :class:`SparKUNet`."""

    def __init__(self, channels: int, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.up_sample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
            nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Twice the side, half the width."""
        if not self.fused:
            return self.conv(self.up_sample(x))
        if x.is_cuda or x.shape[2] * x.shape[3] > 100:
            x = x.contiguous(memory_format=torch.channels_last)
        first = cast(nn.Conv2d, self.conv[0])
        if composition_pays(x):
            return self.conv[1:](up_and_convolve(x, self.up_sample.weight, self.up_sample.bias, first.weight))
        return self.conv(self.up_sample(x))


def composition_pays(x: Tensor) -> bool:
    """Whether one composed convolution of ``x`` ``(B, C, H, W)`` is cheaper than two.

    It saves 4 C² an output pixel, 16 C² B H W in all, and costs 5 C² for each of the 4 (H + W) B values of the seam and
    144 C³ for the kernel; the last counts twice, because the kernel's small convolutions run at half the speed. At 224
    px and width 768, batch 8 composes three blocks of five, batch 64 four, batch 512 all.
    """
    batch, channels, height, width = x.shape
    return batch * (16 * height * width - 20 * (height + width)) > 2 * 144 * channels


def up_and_convolve(x: Tensor, up: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """``conv2d(conv_transpose2d(x, up, bias, stride=2, padding=1), weight, padding=1)`` as one convolution.

    Let D be the transposed convolution without its cut, one pixel larger on every side. The composed kernel convolves
    all of D, whereas the 3x3 convolution sees zeros where D was cut; what the cut ring would have contributed is
    computed separately, along four lines, and taken away.

    Args:
        x: ``(B, C, H, W)``.
        up: ``(C, E, 4, 4)``, weight of the transposed convolution.
        bias: ``(E,)`` or None, its bias.
        weight: ``(F, E, 3, 3)``, weight of the convolution.

    Returns:
        ``(B, F, 2H, 2W)``.
    """
    with torch.autocast(x.device.type, enabled=False):  # kernels are composed in full precision, whatever x has
        # K[t] = sum_a weight[a] up[t + a - 2]: the taps of a transposed convolution of side 6, stride 2, padding 2.
        kernel = F.conv_transpose2d(up, weight.flip(2, 3).transpose(0, 1))  # (C, F, 6, 6)
        # Output pixel 2q + r reads input q + d with tap r - 2d + 2, d = -1, 0, 1: four phases of a 3x3 convolution.
        phases = kernel.unflatten(3, (3, 2)).unflatten(2, (3, 2)).flip(2, 4)  # (C, F, d, r, d, r)
        phases = phases.permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
        constant = None if bias is None else (weight.sum((2, 3)) @ bias).repeat_interleave(4)
    whole = F.pixel_shuffle(F.conv2d(x, phases, constant, padding=1), 2)

    lines = []
    for axis, end in ((2, 0), (2, -1), (3, 0), (3, -1)):
        # the ring line of D beyond this border: one input line through the outermost taps
        ring = F.conv_transpose1d(
            x.select(axis, end), up.select(axis, end), bias, stride=2, padding=0 if axis == 2 else 1
        )
        # rows carry the four corners of the ring, columns go without
        lines.append(F.conv1d(ring, weight.select(axis, end), padding=0 if axis == 2 else 1))
    return cast(Tensor, _SubtractBorder.apply(whole, *lines))


class _SubtractBorder(torch.autograd.Function):
    """Subtract lines from the top, bottom, left and right of a map, in place, without copies in either direction."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        whole[:, :, 0] -= top
        whole[:, :, -1] -= bottom
        whole[:, :, :, 0] -= left
        whole[:, :, :, -1] -= right
        ctx.mark_dirty(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        g = gradients[0]
        return g, -g[:, :, 0], -g[:, :, -1], -g[:, :, :, 0], -g[:, :, :, -1]


def _pixels_of(cells: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Flat positions in a ``(B, H, W)`` map of all pixels of the cells ``(K, 3)`` (sample, row, column)."""
    sample, row, column = cells.unbind(1)
    inside = torch.arange(patch, device=cells.device)
    y = (row * patch)[:, None] + inside
    x = (column * patch)[:, None] + inside
    return ((sample * height)[:, None, None] + y[:, :, None]).mul(width).add(x[:, None, :]).flatten()


def _scatter(rows: Tensor, token: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """A map ``(B, C, H, W)``, channels last, with ``rows`` at ``places`` and ``token`` elsewhere."""
    batch, _, height, width = like.shape
    dense = token.to(rows.dtype).expand(batch * height * width, -1).index_copy(0, places, rows)
    return dense.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _project_rows(rows: Tensor, token: Tensor, places: Tensor, hidden: Tensor, conv: nn.Conv2d) -> Tensor:
    """3x3 convolution, padding 1, of the map with ``rows`` at ``places`` and ``token`` where ``hidden`` (B, H, W)."""
    batch, height, width = hidden.shape
    weights = conv.weight.permute(2, 3, 0, 1).flatten(0, 1)  # (9, out, in)
    # A canvas with one pixel of margin. The token's share first: which of the nine neighbours are hidden.
    neighbours = F.unfold(hidden[:, None].to(rows.dtype), 3, padding=2).transpose(1, 2)
    canvas = F.linear(neighbours, (weights @ token).t(), conv.bias).flatten(0, 1)
    sample, inside = places // (height * width), places % (height * width)
    corner = (sample * (height + 2) + inside // width) * (width + 2) + inside % width
    for tap, weight in enumerate(weights):  # a pixel is seen by this tap from two minus the tap's row and column on
        seen_from = (2 - tap // 3) * (width + 2) + 2 - tap % 3
        canvas.index_add_(0, corner + seen_from, F.linear(rows, weight))
    return canvas.view(batch, height + 2, width + 2, -1)[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


def _check_pyramid(feature_info: Info) -> list[FeatureInfo]:
    levels = feature_levels(feature_info)
    reductions = [level.reduction for level in levels]
    if not levels:
        raise ValueError("the encoder has no levels.")
    wrong = [r for r in reductions if r < 1 or r & (r - 1)]
    if wrong:
        raise ValueError(f"reduction {wrong[0]} is no power of two; SparK's decoder doubles the side at every step.")
    if reductions != sorted(set(reductions)):
        raise ValueError(f"reductions {reductions} have to ascend, finest level first, without repeats.")
    return levels


def _check_width(width: int, halvings: int) -> None:
    if width < 1 or width % 2**halvings:
        raise ValueError(f"width {width} has to be a multiple of {2**halvings}, because it is halved {halvings} times.")
