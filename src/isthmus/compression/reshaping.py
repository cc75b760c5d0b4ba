"""Making a network again whose layers are narrower than its constructor makes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from isthmus.bounds import checked
from isthmus.codec import UserError, load_weights, part

#: Whole numbers that layers keep beside the shapes of their tensors.
_NUMBERS = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_channels",
    "num_groups",
    "normalized_shape",
    "head_hidden_size",
    "embed_dim",
    "channels",
    "zeros_before",
    "zeros_after",
)
Shapes = dict[str, dict[str, Any]]


def shapes_of(model: nn.Module) -> Shapes:
    """Module's name → its own numbers and the shapes of its own tensors, as plain data."""
    found: Shapes = {}
    for name, module in model.named_modules():
        numbers = {key: vars(module)[key] for key in _NUMBERS if isinstance(vars(module).get(key), int | tuple)}
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        tensors = {key: list(t.shape) for key, t in own}
        if numbers or tensors:
            found[name] = {"numbers": numbers, "tensors": tensors}
    return found


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says about itself.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file; it may be missing or cut short.") from error


def load_reshaped(model: nn.Module, path: str | os.PathLike[str], shapes: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give ``model`` the shapes of :func:`shapes_of` and load the weights of a file into it.

    Raises:
        UserError: the model has other modules, or the file does not fit.
    """
    reshape(model, shapes, str(path))
    load_weights(model, path)
    return model


def reshape(model: nn.Module, shapes: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Give ``model`` the shapes of :func:`shapes_of`; tensors that get another shape are zero.

    Args:
        model: changed in place.
        shapes: see above.
        source: where they come from, for messages.

    Raises:
        UserError: the model has other modules.
    """
    modules = dict(model.named_modules())
    for name, wanted in shapes.items():
        if name not in modules:
            raise UserError(f"{source} names a layer {name!r}, which {type(model).__name__} does not have.")
        module = modules[name]
        for key, value in wanted["numbers"].items():
            if key in _NUMBERS and key in vars(module):
                setattr(module, key, tuple(value) if isinstance(value, list) else int(value))
        for key, shape in wanted["tensors"].items():
            old = getattr(module, key, None)
            if not isinstance(old, torch.Tensor):
                raise UserError(f"{source} names a tensor {name}.{key}, which {type(model).__name__} does not have.")
            if list(old.shape) != list(shape):
                empty = old.new_zeros(shape)
                setattr(module, key, nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty)


@part
@checked
class Reshaped(nn.Module):
    """A network some of whose layers are narrower than its constructor makes them, so that a file can describe it.

    Args:
        network: as its constructor makes it, or already cut; it becomes ``.network``.
        shapes: of :func:`shapes_of` the network that was cut.

    Raises:
        UserError: the network has other modules.
    """

    def __init__(self, network: nn.Module, shapes: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        reshape(network, shapes, "the description")
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the network gives."""
        return self.network(x)
