"""A timm model with weights from a file that a person has, whatever wrote it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.codec import UserError, create_timm
from isthmus.codec.checkpoints import Checkpoint, load_into, read_checkpoint, suited


def trained(
    name: str,
    checkpoint: str | Path,
    *,
    ema: bool = False,
    log: Callable[[str], None] | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """``create_timm(name)`` with the weights of ``checkpoint``, in evaluation mode.

    Published names are turned to timm's by the architecture's own ``checkpoint_filter_fn``, and the number of classes
    is read off the file unless it is given.

    Args:
        name: of the timm model.
        checkpoint: see :func:`isthmus.codec.checkpoints.read_checkpoint`.
        ema: take the moving average of the weights.
        log: is told what was taken of the file.
        timm_kwargs: of the model.

    Raises:
        UserError: there is no such file or model, it cannot be read safely, or a tensor has another name or shape.
    """
    if Path(checkpoint).suffix in (".npz", ".npy"):
        return _of_numpy(name, Path(checkpoint), timm_kwargs)
    found = read_checkpoint(checkpoint, ema)
    if log is not None:
        log(found.told)
    model = create_timm(name, **timm_kwargs)
    rename = _renaming(model, found)
    if "num_classes" not in timm_kwargs and (classes := _classes(model, found.state, rename)) is not None:
        model = create_timm(name, **timm_kwargs, num_classes=classes)
    load_into(model, found, name, _renaming(model, found))
    return model.eval()


def num_outputs(network: nn.Module, name: str, size: int) -> int:
    """How many classes a network tells apart.

    Args:
        network: images to logits ``(B, K)``; on any device, the meta device too.
        name: for the message.
        size: pixels a side.

    Raises:
        UserError: it does not take pictures of ``size`` × ``size`` pixels.
    """
    mode = network.training
    like = next(network.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            return network.eval()(torch.zeros(1, 3, size, size, device=like.device)).shape[-1]
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name} does not take pictures of {size}×{size} pixels ({reason}); give --size.") from error
    finally:
        network.train(mode)


def _of_numpy(name: str, path: Path, timm_kwargs: dict[str, Any]) -> nn.Module:
    """Archives of NumPy are published for some transformers; timm's models of these read them themselves."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            head = next((archive[key] for key in archive.files if key.endswith("head/kernel")), None)
    except Exception as error:
        raise UserError(f"{path} is no archive of NumPy that can be read ({type(error).__name__}).") from error
    found = {} if head is None or "num_classes" in timm_kwargs else {"num_classes": head.shape[-1]}
    model: Any = create_timm(name, **timm_kwargs, **found)
    if not hasattr(model, "load_pretrained"):
        raise UserError(f"{name} reads no archives of NumPy; give a safetensors file or one of torch.save.")
    try:
        model.load_pretrained(str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path} does not fit {name}: {reason}.") from error
    return model.eval()


def _renaming(model: nn.Module, found: Checkpoint) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """timm's own mapping of published names; files that it cannot map stay as they are."""
    mapping = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)

    def rename(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if mapping is None:
            return state
        try:
            return dict(mapping(dict(state), model))
        except UserError:
            raise
        except ValueError as error:  # a mapping of ours says what is wrong
            raise UserError(f"{found.path}: {error}") from error
        except Exception:  # made for published files, mappings of timm index what others do not have
            return state

    return rename


def _classes(
    model: nn.Module, state: Mapping[str, Tensor], rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> int | None:
    """Rows of the classifier in the file; ``None`` where timm does not tell its name."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not isinstance(name, str):
        return None
    wanted = model.state_dict()
    state = suited(state, wanted)
    if state.keys() != wanted.keys():
        state = rename(state)
    weight = state.get(f"{name}.weight")
    return None if weight is None else len(weight)


def pretrained(name: str, **timm_kwargs: Any) -> nn.Module:
    """``create_timm(name)`` with timm's own weights, in evaluation mode.

    Raises:
        UserError: there is no such model, or its weights cannot be had here.
    """
    try:
        return create_timm(name, pretrained=True, **timm_kwargs).eval()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"timm's weights of {name} cannot be had here ({reason}); give --checkpoint FILE.") from error
