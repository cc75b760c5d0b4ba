"""The CIFAR residual networks (He et al. 2016, arXiv 1512.03385, section 4.2), with parameter-free shortcuts.

Three stages of n basic blocks on 16, 32 and 64 channels after a 3×3 stem; where a stage halves the map, the shortcut
takes every second place and appends zero channels. ``timm.create_model("cifar_resnet20")`` after
``import isthmus.encoders``; the keys of akamaster's published weights load through :func:`from_official`.

``resnet18_cifar`` and ``resnet50_cifar`` are timm's ResNets behind a 3×3 stem that keeps every place, as Yeom et al.
(arXiv 1912.08881) and many others train them on 32×32 pictures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from timm.layers import DropPath, SelectAdaptivePool2d, calculate_drop_path_rates
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock as WideBlock
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from isthmus.bounds import Share, checked
from isthmus.codec.published import Published
from isthmus.encoders.images.stages import NamedStages
from isthmus.layers.padded_shortcut import PaddedShortcut
from isthmus.layers.pool import Pooling

__all__ = ["CifarResNet", "FineStemResNet", "from_official"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, the shortcut added before the last ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU(inplace=True)
        same = channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else PaddedShortcut(channels, out_channels, stride)
        self.drop_path = DropPath(drop_path) if drop_path else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` → ``(B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)``."""
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        y = y if self.drop_path is None else self.drop_path(y)
        return self.act2(y + self.shortcut(x))


@checked
class CifarResNet(NamedStages):
    """A stem and three stages; 6·``blocks`` + 2 layers.

    Args:
        num_classes: outputs; 0 leaves the classifier out.
        in_chans: channels of the input.
        blocks: residual blocks a stage.
        width: channels of the first stage; they double twice.
        global_pool: timm's name of the pooling before the classifier; ``""`` keeps the map.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: no block, or no channel.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        blocks: int = 3,
        width: int = 16,
        global_pool: Pooling = "avg",
        drop_rate: Share = 0.0,
        drop_path_rate: Share = 0.0,
    ) -> None:
        if blocks < 1 or width < 1:
            raise ValueError(f"blocks and width must be at least 1, got {blocks} and {width}.")
        stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages: dict[str, nn.Module] = {"conv1": stem}
        info, channels = [], width
        rates = iter(cast("list[float]", calculate_drop_path_rates(drop_path_rate, 3 * blocks)))
        for number in range(3):
            out = width * 2**number
            stage = nn.Sequential()
            for index in range(blocks):
                stage.append(BasicBlock(channels, out, 2 if number and not index else 1, next(rates)))
                channels = out
            stages[f"conv{number + 2}"] = stage
            info.append({"num_chs": out, "reduction": 2**number, "stage": f"conv{number + 2}"})
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        super().__init__(stages, {"pool": pool}, info, channels, channels, num_classes, in_chans, drop_rate)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)


class FineStemResNet(ResNet):
    """timm's ResNet with a 3×3 stem of stride 1 and no pool in front of its stages; arguments are those of timm."""

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        width: Any = self.bn1.num_features
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 8), strict=True):
            info["reduction"] = reduction


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict (``conv1``, ``layer1.0.conv1``, …, ``linear``) under our names.

    Raises:
        ValueError: a name that the published networks do not have.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if match := re.fullmatch(r"layer([123])\.(\d+)\.((?:conv|bn)[12]\.\w+)", name):
            ours[f"stages.conv{int(match[1]) + 1}.{match[2]}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
            ours[f"stages.conv1.{0 if match[1] == 'conv' else 1}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"linear\.(weight|bias)", name):
            ours[f"head.classifier.{match[1]}"] = tensor
        else:
            raise ValueError(f"{name!r} is no parameter of the published CIFAR ResNets.")
    for name in [name for name in ours if name.endswith("running_mean")]:
        tracked = name.replace("running_mean", "num_batches_tracked")
        ours.setdefault(tracked, ours[name].new_zeros((), dtype=ours[name].dtype).long())
    return ours


# --------------------------------------------------------------------------------------------------- registered sizes

_BLOCKS = {"cifar_resnet20": 3, "cifar_resnet32": 5, "cifar_resnet44": 7, "cifar_resnet56": 9, "cifar_resnet110": 18}


def _cfg() -> PretrainedCfg:
    """Input and normalisation (ImageNet's) of the published weights."""
    return PretrainedCfg(
        url="",
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="stages.conv1.0",
        classifier="head.classifier",
    )


def _wide_cfg() -> PretrainedCfg:
    return replace(_cfg(), pool_size=(4, 4), first_conv="conv1", classifier="fc")


_WIDE = ("resnet18_cifar", "resnet50_cifar")
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _wide_cfg() if name in _WIDE else _cfg() for name in (*_BLOCKS, *_WIDE)}
)


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """timm's hook: published names become ours, ours stay."""
    return from_official(state) if any("linear.weight" in name for name in state) else state


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    features = {"feature_cls": "getter", "out_indices": (0, 1, 2)}
    arguments = {"blocks": _BLOCKS[variant], **kwargs}
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features, **arguments
    )


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """20 layers, 0.27 million parameters (published error on CIFAR-10: 8.27 %)."""
    return _create("cifar_resnet20", pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """32 layers, 0.46 million parameters."""
    return _create("cifar_resnet32", pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """44 layers, 0.66 million parameters."""
    return _create("cifar_resnet44", pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """56 layers, 0.85 million parameters (published error on CIFAR-10: 6.61 %)."""
    return _create("cifar_resnet56", pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """110 layers, 1.73 million parameters."""
    return _create("cifar_resnet110", pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> FineStemResNet:
    """ResNet-18 with a fine stem, 11.2 million parameters."""
    arguments = {"block": WideBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(FineStemResNet, "resnet18_cifar", pretrained, **arguments)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> FineStemResNet:
    """ResNet-50 with a fine stem, 23.5 million parameters."""
    arguments = {"block": Bottleneck, "layers": (3, 4, 6, 3), **kwargs}
    return build_model_with_cfg(FineStemResNet, "resnet50_cifar", pretrained, **arguments)


PUBLISHED = Published(
    of="lrp-pruning",
    marks=r"^layer[123]\.\d+\.(conv|bn)[12]\.",
    rename=from_official,
    arguments=lambda ours: {"num_classes": len(ours.get("head.classifier.weight", ()))},
    names=[f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110)],
)
