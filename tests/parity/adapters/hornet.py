"""32-hornet: the network, the operator with its filters alone, and the neck."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from isthmus.codec import FeatureInfo
from isthmus.decoders import necks
from isthmus.decoders.necks import HorFPN
from isthmus.encoders.images import hornet
from isthmus.encoders.images.hornet import HorNet
from isthmus.layers.gnconv import GlobalLocalFilter, GnConv
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "HorNet":
        return whole_network(case)
    if case.object == "gnconv, GlobalLocalFilter":
        return operators(case)
    if case.object.startswith("GNFPN"):
        return neck(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """The registered size; where the entry describes a size, the one described has to be it."""
    with torch.device("meta"):
        model: Any = timm.create_model(name)
        config = entry.get("config")
        if config:
            filters = dict(zip(config["global_filter_stages"], config["filter_hw"] or (), strict=True))
            sizes: dict[str, Any] = {
                "dims": [config["base_dim"] * 2**i for i in range(4)],
                "filters": [tuple(filters[i]) if i in filters else None for i in range(1, 5)],
            }
            described = HorNet(config["depths"], orders=config["orders"], scales=config["scale"], **sizes)
            shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, described)]
            assert shapes[0] == shapes[1]
            assert all(b.gnconv.scale == config["scale"] for b in model.modules() if hasattr(b, "gnconv"))
    return {"params": sum(p.numel() for p in model.parameters())}


def _gnconv(config: dict[str, Any]) -> dict[str, Any]:
    """Official keywords of the operator (s, gf with h and w, a kernel) in ours."""
    known = {"order", "s", "h", "w", "gf", "kernel_size"}
    if set(config) - known:
        raise UnknownCase(f"gnconv with {sorted(set(config) - known)}")
    filter = (config.get("h", 14), config.get("w", 8)) if config.get("gf") else None
    return {
        "order": config.get("order", 5),
        "scale": config.get("s", 1.0),
        "filter": filter,
        "kernel": config.get("kernel_size", 7),
    }


@torch.no_grad()
def whole_network(case: Case) -> dict[str, Tensor]:
    """Raw stages, logits, and the pyramid through its norms."""
    config, x = case.config, case.inputs["x"]
    stages = [_gnconv(stage) for stage in config["gnconv"]]
    model = HorNet(
        config["depths"],
        [config["base_dim"] * 2**i for i in range(len(stages))],
        [stage["order"] for stage in stages],
        stages[0]["kernel"],
        [stage["scale"] for stage in stages],
        [stage["filter"] for stage in stages],
        in_chans=x.shape[1],
        num_classes=config["num_classes"],
        layer_scale=config["layer_scale_init_value"],
        norm_features="norm0.weight" in case.params,
    )
    model.load_state_dict(hornet.convert_official(case.params))
    model.eval()
    found = {"logits": model(x)}
    found |= {f"pyramid{i}": level for i, level in enumerate(model.forward_intermediates(x, intermediates_only=True))}
    model.norms = None
    levels = model.forward_intermediates(x, intermediates_only=True)
    return found | {f"stage{i}": level for i, level in enumerate(levels, start=1)}


@torch.no_grad()
def operators(case: Case) -> dict[str, Tensor]:
    """Every operator on its input, and its global-local filter alone."""
    found = {}
    for i, entry in enumerate(case.config["ops"]):
        conv = GnConv(entry["dim"], **_gnconv(entry["kw"]))
        conv.load_state_dict({k.removeprefix(f"{i}."): v for k, v in case.params.items() if k.startswith(f"{i}.")})
        found[f"{i}.out"] = conv.eval()(case.inputs[f"{i}.x"])
        if f"{i}.filter_in" in case.inputs:
            assert isinstance(conv.dwconv, GlobalLocalFilter)
            found[f"{i}.filter_out"] = conv.dwconv(case.inputs[f"{i}.filter_in"])
    return found


@torch.no_grad()
def neck(case: Case) -> dict[str, Tensor]:
    """All levels of the neck."""
    config = case.config
    inside = dict(config["gn_conv_cfg"])
    kind = inside.pop("type", "gnconv")
    stored = [tensor.shape for name, tensor in case.params.items() if name.endswith("complex_weight")]
    named = inside.pop("h", 32), inside.pop("w", 17)
    side = (stored[0][1], stored[0][2]) if stored else named
    part = HorFPN(
        [FeatureInfo(channels, 4 * 2**i) for i, channels in enumerate(config["in_channels"])],
        config["out_channels"],
        config["num_outs"],
        order=inside.pop("order", 2),
        kernel=inside.pop("kernel_size", 7),
        filter=side if kind == "gngf" else None,
        ratio=inside.pop("dim_ratio", 1),
        project_out=inside.pop("proj_out", False),
    )
    if inside or kind not in ("gnconv", "gngf"):
        raise UnknownCase(f"{case.object} of {kind} with {sorted(inside)}")
    part.load_state_dict(necks.convert_official(case.params))
    levels = part.eval()([case.inputs[f"level{i}"] for i in range(len(config["in_channels"]))])
    return {f"level{i}": level for i, level in enumerate(levels)}
