"""A timm model with weights from a file that a person has, whatever wrote it; nothing in the file is run as code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import UserError, create_timm

_LEVELS = ("state_dict_ema", "model_ema", "state_dict", "model")


def trained(name: str, checkpoint: str | Path, **timm_kwargs: Any) -> nn.Module:
    """``create_timm(name)`` with the weights of ``checkpoint``, in evaluation mode.

    Safetensors or a PyTorch file; levels such as ``state_dict`` and prefixes such as ``module.`` are looked through,
    published names are turned to timm's by the architecture's own ``checkpoint_filter_fn``, and the number of classes
    is read off the file unless it is given.

    Raises:
        UserError: there is no such file or model, it cannot be read safely, or a tensor has another name or shape.
    """
    state = read_state(checkpoint)
    model = create_timm(name, **timm_kwargs)
    wanted = model.state_dict()
    if not _fits(state, wanted) and (
        rename := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    ):
        state = dict(rename(state, model))
    if "num_classes" not in timm_kwargs and (classes := _classes(model, state)) is not None:
        model = create_timm(name, **timm_kwargs, num_classes=classes)
        wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if missing or extra or shapes:
        told = [f"lacks {missing[0]} (and {len(missing) - 1} more)"] if missing else []
        told += [f"has an unknown {extra[0]} (and {len(extra) - 1} more)"] if extra else []
        told += [f"has {k} of {tuple(state[k].shape)}, the model's is {tuple(wanted[k].shape)}" for k in shapes[:1]]
        raise UserError(f"{checkpoint} does not fit {name}: it " + "; it ".join(told) + ".")
    model.load_state_dict(state)
    return model.eval()


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file by name.

    Raises:
        UserError: no such file, no tensors in it, or it cannot be read without running code.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}.")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is no checkpoint that can be read safely ({type(error).__name__}).") from error
    for level in _LEVELS:
        if isinstance(content, Mapping) and isinstance(content.get(level), Mapping):
            content = content[level]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no network; a checkpoint is a dictionary of tensors.")
    return {str(key).removeprefix("module.").removeprefix("_orig_mod."): tensor for key, tensor in content.items()}


def _fits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return state.keys() == wanted.keys()


def _classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Rows of the classifier in the file; ``None`` where timm does not tell its name."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier")
    weight = state.get(f"{name}.weight") if isinstance(name, str) else None
    return None if weight is None else len(weight)
