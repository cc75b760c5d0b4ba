"""24-metamixer: the image network, its dense backbone, the segmentation system, super-resolution, forecasting."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from isthmus.decoders import metamixer_head
from isthmus.decoders.metamixer_head import MetaMixerHead
from isthmus.encoders import metamixer
from isthmus.encoders.metamixer import FFNet, FFNetSeg
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "FFNet":
        return _image_network(case)
    if case.object == "FFNet dense-prediction backbone":
        return _pyramid(case)
    if case.object == "FastForwardNetwork + FFNetHead":
        return _segmentation(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Parameters of the registered sizes, trained and merged, of the segmentation system, of super-resolution."""
    config = entry["config"]
    with torch.device("meta"):
        if "system" in name:
            backbone = FFNetSeg(**_sizes(config["backbone"]), num_classes=0)
            backbone.head = nn.Identity()
            return {"params": _parameters(backbone) + _parameters(_head(config["head"]))}
        if name.startswith("ffnet_seg"):
            return {"params": _parameters(timm.create_model("metamixer_ffnet_seg"))}
    model: Any = timm.create_model(f"metamixer_{name}")
    counted = {"params": _parameters(model)}
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(0.1)  # looks trained, so that merging does not warn
    model.reparameterize()
    return counted | {"params_fused": _parameters(model)}


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The published arguments under our names."""
    names = {
        "depth": "depths",
        "embed_dim": "dims",
        "in_dim": "stem_width",
        "kernel_sizes": "kernels",
        "kernel_sizes1": "key_kernels",
        "kernel_sizes2": "value_kernels",
        "expansion_ratios": "mlp_ratios",
        "use_ses": "squeeze_excite",
    }
    found = {ours: config[name] for name, ours in names.items() if name in config}
    found["layer_scale"] = config.get("layer_scale_init_value", 1e-5) if config.get("use_layer_scale") else None
    count = len(config["depth"])
    return {"mlp_ratios": [3] * count, **found}


def _image_arguments(config: dict[str, Any]) -> dict[str, Any]:
    acts = ["gelu" if gelu else "relu" for gelu in config.get("use_gelus", [True] * len(config["depth"]))]
    return {**_sizes(config), "activations": acts, "tail_norm": "layer" if config.get("layer_norm_last") else "batch"}


@torch.no_grad()
def _image_network(case: Case) -> dict[str, Tensor]:
    """Stem, stages and logits; then merged: logits, and kernels under the official names."""
    model = FFNet(**_image_arguments(case.config), num_classes=case.config["num_classes"])
    model.load_state_dict(metamixer.convert_official(case.params))
    model.eval()
    x = case.inputs["x"]
    _, levels = model.forward_intermediates(x)
    found = {f"stage{i}": level for i, level in enumerate(levels, start=1)}
    found |= {"patch_embed": model.stem(x), "logits": model(x)}
    model.reparameterize()
    state = model.state_dict()
    merged = {k.removeprefix("fused/"): v for k, v in case.expected.items() if k.startswith("fused/")}
    names = dict(zip(metamixer.convert_official(merged), merged, strict=True))
    found |= {f"fused/{official}": state[ours] for ours, official in names.items()}
    return found | {"logits_fused": model(x)}


@torch.no_grad()
def _pyramid(case: Case) -> dict[str, Tensor]:
    model = FFNet(**_image_arguments(case.config), num_classes=0, norm_features=True)
    model.load_state_dict(metamixer.convert_official(case.params))
    levels: Any = model.eval().forward_intermediates(case.inputs["x"], intermediates_only=True)
    return {f"pyramid{i}": level for i, level in enumerate(levels)}


def _head(config: dict[str, Any]) -> MetaMixerHead:
    return MetaMixerHead(
        config["in_channels"],
        config["num_classes"],
        width=config["head_width"],
        depth=config["head_depth"],
        token_kernel=config["spatial_ks"],
        channel_kernel=config["channel_ks"],
        ratio=config["expansion_ratio"],
        final_ratio=config["final_expansion_ratio"] or 0,
    )


@torch.no_grad()
def _segmentation(case: Case) -> dict[str, Tensor]:
    config = case.config["backbone"]
    backbone = FFNetSeg(**{"kernels": [3] * len(config["depth"]), **_sizes(config)}, num_classes=0)
    backbone.head = nn.Identity()
    backbone.load_state_dict(metamixer.convert_official(case.params))
    head = _head(case.config["head"])
    head.load_state_dict(metamixer_head.convert_official(case.params))
    levels: Any = backbone.eval().forward_intermediates(case.inputs["x"], [1, 2, 3], intermediates_only=True)
    found = {f"stage{i}": level for i, level in enumerate(levels, start=2)}
    return found | {"seg_logits": head.eval()(levels)}
