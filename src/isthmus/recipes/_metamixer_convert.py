"""The published checkpoints of MetaMixer (ysj9909/FFNet): classification, dense prediction, segmentation, enlarging."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.codec import Codec, UserError, create_timm
from isthmus.decoders import metamixer_head, metamixer_sr
from isthmus.decoders.metamixer_head import MetaMixerHead
from isthmus.decoders.metamixer_sr import MetaMixerSR
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.metamixer import convert_official
from isthmus.encoders.images.pixels import Pixels
from isthmus.recipes import _image_classification as shared


def convert_checkpoint(path: Path, out: Path) -> Path:
    """Networks of images become safetensors for timm; the segmentation system and the enlarger become a folder.

    The folder is ``out`` without its suffix, for ``Codec.from_pretrained``.

    Raises:
        UserError: no checkpoint of a published size.
    """
    official = shared.read_checkpoint(path, "FFNet")
    if "conv_bef_up.weight" in official:
        return _enlarger(official, path).save_pretrained(out.with_suffix(""))
    dense = any(key.endswith("norm0.weight") for key in official)  # beneath the decoder of another system
    if not dense and any(key.startswith("decode_head.") for key in official):
        return _segmenter(official, path).save_pretrained(out.with_suffix(""))
    state = convert_official(official)
    head = state.get("head.fc.weight")
    arguments: dict[str, Any] = {"num_classes": 0 if head is None else len(head)}
    if "stem.0.conv.bias" in state:
        arguments["deploy"] = True
    if "norms.0.weight" in state:
        arguments["norm_features"] = True
    names = [f"metamixer_ffnet_{size}" for size in ("1", "2", "3", "4")]
    if "stem.5.conv.weight" in state:
        names = ["metamixer_ffnet_seg"]
    return shared.convert_for_timm(state, path, out, dict.fromkeys(names, arguments))


def _enlarger(official: Mapping[str, Tensor], path: Path) -> Codec:
    """Sizes are read off the shapes."""
    dim, channels = official["proj.weight"].shape[:2]
    blocks = [int(key.split(".")[1]) for key in official if key.startswith("body.")]
    norm = "batch" if "body.0.token_mixer.1.running_mean" in official else None
    if official.get("body.0.token_mixer.0.weight", official["proj.weight"]).ndim == 1:
        norm = "layer"
    state = metamixer_sr.convert_official(official)
    hidden = state.get("blocks.0.channel_mixer.main.key.weight", official["proj.weight"])
    scale = round((len(official["conv_bef_up.weight"]) / channels) ** 0.5)
    model = MetaMixerSR(scale, dim, max(blocks, default=-1) + 1, len(hidden) / dim, norm, channels)
    _load(model, state, path)
    return Codec(Pixels(channels), decoder=model)


def _segmenter(official: Mapping[str, Tensor], path: Path) -> Codec:
    encoder = Backbone(create_timm("metamixer_ffnet_seg", num_classes=0), reductions=(8, 16, 32))
    _load(encoder.model, convert_official(official), path)
    state = metamixer_head.convert_official(official)
    classes = len(state.get("classifier.weight", ()))
    decoder = MetaMixerHead([level.channels for level in encoder.feature_info], max(1, classes))
    _load(decoder, state, path)
    return Codec(encoder, decoder=decoder)


def _load(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if wanted != {key: tuple(tensor.shape) for key, tensor in state.items()}:
        told = f"{len(state)} tensors of other names or sizes than the {len(wanted)}"
        raise UserError(f"{path} fits no published {type(model).__name__}: it has {told} of that network.")
    model.load_state_dict(dict(state))
