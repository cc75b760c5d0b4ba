"""Lossless coding with a probabilistic circuit, a variable after the other (arXiv 2111.11632, section 3).

    coder = CircuitCoder(circuit)
    files = coder.compress(x)  # x (N, D) int64 → N byte strings that decode on their own
    coder.decompress(files).indices  # x again
    data = coder.encode(x)  # all samples in one stream, variable by variable in lock-step
    coder.decode(data, len(x))

The conditional distribution of every variable given those before it is exact, so a sample takes ``-log2 p(x)`` bits but
for the rounding of tables and the end of the stream. Encoder and decoder run the same float64 operations in the same
order (:mod:`isthmus.priors.circuit_schedule`), and turn cumulative probabilities into integer tables by the same
function; a hash of the parameters tells whether both have the same circuit.

Alphabets of more than 32 categories are coded as two digits, first which block of categories, then which of the block:
a decoder evaluates about ``2·√C`` cumulative probabilities instead of C.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import Code, UserError
from isthmus.layers.entropy_coding import Decoder, Encoder, quantize_cdf, quantize_points
from isthmus.priors.circuit import HCLT
from isthmus.priors.circuit_schedule import Schedule

_WHOLE = 32  # alphabets up to this size are coded in one digit
_HEADER = struct.Struct("<3sB8sII")  # magic, version, model, variables, checksum
_MAGIC, _VERSION = b"HCL", 1

Digit = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


class CircuitCoder:
    """Encodes and decodes samples of a fitted circuit.

    Attributes:
        order: the variables as they are coded.
        model: 8 bytes that tell this circuit from any other.
        block: categories that share a first digit; all of them where the alphabet is small.

    Raises:
        ValueError: the circuit is not fitted.
    """

    def __init__(self, circuit: HCLT) -> None:
        self.schedule = Schedule(circuit)
        self.order, self.categories = self.schedule.order, circuit.categories
        self.block = self.categories if self.categories <= _WHOLE else math.isqrt(self.categories - 1) + 1
        self.blocks = -(-self.categories // self.block)
        # Cumulative probabilities of every state; categories beyond the last fill the last block and have none.
        variables, states = self.schedule.inputs.shape[:2]
        self._below = np.zeros((variables, states, self.blocks * self.block + 1))
        np.cumsum(self.schedule.inputs, axis=2, out=self._below[..., 1 : self.categories + 1])
        self._below[..., self.categories + 1 :] = self._below[..., self.categories : self.categories + 1]
        window = np.lib.stride_tricks.sliding_window_view(self._below, self.block + 1, axis=2)
        self._inside = np.ascontiguousarray(window[:, :, :: self.block].swapaxes(2, 3))  # (D, K, block + 1, blocks)
        self.model = _hash(circuit)

    # --------------------------------------------------------------------------------------- samples on their own

    def compress(self, x: Tensor) -> list[bytes]:
        """One byte string a sample, of a header of 20 bytes and the coded categories.

        Args:
            x: ``(N, D)`` category numbers.

        Raises:
            ValueError: a wrong shape or something outside 0…C-1.
        """
        numbers = self._numbers(x)
        intervals: list[tuple[np.ndarray, np.ndarray]] = []
        self._run(numbers, None, self._to_intervals(numbers, lambda low, high: intervals.append((low, high - low))))
        files = []
        for i, row in enumerate(numbers):
            encoder = Encoder()
            low, count = (np.array([pair[side][i] for pair in intervals]) for side in (0, 1))
            encoder.push_intervals(low, count)
            payload = encoder.finish()
            files.append(self._header(payload, row) + payload)
        return files

    def decompress(self, files: Sequence[bytes]) -> Code:
        """What :meth:`compress` was given, as ``Code.indices (N, D)``; ``bits`` are those of the coded categories.

        Raises:
            UserError: a string is damaged, cut, of another format, or of another circuit.
        """
        payloads = [self._payload(i, data) for i, data in enumerate(files)]
        decoders = [Decoder(payload) for payload in payloads]

        def digit(below: np.ndarray) -> np.ndarray:
            return np.array([decoder.pop(table) for decoder, table in zip(decoders, quantize_cdf(below), strict=True)])

        numbers = np.zeros((len(files), len(self.order)), np.int64)
        if len(files):
            self._run(numbers, None, self._from_digits(numbers, digit))
        for i, (data, payload, row) in enumerate(zip(files, payloads, numbers, strict=True)):
            if self._header(payload, row) != data[: _HEADER.size]:
                raise UserError(f"sample {i} is damaged: its checksum does not fit what was decoded.")
        bits = torch.tensor([8.0 * len(payload) for payload in payloads])
        return Code([], torch.from_numpy(numbers), bits=bits)

    # --------------------------------------------------------------------------------------- many in one stream

    def encode(self, x: Tensor, coded: Sequence[bool] | None = None) -> bytes:
        """All samples ``(N, D)`` in one stream without header or checksum.

        Args:
            x: category numbers.
            coded: for every variable, whether it is coded; the others are summed out and need not be categories.
        """
        numbers = self._numbers(x, coded)
        encoder = Encoder()
        self._run(
            numbers, coded, self._to_intervals(numbers, lambda low, high: encoder.push_intervals(low, high - low))
        )
        return encoder.finish()

    def decode(self, data: bytes, count: int, coded: Sequence[bool] | None = None) -> Tensor:
        """``count`` samples of a stream of :meth:`encode`; variables that were not coded are 0.

        Raises:
            UserError: the stream holds something else, as far as that can be seen without a checksum.
        """
        numbers = np.zeros((count, len(self.order)), np.int64)
        decoder = Decoder(data)
        self._run(numbers, coded, self._from_digits(numbers, lambda below: decoder.pop(quantize_cdf(below))))
        if not decoder.exhausted:
            raise UserError("the coded data hold more than was to be decoded; they belong to something else.")
        return torch.from_numpy(numbers)

    def intervals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where each variable's symbol lies in [0, 1): lower ends and probabilities ``(N, D)``, by steps of the order.

        They are the conditional cumulative probability of smaller categories, and that of the category itself, before
        either is rounded to integers.
        """
        numbers = self._numbers(x)
        found: list[tuple[np.ndarray, np.ndarray]] = []

        def take(node: int, weights: np.ndarray) -> np.ndarray:
            values = numbers[:, node]
            mass = self._at(node, weights, self.categories)
            low, high = (self._at(node, weights, values + i) / mass for i in (0, 1))
            found.append((low, high - low))
            return values

        self._run(numbers, None, take)
        low, width = (np.stack([pair[side] for pair in found], 1) for side in (0, 1))
        return torch.from_numpy(low), torch.from_numpy(width)

    # ------------------------------------------------------------------------------------------------------------ parts

    def _run(
        self, numbers: np.ndarray, coded: Sequence[bool] | None, take: Callable[[int, np.ndarray], np.ndarray]
    ) -> None:
        """Hand every variable with its weights to ``take``, which returns its values."""
        coded = [True] * len(self.order) if coded is None else coded
        walk = self.schedule.walk(self.schedule.program(coded), len(numbers))
        try:
            node, weights = next(walk)
            while True:
                node, weights = walk.send(take(node, weights))
        except StopIteration:
            return

    def _to_intervals(
        self, numbers: np.ndarray, put: Callable[[np.ndarray, np.ndarray], object]
    ) -> Callable[[int, np.ndarray], np.ndarray]:
        """What an encoder does with a variable: hand the interval of every digit to ``put``."""

        def take(node: int, weights: np.ndarray) -> np.ndarray:
            values = numbers[:, node]
            place, within = np.divmod(values, self.block)
            start = self._at(node, weights, place * self.block)
            stop = self._at(node, weights, (place + 1) * self.block)
            if self.blocks > 1:
                mass = self._at(node, weights, self.blocks * self.block)
                put(*(quantize_points(b, mass, place + i, self.blocks) for i, b in enumerate((start, stop))))
            low, high = (self._at(node, weights, values + i) - start for i in (0, 1))
            put(*(quantize_points(b, stop - start, within + i, self.block) for i, b in enumerate((low, high))))
            return values

        return take

    def _from_digits(
        self, numbers: np.ndarray, digit: Callable[[np.ndarray], np.ndarray]
    ) -> Callable[[int, np.ndarray], np.ndarray]:
        """What a decoder does with a variable: ask ``digit`` with cumulative masses ``(N, symbols + 1)``."""

        def take(node: int, weights: np.ndarray) -> np.ndarray:
            place = np.zeros(len(numbers), np.int64)
            if self.blocks > 1:
                place = digit(_mass(weights, lambda k: self._below[node, k, :: self.block, None]))
            within = digit(_mass(weights, lambda k: self._inside[node, k].take(place, axis=1)))
            # Damaged data may name a category beyond the last; the checksum will tell.
            numbers[:, node] = np.minimum(place * self.block + within, self.categories - 1)
            return numbers[:, node]

        return take

    def _at(self, node: int, weights: np.ndarray, category: np.ndarray | int) -> np.ndarray:
        """Mass ``(N,)`` of the categories before ``category``, one number or one a sample."""
        below = self._below[node]
        total = weights[0] * below[0][category]
        for k in range(1, len(below)):
            total += weights[k] * below[k][category]
        return total

    def _numbers(self, x: Tensor, coded: Sequence[bool] | None = None) -> np.ndarray:
        numbers = x.detach().cpu().numpy()
        if numbers.ndim != 2 or numbers.shape[1] != len(self.order) or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(
                f"samples are (N, {len(self.order)}) category numbers, got {tuple(numbers.shape)} {x.dtype}."
            )
        checked = numbers if coded is None else numbers[:, np.asarray(coded, bool)]
        if checked.size and (checked.min() < 0 or checked.max() >= self.categories):
            raise ValueError(
                f"category numbers lie in 0…{self.categories - 1}, got {checked.min()} to {checked.max()}."
            )
        return numbers.astype(np.int64, copy=False)

    def _header(self, payload: bytes, row: np.ndarray) -> bytes:
        checksum = zlib.crc32(row.astype("<i8").tobytes(), zlib.crc32(payload))
        return _HEADER.pack(_MAGIC, _VERSION, self.model, len(row), checksum)

    def _payload(self, number: int, data: bytes) -> bytes:
        if len(data) < _HEADER.size or data[:3] != _MAGIC:
            raise UserError(f"sample {number} is no coded sample of a circuit, or was cut short.")
        _, version, model, variables, _ = _HEADER.unpack(data[: _HEADER.size])
        if version != _VERSION:
            raise UserError(f"sample {number} has format version {version}; this isthmus reads version {_VERSION}.")
        if model != self.model:
            raise UserError(f"sample {number} was coded with another circuit; decode it with the one of its run.")
        if variables != len(self.order):
            raise UserError(
                f"sample {number} is damaged: {variables} variables, where the circuit has {len(self.order)}."
            )
        return data[_HEADER.size :]


def _mass(weights: np.ndarray, below: Callable[[int], np.ndarray]) -> np.ndarray:
    """``Σ_k weights[k]·below(k)`` as ``(N, symbols + 1)``, one state after the other."""
    total = below(0) * weights[0]
    term = np.empty_like(total)
    for k in range(1, len(weights)):
        np.multiply(below(k), weights[k], out=term)
        np.add(total, term, out=total)
    return total.T


def _hash(circuit: HCLT) -> bytes:
    """8 bytes from structure and parameters."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(("hclt", 1, circuit.parents, circuit.categories, circuit.latents)).encode())
    for tensor in (circuit.inputs, circuit.sums, circuit.root):
        digest.update(tensor.detach().cpu().double().numpy().astype("<f8").tobytes())
    return digest.digest()
