"""AlexNet as RotNet trained it on ImageNet (arXiv 1803.07728, section 3.2): batch norm, no dropout, no groups."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from isthmus.bounds import checked
from isthmus.codec import create_timm
from isthmus.codec.checkpoints import Checkpoint, load_into
from isthmus.codec.published import Published
from isthmus.encoders.images.stages import NamedStages

__all__ = ["AlexNet", "architecture_of", "from_official"]


@checked
class AlexNet(NamedStages):
    """Five convolutions with bias, batch norm and ReLU, three max pools, two wide linear layers and a classifier.

    Stages ``conv1 pool1 conv2 pool2 conv3 conv4 conv5 pool5 fc_block classifier`` can be read by name.

    Args:
        num_classes: outputs, 4 rotations by default; 0 leaves the classifier out.
        in_chans: channels of the input.
        widths: channels of the five convolutions and of the two linear layers.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: ``widths`` are not six numbers.
    """

    GRID = 6  # cells a side of pool5 at 224 pixels; other input sizes are averaged to it

    def __init__(
        self,
        num_classes: int = 4,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 192, 384, 256, 256, 4096),
        drop_rate: float = 0.0,
    ) -> None:
        if len(widths) != 6:
            raise ValueError(f"widths are five convolutions and the linear layers, six numbers; got {tuple(widths)}.")
        w1, w2, w3, w4, w5, hidden = widths
        stages: dict[str, nn.Module] = {
            "conv1": ConvNormAct(in_chans, w1, 11, stride=4, padding=2, bias=True),
            "pool1": nn.MaxPool2d(3, stride=2),
            "conv2": ConvNormAct(w1, w2, 5, padding=2, bias=True),
            "pool2": nn.MaxPool2d(3, stride=2),
            "conv3": ConvNormAct(w2, w3, 3, padding=1, bias=True),
            "conv4": ConvNormAct(w3, w4, 3, padding=1, bias=True),
            "conv5": ConvNormAct(w4, w5, 3, padding=1, bias=True),
            "pool5": nn.MaxPool2d(3, stride=2),
        }
        reductions = {"conv1": (w1, 4), "conv2": (w2, 8), "conv3": (w3, 16), "conv4": (w4, 16), "conv5": (w5, 16)}
        info = [
            {"num_chs": channels, "reduction": reduction, "stage": stage}
            for stage, (channels, reduction) in {**reductions, "pool5": (w5, 32)}.items()
        ]
        fc_block = nn.Sequential(
            nn.AdaptiveAvgPool2d(self.GRID),
            nn.Flatten(),
            nn.Linear(w5 * self.GRID**2, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
        )
        super().__init__(stages, {"fc_block": fc_block}, info, w5, hidden, num_classes, in_chans, drop_rate)


# ------------------------------------------------------------------------------------------- published checkpoints

_STAGES = {"0": "conv1", "2": "conv2", "4": "conv3", "5": "conv4", "6": "conv5"}
_LINEAR = {"1": "2", "2": "3", "4": "5", "5": "6"}  # their fc_block has no pooling in front
_NAME = re.compile(r"_feature_blocks\.(\d+)\.(\d+)\.(\w+)")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the published implementation under our names.

    Files of PyTorch 0.2 have no ``num_batches_tracked``; it becomes 0.

    Raises:
        ValueError: a name that the published network does not have.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _NAME.fullmatch(name)
        block, layer, field = match.groups() if match else ("", "", "")
        if block in _STAGES and layer in ("0", "1"):
            prefix = f"stages.{_STAGES[block]}.{'conv' if layer == '0' else 'bn'}"
        elif block == "8" and layer in _LINEAR:
            prefix = f"head.fc_block.{_LINEAR[layer]}"
        elif (block, layer) == ("9", "0"):
            prefix = "head.classifier"
        else:
            raise ValueError(f"{name!r} is no parameter of the published AlexNet.")
        ours[f"{prefix}.{field}"] = tensor
        if field == "running_mean":
            ours.setdefault(f"{prefix}.num_batches_tracked", torch.tensor(0))
    return ours


def architecture_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments that fit a state dict under our names."""
    classifier = state.get("head.classifier.weight")
    convolutions = [state[f"stages.conv{i}.conv.weight"] for i in range(1, 6)]
    return {
        "num_classes": 0 if classifier is None else classifier.shape[0],
        "in_chans": convolutions[0].shape[1],
        "widths": [*(weight.shape[0] for weight in convolutions), state["head.fc_block.5.weight"].shape[0]],
    }


# --------------------------------------------------------------------------------------------------- registered sizes

default_cfgs = generate_default_cfgs(
    {
        "rotnet_alexnet.untrained": {
            "url": "",
            "num_classes": 4,
            "input_size": (3, 224, 224),
            "pool_size": (6, 6),
            "crop_pct": 224 / 256,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stages.conv1.conv",
            "classifier": "head.classifier",
        }
    }
)


@register_model
def rotnet_alexnet(pretrained: bool = False, **kwargs: Any) -> AlexNet:
    """57.0 million parameters, nearly all in the two linear layers; 224-pixel input."""
    return build_model_with_cfg(
        AlexNet, "rotnet_alexnet", pretrained, feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 4)}, **kwargs
    )


def _read(found: Checkpoint) -> nn.Module:
    network = create_timm("rotnet_alexnet", **architecture_of(from_official(found.state)))
    load_into(network, found, "AlexNet", from_official)
    return network


PUBLISHED = Published(of="rotnet", marks=r"^_feature_blocks\.\d\.\d\.", make=_read)
