"""Cutting what a model remembers: the keys and values of tokens that were tried and refused have to go.

A cache is one of

- a cache of transformers (``DynamicCache``; every layer must grow with the sequence);
- a list or tuple of ``(keys, values)``, each ``(B, heads, S, D)``;
- a tensor ``(B, S)`` or ``(B, S, D)`` of the tokens themselves, for models that remember nothing else;
- an object with methods ``select(index)`` and ``truncate(length)`` that return the cache.

All functions return the cache; one of transformers is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def held(cache: Any) -> int:
    """How many tokens it holds; 0 for ``None``."""
    if cache is None:
        return 0
    if isinstance(cache, Tensor):
        return cache.shape[1]
    if isinstance(cache, (list, tuple)):
        return cache[0][0].shape[-2] if cache else 0
    return int(cache.get_seq_length())


def truncate(cache: Any, length: int) -> Any:
    """Keep the first ``length`` tokens.

    Raises:
        ValueError: it holds fewer, or cannot be cut (recurrent state, sliding windows, fixed size).
    """
    have = held(cache)
    if not 0 <= length <= have:
        raise ValueError(f"a cache of {have} tokens cannot be cut to {length}.")
    if length == have:
        return cache
    if hasattr(cache, "truncate"):
        return cache.truncate(length)
    return _each(cache, lambda x, axis: x.narrow(axis, 0, length))


def select(cache: Any, index: Tensor) -> Any:
    """Keep the tokens at ``index`` of the sequence, in that order.

    Args:
        cache: what the model remembers, of B rows.
        index: int64 ``(K,)`` for all rows alike or ``(B, K)``, one list a row.

    Raises:
        ValueError: it cannot be cut, or ``index`` has another number of rows.
    """
    if hasattr(cache, "select") and not isinstance(cache, Tensor):
        return cache.select(index)

    def take(x: Tensor, axis: int) -> Tensor:
        where = index.to(x.device)
        if where.ndim == 1:
            return x.index_select(axis, where)
        if len(where) != len(x):
            raise ValueError(f"an index of {len(where)} rows cannot select from a cache of {len(x)}.")
        shape = [len(x)] + [1] * (x.ndim - 1)
        shape[axis] = where.shape[1]
        return x.gather(axis, where.view(shape).expand(*x.shape[:axis], where.shape[1], *x.shape[axis + 1 :]))

    return _each(cache, take)


def _each(cache: Any, change: Callable[[Tensor, int], Tensor]) -> Any:
    """Apply ``change(tensor, axis of the sequence)`` to all that a cache holds."""
    if isinstance(cache, Tensor):
        return change(cache, 1)
    if isinstance(cache, (list, tuple)):
        return type(cache)((change(keys, 2), change(values, 2)) for keys, values in cache)
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"a cache of type {type(cache).__name__} cannot be cut; give it select() and truncate().")
    for layer in layers:
        _check(layer, cache.get_seq_length())
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = change(layer.keys, 2), change(layer.values, 2)
    return cache


def _check(layer: Any, tokens: int) -> None:
    keys = getattr(layer, "keys", None)
    if getattr(layer, "is_initialized", False) is False and keys is None:
        return
    if getattr(layer, "is_sliding", False) or not torch.is_tensor(keys) or keys.shape[-2] != tokens:
        raise ValueError(
            f"a cache with layers of type {type(layer).__name__} cannot be cut, because it does not keep every token; "
            "use a model with full attention and transformers' DynamicCache (cache_implementation='dynamic')."
        )
