"""Entropy coding with exact integer tables: probabilities to tables, symbols to bytes and back.

    tables = quantize_pmf(pmf)  # (…, K) → int64 (…, K + 1)
    data = encode(symbols, tables)
    decoder = Decoder(data)
    decoder.pop(tables)

A *table* holds cumulative counts: symbol ``s`` owns the integers from ``table[s]`` up to ``table[s + 1]`` out of
``table[K] = 2**precision``. Every symbol owns at least one, so whatever the model thought impossible can still be
written. Both sides have to have the same tables to the last integer: compute them in float64, with operations in an
order that does not depend on threads, batch sizes or the machine (no matrix products, no exp or log).

The coder is the range coder of the library constriction (extra ``coding``). Its categorical model gives ``K`` of its
``2**24`` counts away evenly and rounds down the rest in proportion to the weights it gets; with ``count - 1`` for
weights, nothing is left to round, and the library codes with exactly these tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError, extra

#: Bits of the finest table; two fewer than the library has, so that what a symbol leaves over can be cut in two.
PRECISION = 22
_LIBRARY = 24


def quantize_pmf(pmf: Tensor, precision: int = PRECISION) -> Tensor:
    """Tables ``(…, K + 1)`` int64 of probabilities ``(…, K)``, which need not sum to 1.

    Cumulative rounding: the K counts that every symbol is given first are shared evenly, the other ``2**precision - K``
    in proportion. A row without any mass gets a uniform table.

    Raises:
        ValueError: negative or non-finite entries, or more symbols than ``2**precision``.
    """
    weights = pmf.detach().cpu().double().numpy()
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("probabilities have to be finite and not negative.")
    cdf = np.zeros((*weights.shape[:-1], weights.shape[-1] + 1))
    np.cumsum(weights, axis=-1, out=cdf[..., 1:])
    return torch.from_numpy(quantize_cdf(cdf, precision))


def quantize_cdf(cdf: np.ndarray, precision: int = PRECISION) -> np.ndarray:
    """Tables ``(…, K + 1)`` int64 from cumulative mass ``(…, K + 1)``: float64, not falling, of any scale."""
    symbols = cdf.shape[-1] - 1
    below, mass = cdf - cdf[..., :1], cdf[..., -1:] - cdf[..., :1]
    return quantize_points(below, mass, np.arange(symbols + 1), symbols, precision)


def quantize_points(
    below: np.ndarray, mass: np.ndarray, place: np.ndarray, symbols: int, precision: int = PRECISION
) -> np.ndarray:
    """Single entries of tables: what :func:`quantize_cdf` gives at ``place``, for encoders that need no whole table.

    Args:
        below: mass of the symbols before ``place``; float64, broadcast against the others.
        mass: of all symbols; where it is 0 the table is uniform.
        place: entry of the table, 0 to ``symbols``.
        symbols: K.
        precision: bits of the table.

    Raises:
        ValueError: more symbols than ``2**precision``.
    """
    total = _total(precision)
    if not 0 < symbols <= total:
        raise ValueError(f"a table of precision {precision} holds 1 to {total} symbols, got {symbols}.")
    empty = mass <= 0
    share = below / np.where(empty, 1.0, mass) if empty.any() else below / mass
    if empty.any():
        share = np.where(empty, place / symbols, share)
    return (share * (total - symbols)).astype(np.int64) + place


def encode(symbols: Tensor | np.ndarray, tables: Tensor | np.ndarray) -> bytes:
    """Bytes of integer symbols ``(…)`` with a table each ``(…, K + 1)``, or one table ``(K + 1,)`` for all.

    Raises:
        ValueError: a symbol outside its table, or something that is no table.
    """
    encoder = Encoder()
    encoder.push(symbols, tables)
    return encoder.finish()


class Encoder:
    """Takes symbols in pieces, in the order in which :class:`Decoder` gives them back."""

    def __init__(self) -> None:
        self._library = extra("constriction", "coding").stream
        self._coder: Any = self._library.queue.RangeEncoder()
        self._family = self._library.model.Categorical(perfect=False)

    def push(self, symbols: Tensor | np.ndarray, tables: Tensor | np.ndarray) -> None:
        """Append symbols ``(…)`` with tables ``(…, K + 1)`` or ``(K + 1,)``."""
        numbers, table = _array(symbols), _array(tables)
        precision = _precision(table)
        flat = numbers.reshape(-1)
        size = table.shape[-1] - 1
        if numbers.size and (numbers.min() < 0 or numbers.max() >= size):
            raise ValueError(f"symbols must lie in 0…{size - 1}, got {numbers.min()} to {numbers.max()}.")
        if table.ndim == 1:
            low, high = table[flat], table[flat + 1]
        elif table.shape[:-1] != numbers.shape:
            raise ValueError(f"symbols {numbers.shape} need tables {(*numbers.shape, size + 1)}, got {table.shape}.")
        else:
            rows = table.reshape(-1, size + 1)
            low, high = (np.take_along_axis(rows, flat[:, None] + i, 1)[:, 0] for i in (0, 1))
        self.push_intervals(low, high - low, precision)

    def push_intervals(self, low: np.ndarray, count: np.ndarray, precision: int = PRECISION) -> None:
        """Append symbols by what they own, ``low`` and ``count`` ``(N,)``, without the rest of their tables."""
        shift = _LIBRARY - precision
        low, count = low.astype(np.int64) << shift, count.astype(np.int64) << shift
        rest = 2**_LIBRARY - low - count
        if low.size and (low.min() < 0 or count.min() < 1 or rest.min() < 0):
            raise ValueError("every interval must lie inside its table and own at least one count.")
        coded = (low > 0) | (rest > 0)  # a certain symbol takes no bits
        low, count, rest = low[coded], count[coded], rest[coded]
        if not low.size:
            return
        # The library sees the symbol with a neighbour on either side, or two on one side where it owns the edge.
        one, left, right = np.ones_like(low), low == 0, rest == 0
        parts = np.where(left, [count, rest - 1, one], np.where(right, [one, low - 1, count], [low, count, rest]))
        place = np.where(left, 0, np.where(right, 2, 1)).astype(np.int32)
        self._coder.encode(place, self._family, np.ascontiguousarray(parts.T - 1, dtype=np.float32))

    def finish(self) -> bytes:
        """All bytes so far, a multiple of four; empty where nothing had to be written."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Gives symbols back in the order in which they were encoded; ask with the tables that the encoder had.

    What it makes of bytes that were damaged, or of other tables, looks like any other symbols: keep a checksum.

    Raises:
        UserError: the number of bytes is no multiple of four.
    """

    def __init__(self, data: bytes) -> None:
        library = extra("constriction", "coding").stream
        if len(data) % 4:
            raise UserError(f"the coded data are cut short: {len(data)} bytes are no whole number of 32-bit words.")
        words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
        self._coder: Any = library.queue.RangeDecoder(words)
        self._family = library.model.Categorical(perfect=False)

    def pop(self, table: Tensor | np.ndarray) -> Any:
        """The next symbol for a table ``(K + 1,)``, as int; the next N for tables ``(N, K + 1)``, int64 ``(N,)``.

        Raises:
            ValueError: no table.
            UserError: the bytes cannot come from any symbols of these tables.
        """
        array = _array(table)
        shift = _LIBRARY - _precision(array)
        if array.ndim > 2:
            raise ValueError(f"pop takes one table or a row of them, got {array.shape}.")
        rows = np.atleast_2d(array)
        if rows.shape[-1] == 2 or not len(rows):
            found = np.zeros(len(rows), np.int64)
        else:
            weights = (((rows[:, 1:] - rows[:, :-1]) << shift) - 1).astype(np.float32, order="C")
            try:
                found = self._coder.decode(self._family, weights).astype(np.int64)
            except (AssertionError, ValueError) as error:
                raise UserError("the coded data are damaged, or were written with other tables.") from error
        if array.ndim == 1:
            return int(found[0])
        return torch.from_numpy(found) if isinstance(table, Tensor) else found

    @property
    def exhausted(self) -> bool:
        """Whether all symbols may have been given back; false means that there certainly are more."""
        return bool(self._coder.maybe_exhausted())


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"symbols and tables are integers, got {array.dtype}; quantize_pmf makes tables.")
    return array.astype(np.int64, copy=False)


def _precision(table: np.ndarray) -> int:
    """Bits of a table or of many; the check that they are tables."""
    if table.ndim == 0 or table.shape[-1] < 2:
        raise ValueError(f"a table has at least two entries, got shape {table.shape}.")
    if not table.size:
        return PRECISION
    precision = int(table.flat[table.shape[-1] - 1]).bit_length() - 1
    if not 0 <= precision <= PRECISION or (table[..., -1] != 2**precision).any() or (table[..., 0] != 0).any():
        raise ValueError(f"tables rise from 0 to the same power of two, at most 2**{PRECISION}.")
    if (table[..., 1:] <= table[..., :-1]).any():
        raise ValueError("every symbol of a table owns at least one count; quantize_pmf sees to that.")
    return precision


def _total(precision: int) -> int:
    if not 1 <= precision <= PRECISION:
        raise ValueError(f"precision is 1 to {PRECISION} bits, got {precision}.")
    return 2**precision
