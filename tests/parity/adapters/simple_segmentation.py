"""41-simple-segmentation: bodies, up-branch and heads with every width divided, counts of all released networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.decoders.ffnet_head import FFNetClassifier, FFNetHead, released
from isthmus.decoders.ffnet_head import convert_official as head_from_official
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.ffnet import FFNet, convert_official
from tests.parity.case import Case, UnknownCase

_LEVELS = (4, 8, 16, 32)


def outputs(case: Case) -> dict[str, Tensor]:
    config = case.config
    bodies = {"ResNet": "resnet", "ResNetS": "slim", "ResNetNarrow": "narrow"}
    if case.object != "FFNet" or config["backbone"] not in bodies:
        raise UnknownCase(case.object)
    body: Any = bodies[config["backbone"]]
    encoder = FFNet(
        body,
        config["layers"],
        config["branch_chans"],
        config["stem"][:2] if body == "narrow" else config["stem"],
        stride_first=body != "narrow" and config["strides"][0] == 2,
        bottleneck=config["block"] == "bottleneck",
        pre_down=config["pre_downsampling"],
        num_classes=0,
    ).eval()
    encoder.load_state_dict(convert_official(case.params))
    branch, _, mobile = config["head_type"].partition("_")
    channels, divisor = [level["num_chs"] for level in encoder.feature_info], config["width_divisor"]
    task, _, letter = config["task"].partition("_")
    head: Any
    if task == "classification":
        head = FFNetClassifier(channels, config["num_classes"], branch, bool(mobile), divisor=divisor)
    else:
        head = FFNetHead(channels, config["num_classes"], branch, letter, bool(mobile), divisor)
    head.eval().load_state_dict(head_from_official(case.params))
    counted = sum(p.numel() for part in (encoder, head) for p in part.parameters())
    assert counted == case.meta["official_param_count"]
    with torch.no_grad():
        features = Backbone(encoder)(case.inputs["x"])
        levels = head.branch(features)
        found = {"logits": head(features)}
        if config["pre_downsampling"]:
            found["smoothed"] = encoder.stem.smoothing(case.inputs["x"])
    found |= {f"feat{n}": level for n, level in zip(_LEVELS, features, strict=True)}
    return found | {f"up{n}": level for n, level in zip(_LEVELS, levels, strict=True)}


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    with torch.device("meta"):
        codec = released(name)
    return {"params": sum(p.numel() for p in codec.parameters())}
