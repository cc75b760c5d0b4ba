"""Probes: small classifiers that ask what frozen features know. Features in, logits out.

RotNet's three heads (arXiv 1803.07728, section 3) are :class:`PooledProbe`, :class:`NonLinearProbe` and
:class:`ConvProbe`, with :class:`AlexNetProbe` for ImageNet; :class:`LinearProbe` and :class:`AttentiveProbe`
(CAE, arXiv 2202.03026, section 4.1) read maps, tokens and vectors alike. All read one level of the pyramid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from isthmus.bounds import Count, NonNegative, checked
from isthmus.codec import part
from isthmus.codec.checkpoints import Checkpoint
from isthmus.codec.published import Published
from isthmus.layers.pool import as_tokens


@part
@checked
class LinearProbe(nn.Module):
    """One linear layer on the mean over cells or tokens, or on one token.

    Args:
        channels: width of the level that is read.
        classes: number of logits.
        token: read this token (0 is the class token of most transformers) and not the mean.
        norm: batch norm without parameters in front, so that the scale of the features does not matter.
        eps: of that norm.
        level: which entry of the pyramid.
    """

    def __init__(
        self,
        channels: Count,
        classes: Count,
        token: int | None = None,
        norm: bool = True,
        eps: NonNegative = 1e-5,
        level: int = -1,
    ) -> None:
        super().__init__()
        self.level, self.token = level, token
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=eps) if norm else nn.Identity()
        self.fc = nn.Linear(channels, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level ``(B, C, H, W)``, ``(B, N, C)`` or ``(B, C)`` to logits ``(B, classes)``."""
        tokens = as_tokens(features[self.level])
        return self.fc(self.norm(tokens.mean(1) if self.token is None else tokens[:, self.token]))


@part
@checked
class PooledProbe(nn.Module):
    """RotNet's linear classifier: pool to a grid, batch norm without parameters, one linear layer on all cells.

    Args:
        channels: width of the level that is read.
        classes: number of logits.
        grid: cells a side after adaptive pooling; 12, 7, 5, 6 and 6 for AlexNet's five convolutions.
        average: average and not max pooling.
        level: which entry of the pyramid.
    """

    def __init__(self, channels: Count, classes: Count, grid: Count, average: bool = False, level: int = -1) -> None:
        super().__init__()
        self.level = level
        self.pool = nn.AdaptiveAvgPool2d(grid) if average else nn.AdaptiveMaxPool2d(grid)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.fc = nn.Linear(channels * grid * grid, classes)
        _init(self)

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level ``(B, C, H, W)`` to logits ``(B, classes)``."""
        return self.fc(self.norm(self.pool(features[self.level])).flatten(1))


@part
@checked
class NonLinearProbe(nn.Module):
    """RotNet's non-linear classifier: two hidden linear layers with batch norm and ReLU on all values of the map.

    The published code has the two-dimensional batch norm on its vectors, which PyTorch no longer takes; the
    one-dimensional one computes what that did.

    Args:
        values: numbers a sample, ``C·H·W`` of the level that is read.
        classes: number of logits.
        hidden: width of the hidden layers; by default ``min(20·classes, 2048)``.
        level: which entry of the pyramid.
    """

    def __init__(self, values: Count, classes: Count, hidden: Count | None = None, level: int = -1) -> None:
        super().__init__()
        self.level = level
        hidden = min(20 * classes, 2048) if hidden is None else hidden
        self.mlp = nn.Sequential(*_linear_unit(values, hidden), *_linear_unit(hidden, hidden))
        self.fc = nn.Linear(hidden, classes)
        _init(self)

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level of ``values`` numbers a sample to logits ``(B, classes)``."""
        return self.fc(self.mlp(features[self.level].flatten(1)))


@part
@checked
class ConvProbe(nn.Module):
    """RotNet's convolutional classifier: one more Network-in-Network block, global average pooling, one linear layer.

    Args:
        channels: width of the level that is read.
        classes: number of logits.
        width: of the 3×3 and the two 1×1 convolutions.
        level: which entry of the pyramid.
    """

    def __init__(self, channels: Count, classes: Count, width: Count = 192, level: int = -1) -> None:
        super().__init__()
        self.level = level
        self.block = nn.Sequential(
            ConvNormAct(channels, width, 3), ConvNormAct(width, width, 1), ConvNormAct(width, width, 1)
        )
        self.fc = nn.Linear(width, classes)
        _init(self)

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level ``(B, C, H, W)`` to logits ``(B, classes)``."""
        return self.fc(self.block(features[self.level]).mean((2, 3)))


@part
@checked
class AlexNetProbe(nn.Module):
    """RotNet's ImageNet classifier on AlexNet's conv4 or conv5: what would have followed in the network itself.

    Args:
        channels: width of the level that is read.
        classes: number of logits.
        side: cells a side of that level.
        conv: a 3×3 convolution in front, for conv4.
        width: of the two hidden linear layers.
        level: which entry of the pyramid.
    """

    def __init__(
        self,
        channels: Count = 256,
        classes: Count = 1000,
        side: Count = 13,
        conv: bool = False,
        width: Count = 4096,
        level: int = -1,
    ) -> None:
        super().__init__()
        self.level = level
        self.conv = ConvNormAct(channels, channels, 3, bias=True) if conv else nn.Identity()
        self.pool = nn.MaxPool2d(3, stride=2)
        values = channels * ((side - 3) // 2 + 1) ** 2
        self.mlp = nn.Sequential(*_linear_unit(values, width), *_linear_unit(width, width))
        self.fc = nn.Linear(width, classes)
        _init(self)

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level ``(B, C, side, side)`` to logits ``(B, classes)``."""
        return self.fc(self.mlp(self.pool(self.conv(features[self.level])).flatten(1)))


@part
@checked
class AttentiveProbe(nn.Module):
    """One learned query that looks at all tokens by cross-attention, batch norm without parameters, one linear layer.

    There is no residual and no MLP; query, key and value have a layer norm each, and the key has no bias (it would
    cancel in the softmax).

    Args:
        channels: width of the level that is read.
        classes: number of logits.
        num_heads: attention heads; they divide ``channels``.
        eps: of the batch norm.
        level: which entry of the pyramid.

    Raises:
        ValueError: ``num_heads`` does not divide ``channels``.
    """

    def __init__(
        self, channels: Count, classes: Count, num_heads: Count = 8, eps: NonNegative = 1e-6, level: int = -1
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads must divide channels; {num_heads} does not divide {channels}.")
        self.level, self.num_heads = level, num_heads
        self.query = nn.Parameter(torch.empty(1, 1, channels))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(channels, eps=1e-6) for _ in range(3))
        self.q, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(3))
        self.k = nn.Linear(channels, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=eps)
        self.fc = nn.Linear(channels, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        for linear in (self.q, self.k, self.v, self.proj, self.fc):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """A level ``(B, C, H, W)`` or ``(B, N, C)`` to logits ``(B, classes)``."""
        tokens = as_tokens(features[self.level])
        query = self.q(self.norm_q(self.query)).expand(len(tokens), -1, -1)
        key, value = self.k(self.norm_k(tokens)), self.v(self.norm_v(tokens))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc(self.norm(self.proj(seen).squeeze(1)))


def rotnet_head(
    kind: str, level: Tensor, classes: int, grid: int = 4, average: bool = False, conv: bool = False
) -> nn.Module:
    """One of RotNet's heads for a level ``(B, C, H, W)``.

    Args:
        kind: linear, nonlinear, conv or alexnet.
        level: features of at least one image.
        classes: number of logits.
        grid, average: of the linear one, see :class:`PooledProbe`.
        conv: of AlexNet's, see :class:`AlexNetProbe`.
    """
    channels = level.shape[1]
    if kind == "conv":
        return ConvProbe(channels, classes)
    if kind == "nonlinear":
        return NonLinearProbe(level[0].numel(), classes)
    if kind == "alexnet":
        return AlexNetProbe(channels, classes, side=level.shape[-1], conv=conv)
    return PooledProbe(channels, classes, grid, average=average)


def _linear_unit(values: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Linear(values, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)


def _init(probe: nn.Module) -> None:
    """RotNet's: convolutions He with fan-out, linear layers normal with variance 2 / outputs, biases 0."""
    for module in probe.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(2 / module.out_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------- published checkpoints

_OFFICIAL = (  # the spelling is theirs
    (r"classifier\.Block3_ConvB(\d)\.layers\.Conv\.", lambda m: f"block.{int(m[1]) - 1}.conv."),
    (r"classifier\.Block3_ConvB(\d)\.layers\.BatchNorm\.", lambda m: f"block.{int(m[1]) - 1}.bn."),
    (r"classifier\.(?:Liniear_F|LiniearClassifier|LinearF)\.", lambda m: "fc."),
    (r"classifier\.BatchNorm\.", lambda m: "norm."),
    (r"classifier\.(?:Liniear_1|Linear1)\.", lambda m: "mlp.0."),
    (r"classifier\.(?:BatchNorm_1|BatchNorm1)\.", lambda m: "mlp.1."),
    (r"classifier\.(?:Liniear_2|Liniear2)\.", lambda m: "mlp.3."),
    (r"classifier\.(?:BatchNorm2d|BatchNorm2)\.", lambda m: "mlp.4."),
    (r"classifier\.ConvB5\.0\.", lambda m: "conv.conv."),
    (r"classifier\.ConvB5\.1\.", lambda m: "conv.bn."),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of one of RotNet's published heads under our names; missing batch counts become 0.

    Raises:
        ValueError: a name that none of the heads has.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _OFFICIAL:
            mine, found = re.subn(f"^{pattern}", replacement, name)
            if found:
                break
        else:
            raise ValueError(f"{name!r} is no parameter of a published RotNet head.")
        ours[mine] = tensor
        if mine.endswith("running_mean"):
            ours.setdefault(mine.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return ours


def probe_of(state: Mapping[str, Tensor]) -> nn.Module:
    """The published head that a state dict under our names belongs to, with these weights.

    Whether a linear head pools by maximum (the published one) or by mean leaves no trace; it is made for the maximum.
    """
    classes = state["fc.weight"].shape[0]
    if "block.0.conv.weight" in state:
        width, channels = state["block.0.conv.weight"].shape[:2]
        probe: nn.Module = ConvProbe(channels, classes, width)
    elif "norm.running_mean" in state:
        channels = len(state["norm.running_mean"])
        probe = PooledProbe(channels, classes, grid=math.isqrt(state["fc.weight"].shape[1] // channels))
    elif "conv.conv.weight" in state:
        channels, width = state["conv.conv.weight"].shape[0], state["mlp.0.weight"].shape[0]
        probe = AlexNetProbe(channels, classes, conv=True, width=width)
    else:
        hidden, values = state["mlp.0.weight"].shape
        probe = NonLinearProbe(values, classes, hidden)
    probe.load_state_dict(dict(state))
    return probe


def _read(found: Checkpoint) -> nn.Module:
    return probe_of(from_official(found.state))


PUBLISHED = Published(of="rotnet", marks=r"^classifier\.[A-Z]", make=_read)
