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

from isthmus.codec import UserError, build, create_timm, load_weights, save_weights, spec_of, write_atomically
from isthmus.codec.checkpoints import Checkpoint, read_checkpoint, suited
from isthmus.codec.files import misfit, read_object
from isthmus.codec.published import Published
from isthmus.codec.timm_models import headless
from isthmus.objectives.spark import SparK, backbone_from_official, backbone_to_official, from_official, to_official

#: Encoders of which there are published checkpoints (and convnext_tiny, whose counts are published).
ENCODERS = (
    *("resnet50", "resnet101", "resnet152", "resnet200"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
)
_PREFIX = "encoder.model."


# ----------------------------------------------------------------------------------------------------------- ours


def write(weights: Path, objective: SparK, size: int) -> None:
    """Weights, and a JSON beside them from which ``load_pretrained`` rebuilds the modules."""
    save_weights(objective, weights)
    description = {"format": "isthmus-spark", "version": 1, "size": size, "objective": spec_of(objective)}
    write_atomically(weights.with_suffix(".json"), json.dumps(description, indent=1).encode())


def load_pretrained(folder: Path) -> tuple[SparK, int]:
    """The objective that a run (or ``convert``) left, and the image size it was trained at.

    Raises:
        UserError: the folder holds no SparK run, or a file of it is damaged.
    """
    description = read_object(folder / "spark.json", "the folder of a finished spark run")
    if description.get("format") != "isthmus-spark":
        raise UserError(f"{folder / 'spark.json'} is not of a spark run.")
    objective = build(description["objective"])
    load_weights(objective, folder / "spark.safetensors")
    return objective.eval(), int(description["size"])


# ------------------------------------------------------------------------------------------------------ published


def in_our_names(found: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published file in our names, and its ``config`` (empty for backbone files).

    Backbone files come out in timm's names, ``withdecoder`` files in those of :class:`isthmus.objectives.spark.SparK`.
    """
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
    found = read_checkpoint(path)
    state = found.state if path.suffix == ".safetensors" else in_our_names(found)[0]
    load_backbone(model, backbone_of(state), path)


def published_form(found: Checkpoint) -> dict[str, Any]:
    """Weights of ours, with the JSON beside them where there is a decoder, in the published form.

    Raises:
        UserError: the JSON cannot be read.
    """
    state = found.state
    if not any(name.startswith("decoder.") for name in state):
        return dict(backbone_to_official(state))
    described = found.path.with_suffix(".json")
    kept = found.path.with_name("saved.json")  # of a run
    described = described if described.is_file() or not kept.is_file() else kept
    description = read_object(described, f"the file that tells how {found.path.name} was made, beside it")
    size = int(description["inputs"]["size"][0] if described is kept else description["size"])
    made, mean, std = description["model" if described is kept else "objective"], state["mean"], state["std"]
    module: dict[str, Any] = dict(to_official(state))
    module |= {"imn_m": mean, "imn_s": std, "norm_black": torch.zeros(1, 3, size, size).sub(mean).div(std)}
    module["config"] = {
        "mask_ratio": made["kwargs"].get("ratio", 0.6),
        "densify_norm_str": "bn" if "decoder.densify.norms.0.running_mean" in state else "ln",
        "sbn": False,
        "hierarchy": sum(name.startswith("decoder.densify.mask_tokens.") for name in state),
        "sparse_encoder.input_size": size,
        "dense_decoder.width": state["decoder.blocks.0.up_sample.weight"].shape[0],
    }
    return {"module": module}


def _tells(name: str) -> bool:
    """Whether a tensor tells the architecture: no head, no counter that old files lack."""
    return not _is_head(name) and not name.endswith("num_batches_tracked")


def _is_head(name: str) -> bool:
    """Whether a tensor of a timm model belongs to its head (ConvNeXt's final norm included)."""
    return re.match(r"(fc|head|classifier)\b", name) is not None


def _read(found: Checkpoint, encoder: str = "") -> nn.Module | dict[str, Any]:
    """An encoder for timm without a head, encoder and decoder, or, from a file of ours, the published form.

    Args:
        found: ``*_1kpretrained_timm_style.pth``, ``*_official_style.pth``, ``*_withdecoder_*_spark_style.pth``, or a
            ``.safetensors`` file of ours, for which ``--out FILE.pth`` is wanted.
        encoder: its timm name, where the shapes do not tell (they do for the published ones).
    """
    if found.path.suffix == ".safetensors":
        return published_form(found)
    state, made = in_our_names(found)
    backbone = backbone_of(state)
    model: Any = create_timm(encoder or guess_encoder(backbone, found.path))
    load_backbone(model, backbone, found.path)
    if backbone is state:
        return headless(model)
    scales = sum("mask_tokens" in name for name in state)
    pyramid = {"model": spec_of(model), "reductions": [32 >> k for k in reversed(range(scales))]}
    trunk: Any = build({"target": "isthmus:Backbone", "kwargs": pyramid})
    trunk.model.load_state_dict(model.state_dict())
    norm = "batch" if "decoder.densify.norms.0.running_mean" in state else "layer"
    width = state["decoder.blocks.0.up_sample.weight"].shape[0]
    info = [list(level) for level in trunk.feature_info]
    decoder = build({"target": "isthmus:SparKUNet", "kwargs": {"feature_info": info, "width": width, "norm": norm}})
    objective = SparK(trunk, decoder, float(made.get("mask_ratio", 0.6)))
    own = objective.decoder.state_dict()
    given = suited({n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")}, own)
    if wrong := misfit(given, own):
        raise UserError(f"{found.path} has another decoder than the published one: {wrong}.")
    objective.decoder.load_state_dict(given)
    return objective


def _write(made: Any, found: Checkpoint, out: Path) -> Path:
    if isinstance(made, SparK):
        write(out, made, int(found.metadata.get("config", {}).get("sparse_encoder.input_size", 224)))
    elif isinstance(made, dict):
        stream = io.BytesIO()
        torch.save(made, stream)
        write_atomically(out, stream.getvalue())
    else:
        save_weights(made, out)
    return out


PUBLISHED = Published(of="spark", marks=r"", make=_read, write=_write)
