"""MetaMixer: attention, feed-forward networks and convolutions as one key-value memory (arXiv 2406.02021).

y = V(act(K(Q(x)))): a query meets keys, the activation makes coefficients of what comes out, and the coefficients weigh
values. :class:`MetaMixer` is that frame with four slots, and what is known by other names fills them:

=================  ==================  ======================  ============  ========================
                   query               key                     activation    value
=================  ==================  ======================  ============  ========================
self-attention     linear              product with keys of x  softmax       weighted sum of values of x
feed-forward       identity            1x1 convolution         GELU          1x1 convolution
FFNified attention 1x1 convolution     depthwise convolution   GELU          depthwise convolution
convolutional FFN  depthwise           1x1 convolution         GELU          1x1 convolution
=================  ==================  ======================  ============  ========================

The last two, one after the other in residuals, are the block of FFNet (:func:`ffnet_block`). Any module may fill a
slot; an operator whose keys or values depend on the input says so (``dynamic = True``) and is called with it too::

    mixer = ffnified_attention(64, 7)                  # or self_attention(64, heads=4), feed_forward(64)
    mine = MetaMixer(nn.Conv2d(64, 64, 1), depthwise(64, 7), nn.GELU(), depthwise(64, 7))
    y = mine(x)                                        # (B, 64, H, W) → the same

The paper's U-Net for point clouds, with sparse submanifold convolutions in these slots, is not here: it takes a library
of sparse 3-D convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from isthmus.layers.reparam import ReparamConv, check_mergeable, fuse_norm, warn_if_untrained

#: Makes an activation.
Activation = Callable[[], nn.Module]


class MetaMixer(nn.Module):
    """y = V(act(K(Q(x)))).

    Args:
        query: Q, called with x.
        key: K, called with the query; where it is dynamic, with the query and x.
        activation: act.
        value: V, called with the coefficients; where it is dynamic, with the coefficients and x.

    Shapes: as the slots make them; the ones below map ``(B, C, H, W)`` to the same.
    """

    def __init__(self, query: nn.Module, key: nn.Module, activation: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query: Any = query
        self.key: Any = key
        self.activation: Any = activation
        self.value: Any = value

    def forward(self, x: Tensor) -> Tensor:
        """Query, key, activation, value."""
        return _call(self.value, self.activation(_call(self.key, self.query(x), x)), x)


def _call(operator: Any, h: Tensor, x: Tensor) -> Tensor:
    return operator(h, x) if getattr(operator, "dynamic", False) else operator(h)


# ---------------------------------------------------------------------------------------------------------- operators


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm; one convolution with bias once merged.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel: odd side, "same" padding.
        stride: of the output.
        deploy: build the merged form at once.

    Shapes: ``(B, in_channels, H, W)`` → ``(B, out_channels, ⌈H / stride⌉, ⌈W / stride⌉)``.

    Raises:
        ValueError: an even kernel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, *, deploy: bool = False
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel}: a centred convolution needs an odd kernel.")
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=deploy)
        self.norm: Any = nn.Identity() if deploy else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` → ``(B, out_channels, ⌈H / stride⌉, ⌈W / stride⌉)``."""
        return self.norm(self.conv(x))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge in place; a second call does nothing. Raises ``ValueError`` in training mode."""
        if isinstance(self.norm, nn.Identity):
            return
        check_mergeable(self)
        fuse_norm(self.conv, self.norm)
        self.norm = nn.Identity()


class NormConvSkip(nn.Module):
    """x + W·BN(x), W a 1x1 convolution without bias; once merged W' = W·diag(γ/σ) + I, b' = W·(β - μγ/σ).

    Shapes: ``(B, C, H, W)`` → the same.
    """

    def __init__(self, channels: int, deploy: bool = False) -> None:
        super().__init__()
        self.norm: Any = nn.Identity() if deploy else nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=deploy)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        y = self.conv(self.norm(x))
        return y if self.conv.bias is not None else x + y

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge in place; a second call does nothing. Raises ``ValueError`` in training mode."""
        if self.conv.bias is not None:
            return
        check_mergeable(self)
        warn_if_untrained(self.norm)
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        weight = self.conv.weight.flatten(1)
        bias = weight @ (self.norm.bias - self.norm.running_mean * scale)
        weight = weight * scale + torch.eye(len(weight), device=weight.device, dtype=weight.dtype)
        self.conv.weight, self.conv.bias = nn.Parameter(weight[..., None, None]), nn.Parameter(bias)
        self.norm = nn.Identity()


def depthwise(channels: int, kernel: int, deploy: bool = False) -> ReparamConv:
    """FFNet's key and value operator: 7x7 re-parameterised, any other kernel one convolution with bias, no norm."""
    return (
        reparam_depthwise(channels, kernel, deploy=deploy)
        if kernel == 7
        else ReparamConv(channels, kernel, deploy=True)
    )


def depthwise_norm(channels: int, kernel: int, deploy: bool = False) -> ReparamConv:
    """FFNet's query of the channel mixer: 7x7 re-parameterised, any other kernel one convolution + BN."""
    return (
        reparam_depthwise(channels, kernel, deploy=deploy)
        if kernel == 7
        else single_depthwise(channels, kernel, deploy)
    )


def single_depthwise(channels: int, kernel: int, deploy: bool = False) -> ReparamConv:
    """One depthwise convolution + BN."""
    return ReparamConv(channels, kernel, deploy=deploy)


def reparam_depthwise(
    channels: int, kernel: int, stride: int = 1, out_channels: int | None = None, deploy: bool = False
) -> ReparamConv:
    """Depthwise k x k + BN and a kernel of half the side + BN, added: 7x7 and 3x3 as published.

    The published code takes ⌊k / 2⌋, which is even for k = 5, 9, 13 and shifts the map; here it is the next odd side.
    A 3x3 stands alone.
    """
    small = (kernel // 2) | 1
    return ReparamConv(
        channels,
        kernel,
        [(small, 1)] if 1 < small < kernel else [],
        stride,
        out_channels=out_channels,
        deploy=deploy,
    )


def strip_depthwise(channels: int, kernel: int, deploy: bool = False) -> ReparamConv:
    """Depthwise k x k, (k - 4) x (k - 4), 1 x k and k x 1, each + BN, added; 3x3 has no small square."""
    square = [(kernel - 4, 1)] if kernel > 4 else []
    return ReparamConv(channels, kernel, [*square, ((1, kernel), 1), ((kernel, 1), 1)], deploy=deploy)


class InnerProduct(nn.Module):
    """Keys of attention: q·k / √d for every head and pair of places. Dynamic: the keys are made of x.

    Shapes: queries ``(B, e, H, W)``, x ``(B, C, H, W)`` → ``(B, heads, HW, HW)``.

    Raises:
        ValueError: ``heads`` does not divide e.
    """

    dynamic = True

    def __init__(self, keys: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}.")
        self.keys, self.heads, self.scale = keys, heads, (width // heads) ** -0.5

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        """Queries ``(B, e, H, W)``, x ``(B, C, H, W)`` → logits ``(B, heads, HW, HW)``."""
        return self.scale * split_heads(queries, self.heads) @ split_heads(self.keys(x), self.heads).mT


class WeightedSum(nn.Module):
    """Values of attention: every place takes the mean of the values of x by its coefficients, then a projection.

    Shapes: coefficients ``(B, heads, HW, HW)``, x ``(B, C, H, W)`` → as the projection makes it, ``(B, C, H, W)``.
    """

    dynamic = True

    def __init__(self, values: nn.Module, project: nn.Module, heads: int) -> None:
        super().__init__()
        self.values, self.project, self.heads = values, project, heads

    def forward(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """Coefficients ``(B, heads, HW, HW)``, x ``(B, C, H, W)`` → ``(B, C, H, W)``."""
        return self.project(join_heads(coefficients @ split_heads(self.values(x), self.heads), x))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, heads·d, H, W)`` → ``(B, heads, HW, d)``."""
    return x.flatten(2).unflatten(1, (heads, -1)).mT


def join_heads(tokens: Tensor, like: Tensor) -> Tensor:
    """``(B, heads, HW, d)`` → ``(B, heads·d, H, W)``, H and W those of ``like``."""
    return tokens.mT.flatten(1, 2).unflatten(2, like.shape[2:])


class SelfAttention(MetaMixer):
    """The frame with softmax attention in its slots, computed without ever holding the coefficients.

    The numbers are those of :class:`MetaMixer` with the same four operators; memory grows with the number of places
    and not with its square.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        q, k, v = (
            split_heads(maps, self.key.heads) for maps in (self.query(x), self.key.keys(x), self.value.values(x))
        )
        return self.value.project(join_heads(F.scaled_dot_product_attention(q, k, v), x))


# -------------------------------------------------------------------------------------------------------- the filled


def ffnified_attention(
    dim: int,
    key_kernel: int,
    value_kernel: int | None = None,
    activation: Activation = nn.GELU,
    operator: Callable[..., nn.Module] = depthwise,
    deploy: bool = False,
) -> MetaMixer:
    """FFNified attention, the token mixer of FFNet: 1x1 + BN, depthwise, GELU, depthwise; no other norm.

    Args:
        dim: C.
        key_kernel: of the first depthwise convolution.
        value_kernel: of the second, the same by default.
        activation: between them.
        operator: ``operator(dim, kernel, deploy=)`` makes the depthwise convolutions.
        deploy: build the merged form at once.

    Raises:
        ValueError: an even kernel.
    """
    value_kernel = key_kernel if value_kernel is None else value_kernel
    key, value = operator(dim, key_kernel, deploy=deploy), operator(dim, value_kernel, deploy=deploy)
    return MetaMixer(ConvNorm(dim, dim, deploy=deploy), key, activation(), value)


def convolutional_ffn(
    dim: int,
    kernel: int,
    ratio: float = 3,
    activation: Activation = nn.GELU,
    operator: Callable[..., nn.Module] = depthwise_norm,
    deploy: bool = False,
) -> MetaMixer:
    """The channel mixer of FFNet: depthwise + BN, 1x1 to ``ratio`` times the width, GELU, 1x1 back."""
    hidden = int(dim * ratio)
    if hidden < 1:
        raise ValueError(f"ratio {ratio} leaves no channel of {dim}.")
    query = operator(dim, kernel, deploy=deploy)
    return MetaMixer(query, nn.Conv2d(dim, hidden, 1), activation(), nn.Conv2d(hidden, dim, 1))


def feed_forward(dim: int, ratio: float = 4, activation: Activation = nn.GELU) -> MetaMixer:
    """The feed-forward network of transformers on every place of a map: 1x1, GELU, 1x1."""
    hidden = int(dim * ratio)
    return MetaMixer(nn.Identity(), nn.Conv2d(dim, hidden, 1), activation(), nn.Conv2d(hidden, dim, 1))


def self_attention(
    dim: int, heads: int, width: int | None = None, project: Callable[[int, int], nn.Module] = ConvNorm
) -> SelfAttention:
    """Softmax attention over the places of a map.

    Args:
        dim: C.
        heads: h.
        width: of queries, keys and values together over all heads; C by default.
        project: ``project(in, out)`` makes the maps to queries, keys and values: 1x1 + BN, as FFNified attention has.

    Raises:
        ValueError: ``heads`` does not divide the width.
    """
    width = dim if width is None else width
    key = InnerProduct(project(dim, width), width, heads)
    value = WeightedSum(project(dim, width), nn.Conv2d(width, dim, 1), heads)
    return SelfAttention(project(dim, width), key, nn.Softmax(-1), value)


# ------------------------------------------------------------------------------------------------------------- blocks


class Residual(nn.Module):
    """act(x + DropPath(γ · main(x))).

    Args:
        main: maps ``(B, C, H, W)`` to itself.
        dim: C.
        drop_path: probability of leaving ``main`` out for a sample.
        layer_scale: initial γ, one for every channel; ``None`` leaves γ out.
        activation: after the sum; nothing by default.
    """

    def __init__(
        self,
        main: nn.Module,
        dim: int,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        activation: Activation = nn.Identity,
    ) -> None:
        super().__init__()
        self.main: Any = main
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        y = self.main(x)
        if self.gamma is not None:
            y = y * self.gamma.view(-1, 1, 1)
        return self.activation(x + self.drop_path(y))

    @torch.no_grad()
    def fold_scale(self) -> None:
        """Multiply γ into the last convolution of ``main``, in place; a second call does nothing.

        Raises:
            ValueError: ``main`` does not end in a convolution, or in one that is not merged yet.
        """
        if self.gamma is None:
            return
        last = getattr(self.main, "value", self.main)
        last = getattr(last, "conv", last)
        if not isinstance(last, nn.Conv2d):
            raise ValueError(f"{type(self.main).__name__} does not end in a merged convolution; γ cannot go into it.")
        last.weight = nn.Parameter(last.weight * self.gamma.view(-1, 1, 1, 1))
        if last.bias is not None:
            last.bias = nn.Parameter(last.bias * self.gamma)
        self.gamma = None


def ffnet_block(
    dim: int,
    token_mixer: nn.Module,
    channel_mixer: nn.Module,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    squeeze_excite: bool = False,
    activation: Activation = nn.Identity,
) -> nn.Sequential:
    """A block of FFNet: token mixer and channel mixer, each in a :class:`Residual`.

    ``squeeze_excite`` puts one (a quarter of the channels, in eights) after the sum of the first residual, not into it.
    """
    parts: list[tuple[str, nn.Module]] = [
        ("token_mixer", Residual(token_mixer, dim, drop_path, layer_scale, activation))
    ]
    if squeeze_excite:
        parts.append(("se", SqueezeExcite(dim, 0.25)))
    parts.append(("channel_mixer", Residual(channel_mixer, dim, drop_path, layer_scale, activation)))
    block = nn.Sequential()
    for name, part in parts:
        block.add_module(name, part)
    return block


def reparameterize(model: nn.Module, fold_scales: bool = False) -> None:
    """Merge every batch norm and every branch of a model's mixers into one convolution each, in place and exactly.

    ``fold_scales`` also multiplies the γ of every residual into the convolution before it.

    Raises:
        ValueError: in training mode.
    """
    check_mergeable(model)
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, (ConvNorm, NormConvSkip, ReparamConv)):
            module.reparameterize()
    for module in modules:
        if fold_scales and isinstance(module, Residual):
            module.fold_scale()


# ------------------------------------------------------------------------------------------------ official checkpoints

_NAMES = [
    (r"\.token_mixer\.1\.", ".se."),
    (r"\.token_mixer\.0\.", ".token_mixer."),
    (r"\.token_mixer\.main\.fc\.", ".token_mixer.main.query."),
    (r"\.token_mixer\.main\.conv1\.", ".token_mixer.main.key."),
    (r"\.token_mixer\.main\.conv2\.", ".token_mixer.main.value."),
    (r"\.channel_mixer\.main\.conv\.", ".channel_mixer.main.query."),
    (r"\.channel_mixer\.main\.fc1\.", ".channel_mixer.main.key."),
    (r"\.channel_mixer\.main\.fc2\.", ".channel_mixer.main.value."),
    (r"\.layer_scale$", ".gamma"),
]
_BRANCHES = ("conv", "conv1", "conv2", "strip_conv1", "strip_conv2")  # square, smaller square, strips
_UNIT = re.compile(r"^(.*\.(?:key|value|query|downsample\.0))\.(conv[12]?|strip_conv[12])\.((?:c|bn)\..*)$")
_INSIDE = [
    (r"(\.channel_mixer\.main\.query)\.(c|bn)\.", r"\1.main.\2."),
    (r"(\.downsample\.1)\.conv\.", r"\1."),
    (r"\.c\.(weight|bias)$", r".conv.\1"),
    (r"\.bn\.", ".norm."),
    # One convolution where we have a unit: a small depthwise kernel, or anything that is merged already.
    (r"((?:token_mixer\.main\.\w+|channel_mixer\.main\.query|downsample\.\d)|stem\.\d)\.(weight|bias)$", r"\1.conv.\2"),
]


def convert_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that ysj9909/FFNet gives to what is inside blocks, in ours; trained or merged.

    The units of the image networks (``conv``, ``conv1``) and of the segmentation system (``conv1``, ``conv2`` where the
    kernel leaves room for a smaller square, two strips) are told apart by the branches that they have.
    """
    named = {}
    for key, value in state.items():
        for pattern, ours in _NAMES:
            key = re.sub(pattern, ours, key)
        named[key] = value.flatten() if key.endswith(".gamma") else value
    units: dict[str, set[str]] = {}
    for unit, branch, _ in (found.groups() for found in map(_UNIT.match, named) if found):
        units.setdefault(unit, set()).add(branch)
    converted = {}
    for key, value in named.items():
        if found := _UNIT.match(key):
            unit, branch, rest = found.groups()
            number = [name for name in _BRANCHES if name in units[unit]].index(branch)
            key = f"{unit}.{'main' if number == 0 else f'branches.{number - 1}'}.{rest}"
        for pattern, ours in _INSIDE:
            key = re.sub(pattern, ours, key)
        converted[key] = value
    return converted
