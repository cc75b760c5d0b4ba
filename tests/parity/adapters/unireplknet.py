"""47-unireplknet: the network, its merged form, one dilated block, and the five modalities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isthmus.encoders.images import as_image, unireplknet
from isthmus.encoders.images.as_image import AudioImage, PointImage, SeriesImage, VideoImage
from isthmus.encoders.images.unireplknet import UniRepLKNet, dilated_reparam_conv
from isthmus.layers.reparam import ReparamConv
from tests.parity.case import Case, UnknownCase


def outputs(case: Case) -> dict[str, Tensor]:
    if case.object == "UniRepLKNet":
        return whole_network(case)
    if case.object.startswith("DilatedReparamBlock"):
        return dilated_branch_merge(case)
    if case.object.startswith("audio path"):
        return _audio(case)
    if case.object.startswith("point cloud"):
        return _points(case)
    if case.object.startswith("video folding"):
        return _video_and_series(case)
    raise UnknownCase(case.object)


def count(name: str, entry: dict[str, Any]) -> dict[str, int]:
    """Parameters of the registered size, and of its merged form."""
    from tests.parity.adapters import large_kernels

    return large_kernels.count(name, entry)


def image_network(case: Case, prefix: str = "", config: dict[str, Any] | None = None, in_chans: int = 3) -> UniRepLKNet:
    """The case's network in eval mode with its parameters, dense norms included where it has them."""
    config = case.config if config is None else config
    state = {k.removeprefix(prefix): v for k, v in case.params.items() if k.startswith(prefix)}
    model = UniRepLKNet(
        config["depths"],
        config["dims"],
        config.get("kernel_sizes"),
        in_chans=config.get("in_chans", in_chans),
        num_classes=len(state["head.weight"]) if "head.weight" in state else 0,
        norm_features="norm0.weight" in state,
    )
    model.load_state_dict(unireplknet.convert_official(state))
    return model.eval()


@torch.no_grad()
def whole_network(case: Case) -> dict[str, Tensor]:
    """Stages, logits, normed pyramid; then merged: state under the official names, and logits."""
    model, x = image_network(case), case.inputs["x"]

    def levels() -> list[Tensor]:
        found = model.forward_intermediates(x, intermediates_only=True)
        assert isinstance(found, list)
        return found

    found = {"logits": model(x)}
    found |= {f"pyramid{i}": level for i, level in enumerate(levels())}
    norms, model.norms = model.norms, None
    found |= {f"stage{i}": level for i, level in enumerate(levels(), start=1)}
    model.reparameterize()
    found["logits_merged"] = model(x)
    state = model.state_dict()
    merged = {k.removeprefix("merged/"): v for k, v in case.expected.items() if k.startswith("merged/")}
    names = dict(zip(unireplknet.convert_official(merged), merged, strict=True))
    assert not merged or names.keys() == state.keys()
    found |= {f"merged/{official}": state[ours].reshape(merged[official].shape) for ours, official in names.items()}
    model.norms = norms
    return found


@torch.no_grad()
def before_and_after(name: str, conv: ReparamConv, x: Tensor) -> dict[str, Tensor]:
    """Output, merged kernel and bias, and output after the merge."""
    conv.eval()
    before = conv(x)
    conv.reparameterize()
    weight, bias = conv.equivalent()
    return {
        f"{name}.before": before,
        f"{name}.merged_weight": weight,
        f"{name}.merged_bias": bias,
        f"{name}.after": conv(x),
    }


def dilated_branch_merge(case: Case) -> dict[str, Tensor]:
    """One block for every kernel size."""
    found = {}
    for kernel in case.config["kernel_sizes"]:
        name = f"k{kernel}"
        conv = dilated_reparam_conv(case.config["channels"], kernel)
        state = {k.removeprefix(f"{name}."): v for k, v in case.params.items() if k.startswith(f"{name}.")}
        conv.load_state_dict(unireplknet.convert_dilated_block(state))
        found |= before_and_after(name, conv, case.inputs[name])
    return found


@torch.no_grad()
def _audio(case: Case) -> dict[str, Tensor]:
    config, wave = case.config, case.inputs["waveform"]
    if config.get("window", "hanning") != "hanning":
        raise UnknownCase(f"{case.object} with the window {config['window']}")
    adapter = AudioImage(
        config["sample_rate"],
        config["num_mel_bins"],
        config["target_length"],
        config["mean"],
        config["std"],
        config.get("frame_length_ms", 25) / 1000,
        config.get("frame_shift_ms", 10) / 1000,
    )
    model = image_network(case, "backbone.", in_chans=1)
    head = nn.Sequential(nn.LayerNorm(config["dims"][-1]), nn.Linear(config["dims"][-1], config["classes"]))
    head.load_state_dict({k.removeprefix("mlp_head."): v for k, v in case.params.items() if k.startswith("mlp_head.")})
    picture = adapter(wave)
    pooled = model.forward_head(model.forward_features(picture), pre_logits=True)
    found = {"fbank": adapter.spectrogram(wave), "model_input": picture}
    return found | {"pooled": pooled, "logits": head(pooled)}


@torch.no_grad()
def _points(case: Case) -> dict[str, Tensor]:
    config, points = case.config, case.inputs["points"]
    if config.get("atten_fusion"):
        raise UnknownCase(f"{case.object} with attention between views")
    adapter = PointImage(
        config["num_views"],
        config["img_size"],
        config["obj_size"],
        config["local_size"],
        config["trans_dim"],
        config["graph_dim"],
    )
    adapter.load_state_dict(as_image.convert_official(case.params))
    adapter.eval()
    found = {"rotated": as_image.rotate_points(points, config["num_views"])}
    return found | {"scattered": adapter.splat(points), "image": adapter(points)}


@torch.no_grad()
def _video_and_series(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    coordinates = config["stations_per_node"] * inputs["stations"].shape[1]
    adapter = SeriesImage(
        config["value_channels"],
        config["seq_len"],
        config["d_model"],
        inputs["time_features"].shape[2],
        coordinates,
    )
    state = {k.removeprefix("embedding."): v for k, v in case.params.items() if k.startswith("embedding.")}
    adapter.load_state_dict(as_image.convert_official(state))
    condition = {"calendar": inputs["time_features"], "stations": inputs["stations"]}
    picture = adapter(inputs["series"], condition)
    return {
        "video_image": VideoImage("raw")(inputs["video"]),
        "embedding": adapter.embed(inputs["series"], condition),
        "series_image": picture,
        "encoded": image_network(case, "encoder.", config["encoder"], in_chans=1).forward_features(picture),
    }
