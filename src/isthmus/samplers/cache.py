"""Cutting what a model remembers: the keys and values of tokens that were tried and refused have to go.

A cache is one of

- a cache of transformers, whose layers are cut by their own ``crop``;
- a list or tuple of ``(keys, values)``, each ``(B, heads, S, D)``;
- a tensor ``(B, S)`` or ``(B, S, D)`` of the tokens themselves, for models that remember nothing else;
- an object with methods ``select(index)`` and ``truncate(length)`` that return the cache.

All functions return the cache; one of transformers is changed in place. What cannot be cut is refused before anything
is changed: :func:`check` finds out without cutting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isthmus.codec import UserError


def held(cache: Any) -> int:
    """How many tokens it holds; 0 for ``None``.

    Raises:
        UserError: it does not count them.
    """
    if cache is None:
        return 0
    if isinstance(cache, Tensor):
        return cache.shape[1]
    if isinstance(cache, (list, tuple)):
        return cache[0][0].shape[-2] if cache else 0
    if hasattr(cache, "truncate") or not hasattr(cache, "layers"):
        return int(cache.get_seq_length())
    lengths = [int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")]
    if cache.layers and not lengths:
        raise _refusal(cache, cache.layers[0], "keeps a state and no tokens")
    return max(lengths, default=0)


def check(cache: Any) -> None:
    """Whether tokens can be taken back from it, found out without changing it.

    Raises:
        UserError: some layer cannot give up its last tokens: a recurrent state, a window that has dropped the tokens
            before them, quantised keys, or states that its ``crop`` knows nothing of.
    """
    if _is_plain(cache) or hasattr(cache, "truncate"):
        return
    if getattr(cache, "layers", None) is None and not hasattr(cache, "self_attention_cache"):
        raise UserError(f"a cache of type {type(cache).__name__} cannot be cut; give it select() and truncate().")
    cache = _of_decoder(cache)
    for layer in cache.layers:
        reason = _why_not(layer)
        if reason is not None:
            raise _refusal(cache, layer, reason)
    if not getattr(cache, "is_croppable", True):
        raise UserError(f"a cache of type {type(cache).__name__} cannot be cut: it says so itself; {_ADVICE}.")
    tokens = held(cache)
    for layer in cache.layers:
        length = int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0
        if length not in (0, tokens):
            raise _refusal(cache, layer, f"holds {length} tokens where others hold {tokens}")


def prepare(cache: Any) -> Any:
    """Have it keep, from now on, what is needed to take back the tokens of the next pass.

    Layers that forget (sliding windows, short convolutions) record their past until they are cut; call this after the
    prompt, which they may forget.

    Raises:
        UserError: as :func:`check`.
    """
    if not _is_plain(cache) and hasattr(_of_decoder(cache), "activate_past_recording"):
        _of_decoder(cache).activate_past_recording()
    check(cache)
    return cache


def truncate(cache: Any, length: int) -> Any:
    """Keep the first ``length`` tokens; one that records its past forgets what it need not keep.

    Raises:
        UserError: it holds fewer, or cannot be cut; see :func:`check`.
    """
    have = held(cache)
    if not 0 <= length <= have:
        raise UserError(f"a cache of {have} tokens cannot be cut to {length}.")
    if _is_plain(cache):
        return cache if length == have else _each(cache, lambda x, axis: x.narrow(axis, 0, length))
    if hasattr(cache, "truncate"):
        return cache if length == have else cache.truncate(length)
    inner = _of_decoder(cache)
    if length < have:
        check(cache)
        for layer in inner.layers:
            _check_window(inner, layer, have - length)
    for layer in inner.layers:
        if _is_used(layer) and (length < have or getattr(layer, "record_past", False)):
            layer.crop(length - have)
    return cache


def can_select(cache: Any) -> bool:
    """Whether :func:`select` works: every token is kept, as keys and values that any order of tokens may have."""
    if cache is None or _is_plain(cache) or hasattr(cache, "select"):
        return True
    layers = getattr(_of_decoder(cache), "layers", None)
    return layers is not None and all(not _is_used(layer) or _is_list_of_tokens(layer) for layer in layers)


def select(cache: Any, index: Tensor) -> Any:
    """Keep the tokens at ``index`` of the sequence, in that order.

    Args:
        cache: what the model remembers, of B rows.
        index: int64 ``(K,)`` for all rows alike or ``(B, K)``, one list a row.

    Raises:
        UserError: its tokens cannot be moved, or ``index`` has another number of rows.
    """
    if hasattr(cache, "select") and not isinstance(cache, Tensor):
        return cache.select(index)

    def take(x: Tensor, axis: int) -> Tensor:
        where = index.to(x.device)
        if where.ndim == 1:
            return x.index_select(axis, where)
        if len(where) != len(x):
            raise UserError(f"an index of {len(where)} rows cannot select from a cache of {len(x)}.")
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
    check(cache)
    inner = _of_decoder(cache)
    layers = [layer for layer in inner.layers if _is_used(layer)]
    for layer in layers:
        if not _is_list_of_tokens(layer):
            raise _refusal(inner, layer, "does not keep every token in a place of its own")
    for layer, keys, values in [(layer, change(layer.keys, 2), change(layer.values, 2)) for layer in layers]:
        layer.keys, layer.values = keys, values
    return cache


_ADVICE = "decode one token a pass (window=1, or samplers.ordinary), or use a model with full attention"


def _refusal(cache: Any, layer: Any, reason: str) -> UserError:
    name = type(layer).__name__
    return UserError(f"a {type(cache).__name__} with layers of type {name} cannot be cut: it {reason}; {_ADVICE}.")


def _is_plain(cache: Any) -> bool:
    return cache is None or isinstance(cache, (Tensor, list, tuple))


def _of_decoder(cache: Any) -> Any:
    """The part that grows: of an encoder-decoder's cache, that of its decoder."""
    return getattr(cache, "self_attention_cache", cache)


def _is_used(layer: Any) -> bool:
    """Whether a layer holds anything: those that share another's keys never do."""
    return getattr(layer, "keys", None) is not None or any(_convolutions(layer))


def _convolutions(layer: Any) -> Iterator[bool]:
    yield from getattr(layer, "is_conv_states_initialized", {}).values()


def _why_not(layer: Any) -> str | None:
    """What keeps a layer from being cut, or nothing."""
    recurrent = any(getattr(layer, "is_recurrent_states_initialized", {}).values())
    if recurrent:
        return "keeps a recurrent state, which no token can be taken out of"
    if not _is_used(layer):
        return None if not hasattr(layer, "conv_states") else "has not yet shown what state it keeps"
    if getattr(layer, "is_croppable", None) is False:
        return "says itself that it has no way back"
    if not hasattr(layer, "crop"):
        return "has no method crop"
    if hasattr(layer, "conv_states") and not all(_convolutions(layer)):
        return "keeps some states only"
    for name in _updates(layer):
        if not _crop_knows(layer, name):
            return f"keeps what {name}() adds, which its crop() knows nothing of"
    return None


def _updates(layer: Any) -> list[str]:
    """The methods by which a layer takes in new tokens."""
    return [name for name in dir(type(layer)) if name.startswith("update") and callable(getattr(layer, name))]


def _crop_knows(layer: Any, name: str) -> bool:
    """Whether the class that wrote ``crop`` knew this way of taking in tokens: its own, inherited, or asked for."""
    classes = type(layer).__mro__
    crop = next(each for each in classes if "crop" in vars(each))
    update = next(each for each in classes if name in vars(each))
    asked_for = getattr(getattr(crop, name, None), "__isabstractmethod__", False)
    return issubclass(crop, update) or asked_for


def _check_window(cache: Any, layer: Any, count: int) -> None:
    """A window that did not record its past has dropped the tokens that would come back into it."""
    window = getattr(layer, "sliding_window", None)
    if not _is_used(layer) or hasattr(layer, "max_cache_len"):
        return
    if getattr(layer, "is_sliding", False) and window is not None and layer.get_seq_length() >= window:
        have = layer.keys.shape[-2]
        if not getattr(layer, "record_past", False) or have - count < min(window - 1, layer.get_seq_length() - count):
            raise _refusal(cache, layer, "has dropped tokens that would come back; call prepare() after the prompt")
    if any(_convolutions(layer)):
        for i, state in layer.conv_states.items():
            if not layer.record_past or state.shape[-1] - count < layer.conv_kernel_size[i]:
                raise _refusal(cache, layer, "has dropped what would come back; call prepare() after the prompt")


def _is_list_of_tokens(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    plain = torch.is_tensor(keys) and keys.ndim == 4 and keys.shape[-2] == layer.get_seq_length()
    fixed = getattr(layer, "is_sliding", False) or hasattr(layer, "max_cache_len")
    return plain and not fixed and _updates(layer) == ["update"] and _why_not(layer) is None
