"""Random numbers as a function of their place: the same on every machine, in any order, for any subset.

Library generators may change their streams between versions; the built-in sources and the splits must not. Words
are 64-bit integer arithmetic (the mixing function of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195), what
is made of them :mod:`isthmus.data.exact`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from isthmus.data import exact

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def words(seed: int, index: np.ndarray | Sequence[int], count: int) -> np.ndarray:
    """``(len(index), count)`` uint64 words; row i depends on ``seed`` and ``index[i]`` only."""
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    rows = _mix(key + np.asarray(index, dtype=np.uint64) * _GOLDEN)
    return _mix(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def below(draws: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Words → int64 in ``[0, bound)`` by fixed-point multiplication, ``bound`` < 2³¹ (bias below 2⁻³²·bound)."""
    return ((draws >> np.uint64(32)) * np.asarray(bound, dtype=np.uint64) >> np.uint64(32)).astype(np.int64)


def permutation(size: int, seed: int) -> np.ndarray:
    """A permutation of ``range(size)``, int64: the positions sorted by their hashed words."""
    return np.argsort(words(seed, np.arange(size), 1)[:, 0], kind="stable")


def fraction(name: str) -> float:
    """A file name or row number → a number in ``[0, 1)`` that decides which split it belongs to."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=6).digest()) / 2**48


def unit(draws: np.ndarray) -> np.ndarray:
    """Words → float64 in ``[0, 1)``."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(draws: np.ndarray, centred: bool = False) -> np.ndarray:
    """Words ``(…, 2n)`` → n independent normal numbers, float64 ``(…, n)`` (Box and Muller).

    ``centred`` takes the middle of every one of the 2^53 steps of the unit interval, not its lower end, and the
    logarithm of the number, not of its complement (which is exact); which of the two a source takes is part of its
    definition.
    """
    length, angle = polar(draws, centred)
    return length * exact.cos(angle)


def polar(draws: np.ndarray, centred: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Words ``(…, 2n)`` → lengths and angles ``(…, n)`` of n points of the plane with two normal coordinates each."""
    first, second = np.split(unit(draws) + (2**-54 if centred else 0.0), 2, axis=-1)
    return np.sqrt(-2 * exact.log(first if centred else 1 - first)), 2 * np.pi * second
