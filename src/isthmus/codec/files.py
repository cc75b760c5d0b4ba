"""Files that are whole or absent, and weights as safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from torch import nn

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
    write_atomically(path, save(state, metadata=metadata))


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
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); it may be missing or cut short."
        ) from error
    state |= {name: state[other] for name, other in tied.items()}
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or extra or shapes:
        told = [f"lacks {missing[0]} (and {len(missing) - 1} more)"] if missing else []
        told += [f"has an unknown {extra[0]} (and {len(extra) - 1} more)"] if extra else []
        told += [f"{n} is {tuple(state[n].shape)}, the model's is {tuple(own[n].shape)}" for n in shapes[:1]]
        raise UserError(f"{path} does not fit {type(module).__name__}: it " + "; it ".join(told) + ".")
    module.load_state_dict(state)
