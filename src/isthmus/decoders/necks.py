"""Necks: a pyramid of an encoder in, a pyramid of one width out, for decoders that take ``neck=``.

``FPN`` is the plain feature pyramid network (Lin et al., arXiv 1612.03144), torchvision's, as the baseline;
``HorFPN`` has recursive gated convolutions in the place of its 3x3 ones (HorNet, arXiv 2207.14284).

    encoder = Backbone("hornet_tiny_7x7")
    neck = HorFPN(encoder.feature_info, width=256, levels=5)
    maps = neck(encoder(images))            # five maps of 256 channels
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from isthmus.bounds import Count, checked
from isthmus.codec import FeatureInfo, feature_levels, part
from isthmus.layers.gnconv import GnConv, Pair

Info = Sequence[FeatureInfo] | Sequence[Sequence[int]]


@part
@checked
class FPN(nn.Module):
    """1x1 convolutions to one width, from coarse to fine the sum with the nearest coarser cells, then 3x3 ones.

    Args:
        feature_info: of the encoder, finest level first.
        width: channels of every level that comes out.
        levels: how many come out; those beyond the encoder's take every second cell of the one before. As many as the
            encoder has where it is left out.

    Shapes: ``[(B, C_l, H_l, W_l)]`` → ``[(B, width, H_l, W_l)]`` and further levels of half the side, rounded up.
    Sides need not double from level to level.

    Raises:
        ValueError: no level, reductions that do not ascend, tokens in place of maps, fewer levels than the encoder
            has; and for features that are not those described.
    """

    def __init__(self, feature_info: Info, width: Count = 256, levels: Count | None = None) -> None:
        super().__init__()
        self.inputs = _checked(feature_info)
        count = len(self.inputs) if levels is None else levels
        if width < 1 or count < len(self.inputs):
            raise ValueError(
                f"width {width} and {count} levels: the width is at least 1, and of {len(self.inputs)} levels of the "
                "encoder none is left out; give the neck fewer to leave out some."
            )
        extra = _Pooled(count - len(self.inputs)) if count > len(self.inputs) else None
        self.pyramid = FeaturePyramidNetwork([level.channels for level in self.inputs], width, extra)
        last = self.inputs[-1].reduction
        reductions = [level.reduction for level in self.inputs]
        reductions += [last * 2 ** (i + 1) for i in range(count - len(self.inputs))]
        self.feature_info = [FeatureInfo(width, reduction) for reduction in reductions]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the encoder, finest first → ``levels`` maps of ``width`` channels."""
        given = [tuple(level.shape) for level in features]
        wanted = [level.channels for level in self.inputs]
        if len(given) != len(wanted) or any(len(s) != 4 or s[1] != c for s, c in zip(given, wanted, strict=True)):
            raise ValueError(f"the features are {given}; this neck takes maps (B, C, H, W) of {wanted} channels.")
        named = OrderedDict((str(i), level) for i, level in enumerate(features))
        return list(self.pyramid(named).values())


@part
@checked
class HorFPN(FPN):
    """The pyramid network with a g^n Conv in the place of every 3x3 convolution.

    Args:
        feature_info: of the encoder, finest level first.
        width: channels of every level that comes out.
        levels: how many come out, as for :class:`FPN`.
        order: of the products.
        kernel: odd side of the depthwise convolutions.
        scale: of the convolved features: 1, unlike the backbone's 1/3.
        filter: stored size of a global filter in place of the depthwise convolutions, for every level; ``(32, 17)`` is
            published.
        ratio: width inside the g^n Conv over ``width``.
        project_out: whether the g^n Conv ends in a 1x1 convolution, as in every published setting.

    Raises:
        ValueError: as for :class:`FPN` and for :class:`~isthmus.layers.gnconv.GnConv`.
    """

    def __init__(
        self,
        feature_info: Info,
        width: Count = 256,
        levels: Count | None = None,
        order: Count = 2,
        kernel: Count = 7,
        scale: float = 1.0,
        filter: Pair | None = None,
        ratio: Count = 1,
        project_out: bool = True,
    ) -> None:
        super().__init__(feature_info, width, levels)
        filter = None if filter is None else (filter[0], filter[1])
        blocks = (
            GnConv(width, width, order, kernel, scale, filter, width=width * ratio, project_out=project_out)
            for _ in self.inputs
        )
        self.pyramid.layer_blocks = nn.ModuleList(blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of HorNet's published neck (and of mmdetection's FPN) in ours; a level ``neck.`` is taken off.

    In a whole detector only the neck's tensors are taken.
    """
    if any(name.startswith("neck.") for name in state):
        state = {name.removeprefix("neck."): v for name, v in state.items() if name.startswith("neck.")}
    converted = {}
    for name, tensor in state.items():
        name = re.sub(r"^lateral_convs\.(\d+)\.conv\.", r"pyramid.inner_blocks.\1.0.", name)
        name = re.sub(r"^fpn_convs\.(\d+)\.conv\.", r"pyramid.layer_blocks.\1.0.", name)
        converted[re.sub(r"^fpn_convs\.", "pyramid.layer_blocks.", name)] = tensor
    return converted


class _Pooled(ExtraFPNBlock):
    """Further levels: every second cell of the last one, so many times."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for i in range(self.count):
            results.append(F.max_pool2d(results[-1], 1, 2))
            names.append(f"pool{i}")
        return results, names


def _checked(feature_info: Any) -> list[FeatureInfo]:
    levels = feature_levels(feature_info)
    if not levels:
        raise ValueError("the encoder has no levels.")
    if any(level.format != "NCHW" for level in levels):
        raise ValueError("a neck joins maps (NCHW); this encoder gives tokens.")
    if not all(a.reduction < b.reduction for a, b in pairwise(levels)):
        raise ValueError(f"reductions {[r.reduction for r in levels]} have to ascend, finest level first.")
    return levels
