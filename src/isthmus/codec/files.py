"""Files that are whole or absent, and weights as safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.codec.errors import UserError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a crash, a kill or a full disk leaves the old file or the new one, never half of either."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_weights(module: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a module's state to safetensors; tensors that share memory are stored once and tied again on loading."""
    from safetensors.torch import save

    state, tied, seen = {}, {}, {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            state[name] = tensor.detach().cpu().contiguous().clone()
    metadata = {**(metadata or {}), **({"tied": json.dumps(tied)} if tied else {})}
    # safetensors writes a header that nobody can read where there are neither tensors nor metadata but an empty {}.
    write_atomically(path, save(state, metadata=metadata if state else metadata or None))


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The object in a JSON file; ``what`` says where such a file comes from.

    Raises:
        UserError: it is missing, damaged, nested without end, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}); give {what}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; give {what}.")
    return content


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of :func:`save_weights` into a module of the same parts.

    Raises:
        UserError: the file is missing, cut short or foreign, or a tensor has another name or shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator of its own
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); it may be missing or cut short."
        ) from error
    if not isinstance(tied, dict) or not all(isinstance(other, str) and other in state for other in tied.values()):
        raise UserError(f"{path} is damaged: its metadata ties tensors to others that it does not have.")
    state |= {name: state[other] for name, other in tied.items()}
    if told := misfit(state, module.state_dict()):
        raise UserError(f"{path} does not fit {type(module).__name__}: {told}.")
    module.load_state_dict(state)


def misfit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being those wanted, blamed on names or on shapes; empty where they fit."""
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    shapes = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    told = []
    if missing and len(missing) == len(wanted):
        told.append(
            f"all names are others, such as {extra[0]} where {missing[0]} is wanted" if extra else "it is empty"
        )
    else:
        told += [f"it lacks {_some(missing)}"] if missing else []
        told += [f"it has {_some(extra)}, which the model does not have"] if extra else []
    if shapes:
        name, rest = shapes[0], f" (and {len(shapes) - 1} more of another shape)" if len(shapes) > 1 else ""
        told.append(f"{name} is {tuple(state[name].shape)}, the model's is {tuple(wanted[name].shape)}{rest}")
    return "; ".join(told)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
