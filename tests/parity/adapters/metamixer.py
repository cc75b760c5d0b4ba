"""24-metamixer: the image network, its dense backbone, the segmentation system, super-resolution, forecasting."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from isthmus.decoders import metamixer_head, metamixer_sr
from isthmus.decoders.metamixer_head import MetaMixerHead
from isthmus.decoders.metamixer_sr import MetaMixerSR
from isthmus.encoders.images import metamixer
from isthmus.encoders.images.metamixer import FFNet, FFNetSeg
from isthmus.encoders.signals import metamixer_forecaster
from isthmus.encoders.signals.metamixer_forecaster import MetaMixerForecaster
from isthmus.objectives.super_resolution import fft_loss
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "FFNet":
        return _image_network(case)
    if case.object == "FFNet dense-prediction backbone":
        return _pyramid(case)
    if case.object == "FastForwardNetwork + FFNetHead":
        return _segmentation(case)
    if case.object == "FFNetSR, FFTLoss, FFNet (time series)":
        return _enlarged(case) | _forecasts(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Parameters of the registered sizes, trained and merged, of the segmentation system, of super-resolution."""
    config = entry["config"]
    with torch.device("meta"):
        if "system" in name:
            backbone = FFNetSeg(**_sizes(config["backbone"]), num_classes=0)
            return {"params": _parameters(backbone) + _parameters(_head(config["head"]))}
        if name.startswith("ffnet_seg"):
            return {"params": _parameters(timm.create_model("metamixer_ffnet_seg"))}
        if name.startswith("ffnet_sr"):
            return {"params": _parameters(_enlarger(config))}
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
    backbone.load_state_dict(metamixer.convert_official(case.params))
    head = _head(case.config["head"])
    head.load_state_dict(metamixer_head.convert_official(case.params))
    levels: Any = backbone.eval().forward_intermediates(case.inputs["x"], [1, 2, 3], intermediates_only=True)
    found = {f"stage{i}": level for i, level in enumerate(levels, start=2)}
    return found | {"seg_logits": head.eval()(levels)}


def _part(case: Case, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in case.params.items() if k.startswith(prefix)}


def _enlarger(config: dict[str, Any]) -> MetaMixerSR:
    norm = {None: None, "LN": "layer", "BN": "batch"}[config["norm"]]
    return MetaMixerSR(config["scale"], config["dim"], config["depth"], config["expansion_ratio"], norm)


@torch.no_grad()
def _enlarged(case: Case) -> dict[str, Tensor]:
    """Enlarged images, and the spectral loss of each with the weight 0.1 that the published class has by default."""
    found = {}
    for i, config in enumerate(case.config["sr"]):
        model = _enlarger(config)
        model.load_state_dict(metamixer_sr.convert_official(_part(case, f"sr{i}.")))
        large = model.eval()([case.inputs[f"sr{i}.x"]])
        found[f"sr{i}.y"] = large
        found[f"sr{i}.fft_loss"] = 0.1 * fft_loss(large, case.inputs[f"sr{i}.target"])[None]
    return found


@torch.no_grad()
def _forecasts(case: Case) -> dict[str, Tensor]:
    found = {}
    for i, config in enumerate(case.config["ts"]):
        count = len(config["num_blocks"])
        if config.get("use_multi_scale") or config["dims"][count - 1] != config["dims"][-1]:
            raise UnknownCase(f"{case.object} with fusion of scales")
        model = MetaMixerForecaster(
            config["nvars"],
            config["seq_len"],
            config["target_window"],
            individual=config.get("individual", False),
            affine=config.get("affine", True),
            subtract_last=config.get("subtract_last", False),
            dims=config["dims"][:count],
            depths=config["num_blocks"],
            kernels=config["large_size"],
            small_kernels=config["small_size"],
            patch=config["patch_size"],
            stride=config["patch_stride"],
            downsample=config["downsample_ratio"],
            ratio=config["ffn_ratio"],
        )
        model.load_state_dict(metamixer_forecaster.convert_official(_part(case, f"ts{i}.")))
        found[f"ts{i}.y"] = model.eval()(case.inputs[f"ts{i}.x"])
    return found
