"""Weights from a file that a person has, whatever wrote it; nothing in the file is run as code.

A checkpoint is a safetensors file or a file of ``torch.save``: a state dict, alone or among other things such as an
optimiser, arguments and a moving average.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.codec.errors import UserError
from isthmus.codec.files import misfit

#: Entries that hold a network, the likeliest first.
_NETWORKS = (
    *("state_dict", "model", "model_state_dict", "model_state", "module", "network", "net", "params", "weights"),
    *("student", "state"),
)
#: Entries that hold a moving average of one.
_AVERAGES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "params_ema", "ema", "ema_model"),
    "teacher",
)
#: Wrappers of PyTorch and of common training code.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_UNKNOWN = re.compile(r"(?:Unsupported global: GLOBAL|was GLOBAL|global) ([\w.]+)")


@dataclass(frozen=True)
class Checkpoint:
    """What was read of a file.

    Attributes:
        path: the file.
        state: tensors by name, without the prefixes of wrappers.
        taken: the entry that they stood in, ``model`` or ``ema.module``; empty where they stood alone.
        left_out: names of the other entries, and of what is no tensor among the tensors.
        metadata: plain values beside the tensors: arguments, a configuration, the metadata of safetensors.
    """

    path: Path
    state: dict[str, Tensor]
    taken: str
    left_out: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def told(self) -> str:
        """One line for the log: what was taken of the file, and what was left out."""
        taken = f"{self.taken!r} of {self.path}" if self.taken else str(self.path)
        left = [f"{name} (a moving average)" if name.split(".")[-1] in _AVERAGES else name for name in self.left_out]
        if not left:
            return f"took {taken}: {len(self.state)} tensors."
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        return f"took {taken}: {len(self.state)} tensors; left out {', '.join(left[:8])}{more}."


def read_checkpoint(path: str | os.PathLike[str], ema: bool = False) -> Checkpoint:
    """The network in a checkpoint.

    Args:
        path: a safetensors file, or one of ``torch.save``; whatever else a training script put beside the weights is
            read as plain values or left out.
        ema: take the moving average of the weights in place of the weights.

    Raises:
        UserError: there is no such file, it is damaged or unsafe, holds no network, or no moving average.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"{file} is a folder; give a file in it." if file.is_dir() else f"there is no checkpoint {file}."
        )
    with file.open("rb") as stream:
        head = stream.read(9)
    content, metadata = _safetensors(file) if head[8:] == b"{" else (_pickled(file), {})
    try:
        return _taken(file, content, metadata, ema)
    except RecursionError as error:
        raise UserError(f"{file} holds no network: its entries stand in each other without end.") from error


def load_into(model: nn.Module, checkpoint: Checkpoint, name: str = "", rename: _Rename | None = None) -> None:
    """Load a checkpoint into a model.

    Args:
        model: gets the weights.
        checkpoint: of :func:`read_checkpoint`.
        name: of the model, for messages.
        rename: from published names to the model's, used where the names are not the model's.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; the sentence names it.
    """
    wanted = model.state_dict()
    state = suited(checkpoint.state, wanted)
    if rename is not None and state.keys() != wanted.keys():
        state = suited(rename(state), wanted)
    if wrong := misfit(state, wanted):
        others = [entry for entry in checkpoint.left_out if entry.split(".")[-1] in (*_NETWORKS, *_AVERAGES)]
        also = f" ({checkpoint.taken!r} was taken; the file also has {', '.join(others)})" if others else ""
        raise UserError(f"{checkpoint.path} does not fit {name or type(model).__name__}: {wrong}{also}.")
    model.load_state_dict(state)


_Rename = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def suited(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the prefix that the model itself has; counters of batch norm, which old files lack, are filled."""
    found = dict(state)
    for prefix in _PREFIXES:
        if wanted and all(name.startswith(prefix) for name in wanted) and not any(n in wanted for n in found):
            found = {prefix + name: tensor for name, tensor in found.items()}
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked") and name not in found:
            beside = f"{name.rpartition('.')[0]}.running_mean".lstrip(".")
            if beside in found:
                found[name] = torch.zeros_like(tensor)
    return {name: found[name] for name in [*(n for n in wanted if n in found), *(n for n in found if n not in wanted)]}


# ------------------------------------------------------------------------------------------------------------ reading


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(str(path), "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator of its own
            metadata = dict(file.metadata() or {})
        tied = json.loads(metadata.get("tied", "{}"))
        return {**state, **{name: state[other] for name, other in tied.items()}}, metadata
    except Exception as error:  # SafetensorError, OSError, and what damaged metadata brings
        raise UserError(f"{path} is no readable safetensors file; it may be cut short ({_short(error)}).") from error


class _Inert:
    """Stands for an object of a class that is not known here: takes everything and does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str, made: Callable[[], Any] | None = None) -> type:
    """A class in place of one that is not known here; it makes inert objects, or plain dictionaries or lists."""
    if made is None:
        return type(name, (_Inert,), {})
    return type(name, (), {"__new__": lambda _cls, *_args: made()})


def _pickled(path: Path) -> Any:
    """A file of ``torch.save`` through PyTorch's own safe reader; unknown classes get stand-ins."""
    from torch.serialization import safe_globals

    stand_ins = {"collections.defaultdict": _stand_in("defaultdict", collections.OrderedDict)}
    for _ in range(200):
        try:
            with safe_globals([*_plain_classes(), *((kind, name) for name, kind in stand_ins.items())]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zipfile and pickle each have their own ways to fail
            told = str(error)
            unknown = _unknown(told)
            if unknown is not None and unknown not in stand_ins and "blocked" not in told:
                stand_ins[unknown] = _stand_in(unknown)
                continue
            wrong = next((name for name, kind in stand_ins.items() if str(kind) in told), None)
            if wrong is None or not issubclass(stand_ins[wrong], _Inert):
                raise UserError(_damage(path, error)) from error
            stand_ins[wrong] = _stand_in(wrong, collections.OrderedDict if "SETITEM" in told else list)
    raise UserError(f"{path} names more than a hundred classes that are not known here; it is no checkpoint.")


def _unknown(told: str) -> str | None:
    """The class that PyTorch's reader does not know, from what it says."""
    found = _UNKNOWN.search(told)
    if found is None:
        return None
    return found[1] if "." in found[1] else f"builtins.{found[1]}"


def _plain_classes() -> list[Any]:
    """What training scripts put beside weights: arguments, scalars and arrays of NumPy of either version."""
    dtypes = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType") and name != "ObjectDType"]
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    found: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, *dtypes]
    for package in ("numpy._core", "numpy.core"):
        found += [
            (multiarray.scalar, f"{package}.multiarray.scalar"),
            (multiarray._reconstruct, f"{package}.multiarray._reconstruct"),
        ]
    return found


def _damage(path: Path, error: Exception) -> str:
    with path.open("rb") as stream:
        start = stream.read(2)
    if start[:1] not in (b"P", b"\x80"):  # neither a zip nor a pickle
        return f"{path} is no checkpoint that can be read safely: neither a PyTorch file nor safetensors."
    if "blocked" in str(error) or "Unsupported" in str(error):
        return f"{path} is no checkpoint that can be read safely: it asks to run code ({_short(error)})."
    if start == b"PK" and not _is_zip(path):
        return f"{path} is cut short: its end is missing."
    return f"{path} is no checkpoint that can be read safely; it may be cut short or foreign ({_short(error)})."


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an end that tells of several disks
        return False


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


# ------------------------------------------------------------------------------------------------- finding the network


def _taken(path: Path, content: Any, metadata: dict[str, Any], ema: bool) -> Checkpoint:
    if isinstance(content, nn.Module | _Inert):
        raise UserError(f"{path} is a whole pickled model; save its state_dict() and give that.")
    first, second = (_AVERAGES, _NETWORKS) if ema else (_NETWORKS, _AVERAGES)
    places, left, found_average = [], [], False
    while isinstance(content, Mapping):
        name = next((n for n in (*first, *second) if n in content and _holds(content[n])), None)
        if name is None:
            others = [str(n) for n, value in content.items() if isinstance(value, Mapping) and _holds(value)]
            if len(others) != 1:
                break
            name = next(n for n in content if str(n) == others[0])
        found_average |= name in _AVERAGES
        outer = ".".join(places)
        for other, value in content.items():
            if other != name:
                left.append(f"{outer}.{other}" if outer else str(other))
                metadata = {**metadata, **_plain(str(other), value)}
        places.append(str(name))
        content = content[name]
    if not isinstance(content, Mapping) or not _holds(content):
        entries = ", ".join(str(n) for n in content) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{path} holds no network: there are no tensors by name in it ({entries or 'nothing'}).")
    if ema and not found_average:
        there = ", ".join([*left, *places]) or "tensors only"
        raise UserError(f"{path} holds no moving average of the weights; it holds {there}.")
    state: dict[str, Tensor] = {}
    for name, value in _flat(content):
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(value.copy())
        if isinstance(value, Tensor) and not value.is_meta and name != "n_averaged":
            state[name] = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        else:
            left.append(name)
            metadata = {**metadata, **_plain(name, value)}
    return Checkpoint(path, _without_wrappers(state), ".".join(places), tuple(left), metadata)


def _holds(content: Any) -> bool:
    """Whether there are tensors in it, by name, directly or one entry deeper."""
    if not isinstance(content, Mapping):
        return False
    if any(isinstance(value, Tensor | np.ndarray) for value in content.values()):
        return all(isinstance(name, str) for name in content)
    return any(n in content and _holds(content[n]) for n in (*_NETWORKS, *_AVERAGES)) or any(
        isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()) and str(name) != "state"
        for name, value in content.items()
        if isinstance(name, str)
    )


def _flat(content: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Entries by name; where there are several networks, ``network.tensor``."""
    found: list[tuple[str, Any]] = []
    for name, value in content.items():
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
            found += [(f"{name}.{inner}", tensor) for inner, tensor in value.items()]
        else:
            found.append((str(name), value))
    return found


def _plain(name: str, value: Any) -> dict[str, Any]:
    """``{name: value}`` of a plain value, an empty dictionary for others."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping) and not any(isinstance(v, Tensor | _Inert) for v in value.values()):
        return {name: dict(value)}
    return {name: value} if isinstance(value, (bool, int, float, str, list, tuple)) or value is None else {}


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers, until none is left; one that another tensor has already stays."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = name.replace("._orig_mod.", ".")
        while (prefix := next((p for p in _PREFIXES if short.startswith(p)), None)) is not None:
            short = short.removeprefix(prefix)
        found[name if short in found or (short != name and short in state) else short] = tensor
    return found
