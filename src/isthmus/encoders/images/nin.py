"""Network in Network, the CIFAR network of RotNet (arXiv 1803.07728, section 3.1; Lin et al., arXiv 1312.4400)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct, SelectAdaptivePool2d
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from isthmus.bounds import checked
from isthmus.codec import create_timm
from isthmus.codec.checkpoints import Checkpoint, load_into
from isthmus.codec.published import Published
from isthmus.encoders.images.stages import NamedStages
from isthmus.layers.pool import Pooling

__all__ = ["NetworkInNetwork", "architecture_of", "from_official"]


@checked
class NetworkInNetwork(NamedStages):
    """Blocks of one spatial convolution followed by 1×1 ones, global average pooling and a linear classifier.

    Block 1 convolves 5×5 and 1×1 with the given ``widths`` and max-pools; block 2 convolves 5×5 and average-pools;
    further blocks convolve 3×3 and keep the resolution. From block 2 on every convolution is ``widths[0]`` wide.
    32-pixel images give ``conv1`` 16×16, ``conv2`` and all later blocks 8×8. Stages ``conv1``, ``conv2``, …, ``pool``,
    ``classifier`` can be read by name.

    Args:
        num_classes: outputs, 4 rotations by default; 0 leaves the classifier out.
        in_chans: channels of the input.
        depths: convolutions of every block; the length is the number of blocks (3, 4 or 5 in the paper).
        widths: channels of the convolutions of block 1.
        pool_conv3: average-pool after block 3 too, where there are more than three blocks (the published CIFAR
            experiments do not).
        global_pool: timm's name of the pooling before the classifier; ``""`` keeps the map.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: no block, an empty block, or ``widths`` that do not fit block 1.
    """

    def __init__(
        self,
        num_classes: int = 4,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 3, 3),
        widths: Sequence[int] = (192, 160, 96),
        pool_conv3: bool = False,
        global_pool: Pooling = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        if not depths or min(depths) < 1 or len(widths) != depths[0]:
            raise ValueError(
                f"depths counts the convolutions of every block and widths gives one width for each of block 1's; "
                f"got depths {tuple(depths)} and widths {tuple(widths)}."
            )
        stages: dict[str, nn.Module] = {}
        info = []
        channels, reduction = in_chans, 1
        for number, depth in enumerate(depths, start=1):
            block_widths = widths if number == 1 else (widths[0],) * depth
            block = _block(channels, block_widths, kernel_size=5 if number <= 2 else 3)
            pooled = number <= 2 or (number == 3 and pool_conv3 and len(depths) > 3)
            if pooled:
                pool = nn.MaxPool2d if number == 1 else nn.AvgPool2d
                block.append(pool(kernel_size=3, stride=2, padding=1))
                reduction *= 2
            stages[f"conv{number}"] = block
            channels = block_widths[-1]
            info.append({"num_chs": channels, "reduction": reduction, "stage": f"conv{number}"})
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        super().__init__(stages, {"pool": pool}, info, channels, channels, num_classes, in_chans, drop_rate)


def _block(channels: int, widths: Sequence[int], kernel_size: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the first has the kernel, the others are 1×1. No convolution has a bias."""
    block = nn.Sequential()
    for i, width in enumerate(widths):
        block.append(ConvNormAct(channels, width, kernel_size if i == 0 else 1))
        channels = width
    return block


# ------------------------------------------------------------------------------------------- published checkpoints

_CONVOLUTION = re.compile(r"_feature_blocks\.\d+\.Block(\d+)_ConvB(\d+)\.layers\.(Conv|BatchNorm)\.(\w+)")
_CLASSIFIER = re.compile(r"_feature_blocks\.\d+\.Classifier\.(weight|bias)")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the published implementation under our names.

    Files of PyTorch 0.2 have no ``num_batches_tracked``; it becomes 0.

    Raises:
        ValueError: a name that the published network does not have.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _CONVOLUTION.fullmatch(name):
            block, unit, kind, field = match.groups()
            prefix = f"stages.conv{block}.{int(unit) - 1}.{'conv' if kind == 'Conv' else 'bn'}"
            ours[f"{prefix}.{field}"] = tensor
            if field == "running_mean":
                ours.setdefault(f"{prefix}.num_batches_tracked", torch.tensor(0))
        elif match := _CLASSIFIER.fullmatch(name):
            ours[f"head.classifier.{match[1]}"] = tensor
        else:
            raise ValueError(f"{name!r} is no parameter of the published Network in Network.")
    return ours


def architecture_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments that fit a state dict under our names (``pool_conv3`` leaves no trace in one)."""
    weights = {name: t for name, t in state.items() if re.fullmatch(r"stages\.conv\d+\.\d+\.conv\.weight", name)}
    blocks = [int(name.split(".")[1].removeprefix("conv")) for name in weights]
    depths = [blocks.count(number) for number in range(1, max(blocks) + 1)]
    classifier = state.get("head.classifier.weight")
    return {
        "num_classes": 0 if classifier is None else classifier.shape[0],
        "in_chans": weights["stages.conv1.0.conv.weight"].shape[1],
        "depths": depths,
        "widths": [weights[f"stages.conv1.{i}.conv.weight"].shape[0] for i in range(depths[0])],
    }


# --------------------------------------------------------------------------------------------------- registered sizes


def _cfg() -> PretrainedCfg:
    """Input and normalisation of the published CIFAR experiments."""
    return PretrainedCfg(
        url="",
        num_classes=4,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        first_conv="stages.conv1.0.conv",
        classifier="head.classifier",
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg() for name in ("nin_cifar", "nin_cifar_3", "nin_cifar_5", "nin_cifar_tiny")}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> NetworkInNetwork:
    return build_model_with_cfg(
        NetworkInNetwork, variant, pretrained, feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2)}, **kwargs
    )


@register_model
def nin_cifar(pretrained: bool = False, **kwargs: Any) -> NetworkInNetwork:
    """Four blocks, 1.41 million parameters: the released CIFAR-10 network."""
    return _create("nin_cifar", pretrained, **kwargs)


@register_model
def nin_cifar_3(pretrained: bool = False, **kwargs: Any) -> NetworkInNetwork:
    """Three blocks, 1.00 million parameters."""
    return _create("nin_cifar_3", pretrained, **{"depths": (3, 3, 3), **kwargs})


@register_model
def nin_cifar_5(pretrained: bool = False, **kwargs: Any) -> NetworkInNetwork:
    """Five blocks, 1.82 million parameters."""
    return _create("nin_cifar_5", pretrained, **{"depths": (3, 3, 3, 3, 3), **kwargs})


@register_model
def nin_cifar_tiny(pretrained: bool = False, **kwargs: Any) -> NetworkInNetwork:
    """Three narrow blocks of 3, 2 and 2 convolutions: what a laptop trains in a minute."""
    return _create("nin_cifar_tiny", pretrained, **{"depths": (3, 2, 2), "widths": (32, 24, 16), **kwargs})


def _read(found: Checkpoint, pool_conv3: bool = False) -> nn.Module:
    """The network.

    Args:
        found: the file.
        pool_conv3: it was trained with a pool after block 3, which leaves no trace in the file.
    """
    ours = from_official(found.state)
    network = create_timm("nin_cifar", **architecture_of(ours), pool_conv3=pool_conv3)
    load_into(network, found, "the Network in Network", from_official)
    return network


PUBLISHED = Published(of="rotnet", marks=r"_ConvB\d", make=_read)
