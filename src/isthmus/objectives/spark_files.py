"""Checkpoint files of SparK on disk: published ones, ours, and timm's, read into the names that modules here have.

The names themselves are mapped in :mod:`isthmus.objectives.spark`.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import UserError, create_timm, write_atomically
from isthmus.codec.checkpoints import read_checkpoint, suited
from isthmus.codec.files import misfit
from isthmus.objectives.spark import backbone_from_official, backbone_to_official, from_official, to_official

#: Encoders of which there are published checkpoints (and convnext_tiny, whose counts are published).
ENCODERS = (
    *("resnet50", "resnet101", "resnet152", "resnet200"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
)
_PREFIX = "encoder.model."


def read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published file in our names, and its ``config`` (empty for backbone files).

    Backbone files come out in timm's names, ``withdecoder`` files in those of :class:`isthmus.objectives.spark.SparK`.

    Raises:
        UserError: see :func:`isthmus.codec.checkpoints.read_checkpoint`.
    """
    found = read_checkpoint(path)
    state = found.state
    if any(name.startswith("mask_tokens.") for name in state):
        return from_official(state), dict(found.metadata.get("config") or {})
    return backbone_from_official(state), {}


def backbone_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's share, in timm's names, of a state with or without a decoder."""
    if any(name.startswith(_PREFIX) for name in state):
        return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    return state


def guess_encoder(backbone: dict[str, Tensor], path: Path) -> str:
    """The published architecture that has these shapes.

    Raises:
        UserError: none has.
    """
    trunk = {name: tensor.shape for name, tensor in backbone.items() if _tells(name)}
    for name in ENCODERS:
        with torch.device("meta"):
            own = {n: t.shape for n, t in create_timm(name).state_dict().items() if _tells(n)}
        if trunk == own:
            return name
    raise UserError(f"the shapes in {path} are of no published SparK encoder; name the timm model with --encoder.")


def load_backbone(model: nn.Module, backbone: dict[str, Tensor], path: Path) -> None:
    """Load all but the head, which published files do not have.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not _is_head(name)}
    trunk = suited({name: tensor for name, tensor in backbone.items() if not _is_head(name)}, own)
    if wrong := misfit(trunk, own):
        raise UserError(f"{path} does not fit {type(model).__name__}: {wrong}.")
    model.load_state_dict(trunk, strict=False)


def start_from(model: nn.Module, path: Path) -> None:
    """Weights for a timm model from a safetensors file of ours or timm's, or from a published checkpoint.

    Raises:
        UserError: the file is missing, damaged, or of another architecture.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} to start from.")
    state = read_checkpoint(path).state if path.suffix == ".safetensors" else read_published(path)[0]
    load_backbone(model, backbone_of(state), path)


def write_published(path: Path, out: Path) -> Path:
    """Weights of ours, with the JSON beside them where there is a decoder, to the published form.

    Raises:
        UserError: the file or its JSON cannot be read.
    """
    state = read_checkpoint(path).state
    if not any(name.startswith("decoder.") for name in state):
        published: dict[str, Any] = dict(backbone_to_official(state))
    else:
        described = path.with_suffix(".json")
        try:
            description = json.loads(described.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{described} cannot be read; it tells how {path.name} was made.") from error
        size, mean, std = int(description["size"]), state["mean"], state["std"]
        module: dict[str, Any] = dict(to_official(state))
        module |= {"imn_m": mean, "imn_s": std, "norm_black": torch.zeros(1, 3, size, size).sub(mean).div(std)}
        module["config"] = {
            "mask_ratio": description["objective"]["kwargs"].get("ratio", 0.6),
            "densify_norm_str": "bn" if "decoder.densify.norms.0.running_mean" in state else "ln",
            "sbn": False,
            "hierarchy": sum(name.startswith("decoder.densify.mask_tokens.") for name in state),
            "sparse_encoder.input_size": size,
            "dense_decoder.width": state["decoder.blocks.0.up_sample.weight"].shape[0],
        }
        published = {"module": module}
    stream = io.BytesIO()
    torch.save(published, stream)
    write_atomically(out, stream.getvalue())
    return out


def _tells(name: str) -> bool:
    """Whether a tensor tells the architecture: no head, no counter that old files lack."""
    return not _is_head(name) and not name.endswith("num_batches_tracked")


def _is_head(name: str) -> bool:
    """Whether a tensor of a timm model belongs to its head (ConvNeXt's final norm included)."""
    return re.match(r"(fc|head|classifier)\b", name) is not None
