"""Steps of a backward pass that hands out relevance instead of derivatives, and what they remember."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Kept:
    """A tensor for later; copied before somebody writes into its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()

    def save(self) -> None:
        self.tensor = self.tensor.clone()


class _Propagate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], Any], back: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Any:
        ctx.back = back
        return run()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:  # type: ignore[override]
        return None, None, *ctx.back(relevance)


def propagate(run: Callable[[], Any], back: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Any:
    """The value of ``run()``; relevance that comes back to it is shared among ``inputs`` by ``back``."""
    with torch.no_grad():
        out = run()
    if any(out is x for x in inputs):  # dropout that is off returns what it got
        return out
    return _Propagate.apply(lambda: out, back, *inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def swapped(value: Any, found: dict[int, Tensor]) -> Any:
    """The same nest with the tensors that are found by their ``id`` in the places of those."""
    if isinstance(value, Tensor):
        return found.get(id(value), value)
    if isinstance(value, dict):
        return {key: swapped(item, found) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(swapped(item, found) for item in value)
    return value
