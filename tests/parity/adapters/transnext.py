"""09-transnext: classifier and dense backbone, both ways to bring the position bias to another size."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from isthmus.encoders.images.transnext import TransNeXt, convert_official
from tests.parity.case import Case, UnknownCase

_SAME = ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "patch_size", "fixed_pool_size")


@torch.no_grad()
def outputs(case: Case) -> dict[str, Tensor]:
    if not case.object.startswith("TransNeXt"):
        raise UnknownCase(case.object)
    config = case.config
    dense = "dense" in case.object
    model = TransNeXt(
        **{key: config[key] for key in _SAME if key in config},
        window_size=config["window_size"],
        pretrain_size=config.get("pretrain_size", config["img_size"]),
        img_size=config["img_size"],
        bias_mode="interpolate" if dense and not config.get("is_extrapolation", False) else "extrapolate",
        num_classes=config.get("num_classes", 0),
    ).eval()
    model.load_state_dict(convert_official(case.params))
    last, levels = model.forward_intermediates(case.inputs["x"])
    assert isinstance(last, Tensor)
    assert isinstance(levels, list)
    found = {f"stage{i}": level for i, level in enumerate(levels, start=1)}
    return found if dense else {**found, "logits": model.forward_head(last)}


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Parameters of the registered size, whose settings are those that the entry states."""
    with torch.device("meta"):
        model = timm.create_model(name.lower())
        stated = {k: v for k, v in entry["config"].items() if k != "img_size"}
        same = TransNeXt(**stated, pretrain_size=entry["config"]["img_size"])
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in same.state_dict().items()}
    assert (model.sr_ratios, model.pretrain_size) == (same.sr_ratios, same.pretrain_size)
    return {"params": sum(p.numel() for p in model.parameters())}
