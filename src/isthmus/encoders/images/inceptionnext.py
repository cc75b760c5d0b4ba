"""InceptionNeXt: most channels pass, the others get a square, a horizontal or a vertical kernel (arXiv 2303.16900).

A depthwise 7x7 convolution moves the whole map through slow kernels. Here five channels of eight are left as they are
and three groups of an eighth get a 3x3, a 1x11 and an 11x1 depthwise convolution: 31 instead of 49 multiply-adds for
an eighth of the channels each.

timm has the named sizes: ``timm.create_model("inception_next_tiny")``. This file adds

* the mixer for any network (:class:`InceptionDWConv2d`), with checks, and on CPUs with the fast gradients of
  :mod:`isthmus.layers.large_kernel`; :func:`accelerate` puts it into a network of timm;
* its equivalent dense kernel, for lenses that read large kernels (:meth:`InceptionDWConv2d.dense_kernel`);
* the sizes that timm lacks: isotropic networks and the ConvNeXt-T with small or partial kernels of the paper's table
  (``inceptionnext_isotropic_small``, ``convnext_tiny_k3_par1_8``, …).

Merge a trained network with :func:`isthmus.encoders.images.metanext.reparameterize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from timm.models import build_model_with_cfg, convnext, generate_default_cfgs, inception_next, register_model
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import UserError, part
from isthmus.codec.published import Published
from isthmus.encoders.images.metanext import MetaNeXt, Mixer
from isthmus.encoders.images.pyramid import imagenet_cfg
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.layers.pointwise import PointwiseConv
from isthmus.layers.reparam import embed_kernel

_LARGE = 2**15  # elements of a branch from which DepthwiseConv's own gradients beat the library's for a 1 x b kernel


class InceptionDWConv2d(nn.Module):
    """Identity, s x s, 1 x b and b x 1 depthwise convolutions on four groups of channels, in this order (algorithm 1).

    Args:
        channels: C.
        square_kernel_size: s, odd.
        band_kernel_size: b, odd.
        branch_ratio: share of the channels of each convolved group, g = ⌊C · ratio⌋; what is left is the identity's.

    Shapes: ``(B, C, H, W)`` → the same, maps smaller than the band included. The memory format is kept.

    Raises:
        ValueError: an even kernel; a ratio outside (0, 1/3]; groups without channels.
    """

    def __init__(
        self, channels: int, square_kernel_size: int = 3, band_kernel_size: int = 11, branch_ratio: float = 0.125
    ) -> None:
        super().__init__()
        if not 0 < branch_ratio <= 1 / 3:
            raise ValueError(f"branch_ratio {branch_ratio}: three groups have this share each, so it lies in (0, 1/3].")
        group = int(channels * branch_ratio)
        if group < 1:
            raise ValueError(
                f"{channels} channels with branch_ratio {branch_ratio} leave no channel for a branch; it takes "
                f"{int(1 / branch_ratio) + (1 / branch_ratio % 1 > 0)} channels or a larger ratio."
            )
        self.channels, self.group = channels, group
        self.dwconv_hw = DepthwiseConv(group, square_kernel_size, "direct")
        self.dwconv_w = DepthwiseConv(group, (1, band_kernel_size))
        self.dwconv_h = DepthwiseConv(group, (band_kernel_size, 1), "direct")
        self.split_indexes = [channels - 3 * group, group, group, group]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        if x.shape[1] != self.channels:
            raise ValueError(f"the map has {x.shape[1]} channels; this mixer is for {self.channels}.")
        same, square, across, down = torch.split(x, self.split_indexes, dim=1)
        # Of the three only the horizontal kernel has a slow gradient on CPUs, and there the way round pays from a size.
        plain = torch.compiler.is_compiling() or across.numel() < _LARGE  # compilers see one road for every batch
        wide = nn.Conv2d.forward(self.dwconv_w, across) if plain else self.dwconv_w(across)
        return torch.cat((same, self.dwconv_hw(square), wide, self.dwconv_h(down)), dim=1)

    @torch.no_grad()
    def dense_kernel(self) -> tuple[Tensor, Tensor]:
        """Kernel ``(C, 1, k, k)`` and bias ``(C,)`` of the one depthwise convolution that computes the same."""
        branches: list[DepthwiseConv] = [self.dwconv_hw, self.dwconv_w, self.dwconv_h]
        side = max(max(branch.kernel_size) for branch in branches)
        weight = self.dwconv_hw.weight
        delta = embed_kernel(weight.new_ones(self.channels - 3 * self.group, 1, 1, 1), side)
        kernels = [embed_kernel(branch.weight.detach(), side) for branch in branches]
        biases = [branch.bias.detach() for branch in branches if branch.bias is not None]
        return torch.cat([delta, *kernels]), torch.cat([weight.new_zeros(len(delta)), *biases])


class PartialConv2d(nn.Module):
    """Depthwise convolution of the last ⌊C · ratio⌋ channels; those before pass through (the paper's ablation).

    Args:
        channels: C.
        kernel_size: odd.
        ratio: share of the channels that is convolved, in (0, 1].

    Shapes: ``(B, C, H, W)`` → the same.

    Raises:
        ValueError: an even kernel, a ratio out of range, or no channel to convolve.
    """

    def __init__(self, channels: int, kernel_size: int = 3, ratio: float = 1.0) -> None:
        super().__init__()
        convolved = int(channels * ratio)
        if not 0 < ratio <= 1 or convolved < 1:
            raise ValueError(
                f"ratio {ratio} of {channels} channels: it lies in (0, 1] and covers at least one channel."
            )
        self.conv = DepthwiseConv(convolved, kernel_size)
        self.split_indexes = [channels - convolved, convolved]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        same, convolved = torch.split(x, self.split_indexes, dim=1)
        return torch.cat((same, self.conv(convolved)), dim=1)


def accelerate(model: nn.Module) -> nn.Module:
    """Put our mixer and our 1x1 convolutions in the place of timm's, in place: same parameters, names and numbers.

    On CPUs the mixers are but a few percent of the time; what counts are the 1x1 convolutions of the MLPs
    (:mod:`isthmus.layers.pointwise`). Mixers with a dilation (``output_stride`` below 32) stay timm's.

    Raises:
        ValueError: the model has no mixer of timm's InceptionNeXt.
    """
    found = 0
    for parent in list(model.modules()):
        for name, mixer in parent.named_children():
            if not isinstance(mixer, inception_next.InceptionDWConv2d):
                continue
            found += 1
            square, band = mixer.dwconv_hw, mixer.dwconv_w
            if square.dilation != (1, 1):
                continue
            group, channels = square.out_channels, sum(mixer.split_indexes)
            ours = InceptionDWConv2d(channels, square.kernel_size[0], band.kernel_size[1], group / channels)
            for branch in ("dwconv_hw", "dwconv_w", "dwconv_h"):
                theirs, mine = getattr(mixer, branch), getattr(ours, branch)
                mine.weight, mine.bias = theirs.weight, theirs.bias
            setattr(parent, name, ours.train(mixer.training))
    if not found:
        raise ValueError(f"{type(model).__name__} has no mixer of timm's InceptionNeXt.")
    for block in model.modules():
        if isinstance(block, inception_next.MetaNeXtBlock):
            for name in ("fc1", "fc2"):
                theirs = getattr(block.mlp, name)
                if type(theirs) is nn.Conv2d:
                    mine = PointwiseConv(theirs.in_channels, theirs.out_channels)
                    mine.weight, mine.bias = theirs.weight, theirs.bias
                    setattr(block.mlp, name, mine.train(theirs.training))
    return model


# --------------------------------------------------------------------------------------------------------------- sizes


#: ConvNeXt-T with another depthwise kernel: (kernel, share of the channels that is convolved).
_ABLATIONS: dict[str, tuple[int, Fraction]] = {
    "convnext_tiny_k5": (5, Fraction(1)),
    "convnext_tiny_k3": (3, Fraction(1)),
    "convnext_tiny_k3_par1_2": (3, Fraction(1, 2)),
    "convnext_tiny_k3_par3_8": (3, Fraction(3, 8)),
    "convnext_tiny_k3_par1_4": (3, Fraction(1, 4)),
    "convnext_tiny_k3_par1_8": (3, Fraction(1, 8)),
    "convnext_tiny_k3_par1_16": (3, Fraction(1, 16)),
}
_ISOTROPIC = {"inceptionnext_isotropic_small": 384, "inceptionnext_isotropic_base": 768}

default_cfgs = generate_default_cfgs(
    {
        **{name: imagenet_cfg("stem.0", "head.fc") for name in _ABLATIONS},
        **{name: imagenet_cfg("stem.0", "head.fc2", pool_size=(14, 14)) for name in _ISOTROPIC},
    }
)


#: What stands in the place of the mixer in the paper's comparison.
MIXERS: dict[str, Mixer] = {
    "inception": lambda dim, stage: InceptionDWConv2d(dim),
    "7x7": lambda dim, stage: DepthwiseConv(dim, 7),
    "3x3": lambda dim, stage: DepthwiseConv(dim, 3),
    "identity": lambda dim, stage: nn.Identity(),
}


@part("InceptionNeXtMixers")
@checked
def mixer_network(mixer: str, depths: Sequence[Count], dims: Sequence[Count], **arguments: Any) -> MetaNeXt:
    """A :class:`MetaNeXt` whose mixer is named, one of :data:`MIXERS`; ``arguments`` are those of the network."""
    if mixer not in MIXERS:
        raise UserError(f"no mixer {mixer!r}; choose from {', '.join(MIXERS)}.")
    return MetaNeXt(depths, dims, MIXERS[mixer], **arguments)


def mixer(dim: int, stage: int) -> InceptionDWConv2d:
    """The published mixer as the slot of :class:`~isthmus.encoders.images.metanext.MetaNeXt` takes it."""
    return InceptionDWConv2d(dim)


def _isotropic(variant: str, pretrained: bool, **kwargs: Any) -> MetaNeXt:
    """Eighteen blocks of one width on a 14x14 map, as isotropic ConvNeXt has (paper, section 4.1)."""
    sizes: dict[str, Any] = {
        "depths": (18,),
        "dims": (_ISOTROPIC[variant],),
        "mixer": mixer,
        "mlp_ratios": (4,),
        "stem_stride": 16,
        "mlp_head": False,
    }
    feature_cfg = {"out_indices": (0,), "flatten_sequential": True}
    return build_model_with_cfg(MetaNeXt, variant, pretrained, feature_cfg=feature_cfg, **{**sizes, **kwargs})


def _ablation(variant: str, pretrained: bool, **kwargs: Any) -> convnext.ConvNeXt:
    """timm's ConvNeXt-T with the depthwise convolutions of every block exchanged."""
    kernel, ratio = _ABLATIONS[variant]

    def exchanged(**arguments: Any) -> convnext.ConvNeXt:
        model = convnext.ConvNeXt(**arguments)
        for block in model.modules():
            if isinstance(block, convnext.ConvNeXtBlock):
                dim: Any = block.conv_dw.out_channels
                conv = DepthwiseConv(dim, kernel) if ratio == 1 else PartialConv2d(dim, kernel, float(ratio))
                inner = conv if isinstance(conv, DepthwiseConv) else conv.conv
                nn.init.trunc_normal_(inner.weight, std=0.02)
                nn.init.zeros_(inner.bias)  # type: ignore[arg-type]
                block.conv_dw = conv
        return model

    sizes = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(
        exchanged,
        variant,
        pretrained,
        pretrained_filter_fn=convnext.checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **{**sizes, **kwargs},
    )


@register_model
def inceptionnext_isotropic_small(pretrained: bool = False, **kwargs: Any) -> MetaNeXt:
    """Width 384, 22 M parameters; published in the paper, without code or weights."""
    return _isotropic("inceptionnext_isotropic_small", pretrained, **kwargs)


@register_model
def inceptionnext_isotropic_base(pretrained: bool = False, **kwargs: Any) -> MetaNeXt:
    """Width 768, 87 M parameters; published in the paper, without code or weights."""
    return _isotropic("inceptionnext_isotropic_base", pretrained, **kwargs)


@register_model
def convnext_tiny_k5(pretrained: bool = False, **kwargs: Any) -> convnext.ConvNeXt:
    """ConvNeXt-T with 5x5 kernels, ImageNet 82.0."""
    return _ablation("convnext_tiny_k5", pretrained, **kwargs)


@register_model
def convnext_tiny_k3(pretrained: bool = False, **kwargs: Any) -> convnext.ConvNeXt:
    """ConvNeXt-T with 3x3 kernels, ImageNet 81.5."""
    return _ablation("convnext_tiny_k3", pretrained, **kwargs)


@register_model
def convnext_tiny_k3_par1_2(pretrained: bool = False, **kwargs: Any) -> convnext.ConvNeXt:
    """3x3 on half of the channels, ImageNet 81.4."""
    return _ablation("convnext_tiny_k3_par1_2", pretrained, **kwargs)


@register_model
def convnext_tiny_k3_par3_8(pretrained: bool = False, **kwargs: Any) -> convnext.ConvNeXt:
    """3x3 on three channels of eight, ImageNet 81.4."""
    return _ablation("convnext_tiny_k3_par3_8", pretrained, **kwargs)


@register_model
def convnext_tiny_k3_par1_4(pretrained: bool = False, **kwargs: Any) -> convnext.ConvNeXt:
    """3x3 on a quarter of the channels, ImageNet 81.3."""
    return _ablation("convnext_tiny_k3_par1_4", pretrained, **kwargs)


@register_model
def convnext_tiny_k3_par1_8(pretrained: bool = False, **kwargs: Any) -> convnext.ConvNeXt:
    """3x3 on an eighth of the channels, ImageNet 80.8."""
    return _ablation("convnext_tiny_k3_par1_8", pretrained, **kwargs)


@register_model
def convnext_tiny_k3_par1_16(pretrained: bool = False, **kwargs: Any) -> convnext.ConvNeXt:
    """3x3 on a sixteenth of the channels, ImageNet 80.1."""
    return _ablation("convnext_tiny_k3_par1_16", pretrained, **kwargs)


# ----------------------------------------------------------------------------------------------- published checkpoints


def _published(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The paper's ConvNeXt-T with other kernels has the names of ConvNeXt, which timm maps."""
    if "downsample_layers.0.0.weight" not in state:
        return state
    with torch.device("meta"):
        like = convnext.convnext_tiny(num_classes=len(state.get("head.weight", ())))
    return convnext.checkpoint_filter_fn(dict(state), like)


PUBLISHED = Published(
    of="inceptionnext",
    marks=r"\.token_mixer\.dwconv_hw\.|^stages\.\d\.\d+\.dwconv\.",
    rename=_published,
    names=[
        *(f"inception_next_{size}" for size in ("atto", "tiny", "small", "base")),
        *("convnext_tiny", "convnext_tiny_k5", "convnext_tiny_k3"),
        *(f"convnext_tiny_k3_par{share}" for share in ("1_2", "3_8", "1_4", "1_8", "1_16")),
    ],
)
