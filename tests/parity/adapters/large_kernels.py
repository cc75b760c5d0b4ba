"""16-large-kernels: merges of dilated and small kernels, RepLKNet, and the effective receptive field."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from isthmus.encoders.images import replknet
from isthmus.encoders.images.replknet import RepLKNet
from isthmus.layers.reparam import ReparamConv
from isthmus.lenses.receptive_field import area_ratio, contribution, normalise, receptive_field
from tests.parity.adapters.unireplknet import before_and_after, dilated_branch_merge, image_network, whole_network
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    match case.object:
        case "DilatedReparamBlock.merge_dilated_branches":
            return dilated_branch_merge(case)
        case "ReparamLargeKernelConv.merge_kernel":
            return _small_kernel_merge(case)
        case "UniRepLKNet":
            return whole_network(case)
        case "RepLKNet":
            return _replknet(case)
        case "effective receptive field measurement":
            return _receptive_field(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Parameters of the registered size, and of its merged form where the entry states them."""
    with torch.device("meta"):
        found = {"params": timm.create_model(name.lower())}
        if "params_deploy" in entry:
            found["params_deploy"] = timm.create_model(name.lower(), deploy=True)
    return {key: sum(p.numel() for p in model.parameters()) for key, model in found.items()}


def _small_kernel_merge(case: Case) -> dict[str, Tensor]:
    found = {}
    for i, (large, small, stride) in enumerate(case.config["large_small_stride"]):
        conv = ReparamConv(case.config["channels"], large, [(small, 1)] if small else [], stride)
        state = {k.removeprefix(f"{i}."): v for k, v in case.params.items() if k.startswith(f"{i}.")}
        conv.load_state_dict(replknet.convert_official(state))
        found |= before_and_after(str(i), conv, case.inputs[str(i)])
    return found


@torch.no_grad()
def _replknet(case: Case) -> dict[str, Tensor]:
    config = dict(case.config)
    out_indices = config.get("out_indices") or (0, 1, 2, 3)
    sizes = ("large_kernel_sizes", "layers", "channels", "small_kernel", "dw_ratio", "ffn_ratio", "in_channels")
    kwargs = {("in_chans" if key == "in_channels" else key): config[key] for key in sizes if key in config}
    model = RepLKNet(
        **kwargs,
        num_classes=len(case.params.get("head.weight", ())),
        norm_features=config.get("norm_intermediate_features", False),
    )
    missing, unknown = model.load_state_dict(replknet.convert_official(case.params), strict=False)
    # A pyramid has neither the head's norm nor the head.
    assert not unknown
    assert not [key for key in missing if not key.startswith(("norm.", "head."))]
    model.eval()

    def pyramid() -> list[Tensor]:
        found = model.forward_intermediates(case.inputs["x"], list(out_indices), intermediates_only=True)
        assert isinstance(found, list)
        return found

    x = case.inputs["x"]
    found = {"logits": model(x)} | {f"pyramid{i}": level for i, level in zip(out_indices, pyramid(), strict=True)}
    model.reparameterize()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.stages.modules())
    found["logits_merged"] = model(x)
    return found | {f"pyramid{i}_merged": level for i, level in zip(out_indices, pyramid(), strict=True)}


def _receptive_field(case: Case) -> dict[str, Tensor]:
    model, images = image_network(case), case.inputs["images"]
    found = {f"contribution{i}": contribution(model, image) for i, image in enumerate(images)}
    field = receptive_field(model.train(), images)
    side, ratio = area_ratio(field.map, case.config["thresholds"])
    return found | {
        "mean_contribution": field.map,
        "normalised": normalise(field.map),
        "rectangle_side": side,
        "area_ratio": ratio,
    }
