"""RepLKNet: 31x31 depthwise kernels beside 5x5 ones (arXiv 2203.06717), the backbone of the large-kernel design study
(arXiv 2410.08049).

Every stage alternates a block with a large kernel and a feed-forward block, all with batch norm in front. While
training a small kernel runs beside each large one; ``reparameterize()`` merges it and folds every batch norm of a
residual branch, stem and transition into its convolution, with the same outputs.

``timm.create_model("replknet_31b")`` after ``import isthmus.encoders``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from isthmus.bounds import checked
from isthmus.codec.published import Published, classes_in
from isthmus.encoders.images.pyramid import Pyramid, Stage, backbone_of, imagenet_cfg
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.layers.pool import Pooling
from isthmus.layers.reparam import ReparamConv, check_mergeable, fuse_norm


class ConvNorm(nn.Sequential):
    """Convolution (1x1, 3x3, or depthwise 3x3), batch norm, and ReLU where asked for; merged it has a bias instead."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        depthwise: bool = False,
        relu: bool = False,
        deploy: bool = False,
    ) -> None:
        if depthwise:
            conv: nn.Module = DepthwiseConv(channels, kernel, stride=stride, bias=deploy)
        else:
            conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=deploy)
        norm = nn.Identity() if deploy else nn.BatchNorm2d(out)
        super().__init__(OrderedDict(conv=conv, norm=norm, act=nn.ReLU() if relu else nn.Identity()))

    def fold(self, before: nn.Module | None = None) -> None:
        """Fold the norm, and the batch norm in front of a 1x1 convolution, in place; a second call does nothing."""
        if isinstance(self.norm, nn.Identity):
            return
        conv = cast(nn.Conv2d, self.conv)
        fuse_norm(conv, self.norm)
        self.norm = nn.Identity()
        if before is not None:
            # W(γ(x - μ)/σ + β) = (Wγ/σ)x + W(β - μγ/σ); exact because a 1x1 convolution pads nothing.
            norm = cast(Any, before)
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * scale
            conv.bias = nn.Parameter(cast(Tensor, conv.bias) + conv.weight[:, :, 0, 0] @ shift)
            conv.weight = nn.Parameter(conv.weight * scale.view(1, -1, 1, 1))


class LargeKernelBlock(nn.Module):
    """x + DropPath(BN·1x1(ReLU(LK(ReLU(BN·1x1(BN(x))))))), LK the sum of a large and a small depthwise convolution.

    Args:
        dim: C.
        width: channels of the depthwise convolution.
        kernel: side of the large kernel.
        small_kernel: side of the small one; ``None`` for none.
        drop_path: probability of skipping the block for a sample.
        deploy: build the merged form at once.

    Shapes: ``(B, C, H, W)`` → the same.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        kernel: int,
        small_kernel: int | None,
        drop_path: float = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity() if deploy else nn.BatchNorm2d(dim)
        self.pw1 = ConvNorm(dim, width, relu=True, deploy=deploy)
        self.large = ReparamConv(width, kernel, [(small_kernel, 1)] if small_kernel else [], deploy=deploy)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(width, dim, deploy=deploy)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        return x + self.drop_path(self.pw2(self.act(self.large(self.pw1(self.norm(x))))))


class FeedForwardBlock(nn.Module):
    """x + DropPath(BN·1x1(GELU(BN·1x1(BN(x))))): the ConvFFN, four times as wide inside by default."""

    def __init__(self, dim: int, width: int, drop_path: float = 0.0, deploy: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity() if deploy else nn.BatchNorm2d(dim)
        self.pw1 = ConvNorm(dim, width, deploy=deploy)
        self.act = nn.GELU()
        self.pw2 = ConvNorm(width, dim, deploy=deploy)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        return x + self.drop_path(self.pw2(self.act(self.pw1(self.norm(x)))))


@checked
class RepLKNet(Pyramid):
    """The network, with timm's interface.

    Args:
        large_kernel_sizes: side of the large kernels of the four stages.
        layers: pairs of blocks (large kernel, feed-forward) of the four stages.
        channels: C of the four stages.
        small_kernel: side of the kernel beside each large one; ``None`` for none.
        dw_ratio: channels of the large depthwise convolution over C.
        ffn_ratio: width of the feed-forward blocks over C.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 returns pooled features.
        global_pool: timm's name of the pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
        norm_features: a batch norm on every level of the pyramid, as the XL checkpoints for dense tasks have.
        deploy: build the merged form, for a merged checkpoint.

    Shapes: ``(B, in_chans, H, W)`` of any size → ``(B, num_classes)``; levels of reduction 4, 8, 16, 32.

    Raises:
        ValueError: lists of unequal lengths, an even kernel, a wrong number of input channels.
    """

    def __init__(
        self,
        large_kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        layers: Sequence[int] = (2, 2, 18, 2),
        channels: Sequence[int] = (128, 256, 512, 1024),
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pooling = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_features: bool = False,
        deploy: bool = False,
    ) -> None:
        if not len(large_kernel_sizes) == len(layers) == len(channels):
            raise ValueError(
                f"large_kernel_sizes {tuple(large_kernel_sizes)}, layers {tuple(layers)} and channels "
                f"{tuple(channels)} must have one entry a stage."
            )
        c = channels[0]
        stem = nn.Sequential(
            ConvNorm(in_chans, c, 3, 2, relu=True, deploy=deploy),
            ConvNorm(c, c, 3, depthwise=True, relu=True, deploy=deploy),
            ConvNorm(c, c, relu=True, deploy=deploy),
            ConvNorm(c, c, 3, 2, depthwise=True, relu=True, deploy=deploy),
        )
        rates = cast(
            "list[list[float]]",
            calculate_drop_path_rates(drop_path_rate, [2 * n for n in layers], stagewise=True),
        )
        stages = []
        for i, (dim, kernel) in enumerate(zip(channels, large_kernel_sizes, strict=True)):
            blocks: list[nn.Module] = []
            for large_rate, ffn_rate in zip(rates[i][::2], rates[i][1::2], strict=True):
                blocks.append(LargeKernelBlock(dim, int(dim * dw_ratio), kernel, small_kernel, large_rate, deploy))
                blocks.append(FeedForwardBlock(dim, int(dim * ffn_ratio), ffn_rate, deploy))
            down = []
            if i:
                down.append(ConvNorm(channels[i - 1], dim, relu=True, deploy=deploy))
                down.append(ConvNorm(dim, dim, 3, 2, depthwise=True, relu=True, deploy=deploy))
            stages.append(Stage(nn.Sequential(*down), blocks))
        super().__init__(
            stages,
            channels,
            ClassifierHead(channels[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
            stem=stem,
            norm=nn.BatchNorm2d(channels[-1]),
            norms=[nn.BatchNorm2d(dim) for dim in channels] if norm_features else None,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            channels_last=True,
        )

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge kernels and fold batch norms, in place, with the same outputs. A second call does nothing.

        The batch norms of the head and of ``norm_features`` stay; there is nothing in front to fold them into.

        Raises:
            ValueError: in training mode.
        """
        if isinstance(cast(ConvNorm, self.stem[0]).norm, nn.Identity):
            return
        check_mergeable(self)
        for module in self.modules():
            if isinstance(module, LargeKernelBlock):
                module.large.reparameterize()
            if isinstance(module, (LargeKernelBlock, FeedForwardBlock)):
                module.pw1.fold(before=module.norm)
                module.norm = nn.Identity()
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        if "_timm_spec" in self.__dict__:  # a Codec that is saved now must be rebuilt in the merged form
            self.__dict__["_timm_spec"]["kwargs"]["deploy"] = True


# ------------------------------------------------------------------------------------------------ official checkpoints

_NAMES = [
    (r"^transitions\.0\.", "stages.1.downsample."),
    (r"^transitions\.1\.", "stages.2.downsample."),
    (r"^transitions\.2\.", "stages.3.downsample."),
    (r"\.(prelkb_bn|preffn_bn)\.", ".norm."),
    (r"\.large_kernel\.", ".large."),
    (r"(^|\.)lkb_origin\.", r"\1main."),
    (r"(^|\.)small_conv\.", r"\1branches.0."),
    (r"(^|\.)lkb_reparam\.", r"\1conv."),
    (r"\.bn\.", ".norm."),
    (r"^stages\.(\d)\.norm\.", r"norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def convert_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published layout (DingXiaoH/RepLKNet-pytorch) in our names: whole networks, or one large-kernel unit.

    Args:
        state: the checkpoint, with or without its level ``"model"`` or ``"state_dict"``, of the network alone or of a
            detector or segmenter with ``backbone.`` in front of its names, whose other parts are left out.
    """
    state = state.get("model", state.get("state_dict", state))
    converted = {}
    for name, tensor in backbone_of(state).items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        converted[name] = tensor
    return converted


def is_merged(state: Mapping[str, Tensor]) -> bool:
    """Whether a state of ours has merged large kernels."""
    return any(".large.conv." in key for key in state)


@torch.no_grad()
def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of ours whose large kernels are merged and nothing else, as that of a model with ``deploy=True``.

    The published code merges kernels only and leaves the batch norms of stem, transitions and pointwise convolutions.
    """
    found = dict(state)

    def load(module: nn.Module, prefix: str) -> None:
        names = [prefix + name for name in module.state_dict() if prefix + name in found]
        module.eval().load_state_dict({name.removeprefix(prefix): found.pop(name) for name in names})

    for name, weight in state.items():
        unit = name.removesuffix("conv.weight")
        if unit == name or f"{unit}norm.running_var" not in state:
            continue
        depthwise = weight.shape[1] == 1
        channels = len(weight) if depthwise else weight.shape[1]
        conv, before = ConvNorm(channels, len(weight), weight.shape[-1], depthwise=depthwise).to(weight), None
        load(conv, unit)
        if unit.endswith(".pw1."):  # a batch norm stands before the first convolution of every block
            before = nn.BatchNorm2d(channels).to(weight)
            load(before, unit.removesuffix("pw1.") + "norm.")
        conv.fold(before)
        found |= {unit + key: value for key, value in conv.state_dict().items()}
    return found


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook at loading: official names become ours, and what is left of norms in a merged one is folded.

    Raises:
        ValueError: a merged checkpoint for a model that is not.
    """
    ours = convert_official(state)
    if is_merged(ours) and not is_merged(model.state_dict()):
        raise ValueError("the checkpoint is merged and the model is not; create the model with deploy=True.")
    return fold_state(ours) if is_merged(ours) else ours


# --------------------------------------------------------------------------------------------------------------- sizes


def _cfg(**kwargs: Any) -> dict[str, Any]:
    # The published files stand on drives that ask for a browser: pretrained_cfg_overlay={"file": PATH} loads one.
    return imagenet_cfg("stem.0.conv", "head.fc", license="mit", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "replknet_31b": _cfg(),
        "replknet_31l": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
        "replknet_xl": _cfg(input_size=(3, 320, 320), pool_size=(10, 10), crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RepLKNet:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        RepLKNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """79.9 M parameters, 15.3 GMACs, ImageNet 83.5."""
    return _create("replknet_31b", pretrained, **kwargs)


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """172.7 M parameters, ImageNet 86.6 at 384 pixels after ImageNet-22K."""
    return _create("replknet_31l", pretrained, **{"channels": (192, 384, 768, 1536), **kwargs})


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """335.4 M parameters, kernels up to 27x27 on 1.5 times the channels, ImageNet 87.8 at 320 pixels."""
    sizes = {
        "large_kernel_sizes": (27, 27, 27, 13),
        "channels": (256, 512, 1024, 2048),
        "small_kernel": None,
        "dw_ratio": 1.5,
    }
    return _create("replknet_xl", pretrained, **{**sizes, **kwargs})


# ----------------------------------------------------------------------------------------------- published checkpoints


def _published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under our names; backbones for dense tasks have no norm of the head, which gets the one of a fresh model."""
    ours = convert_official(state)
    if is_merged(ours):
        ours = fold_state(ours)
    last = ours.get("stages.3.blocks.0.pw2.conv.weight")
    if "head.fc.weight" not in ours and last is not None:
        ours = {**{f"norm.{name}": value for name, value in nn.BatchNorm2d(len(last)).state_dict().items()}, **ours}
    return ours


def _arguments(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    merged, dense = "stem.0.conv.bias" in ours, "norms.0.weight" in ours
    return {**classes_in(ours), **({"deploy": True} if merged else {}), **({"norm_features": True} if dense else {})}


PUBLISHED = Published(
    of="large-kernels",
    marks=r"\.large_kernel\.lkb_",
    rename=_published,
    arguments=_arguments,
    names=["replknet_31b", "replknet_31l", "replknet_xl"],
)
