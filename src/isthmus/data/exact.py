"""Elementary functions from operations that IEEE 754 fixes, so that built-in data have the same bits on every machine.

Libraries compute sines, exponentials and logarithms in their own ways, and vendors' vector mathematics even square
roots: results differ in the last digit from processor to processor. Here stand numpy's square root, which is the
processor's own instruction, and power series of ``+ − × ÷`` in float64, within one unit in the last place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**14  # numbers at once: intermediate results stay in the processor's cache
_PI = Fraction(3141592653589793238462643383279502884197169399375105820974944592307816406286, 10**75)
_LN2 = Fraction(693147180559945309417232121458176568075500134360255254120680009493393621969694, 10**78)


def _parts(number: Fraction, bits: int, count: int) -> tuple[float, ...]:
    """``number`` as a sum of floats with few bits each, whose products with small whole numbers are exact."""
    parts = []
    for _ in range(count - 1):
        unit = Fraction(2) ** (math.frexp(float(number))[1] - bits)
        parts.append(float(number // unit * unit))
        number -= number // unit * unit
    return (*parts, float(number))


_HALF_PI, _LN2_PARTS = _parts(_PI / 2, 32, 3), _parts(_LN2, 32, 3)
# The series of sin r / r − 1 and cos r − 1 + r²/2 in r², of (eʳ − 1 − r) / r² in r, of 2 atanh(s) / s − 2 in s².
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 9)]
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(2, 10)]
_EXPONENTIAL = [1 / math.factorial(k) for k in range(2, 15)]
_LOGARITHM = [2 / (2 * k + 1) for k in range(1, 12)]


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square roots, on the device and in the precision of ``x`` (float32 or float64)."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else torch.sqrt(x)


def _in_blocks(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray | float], np.ndarray]:
    @functools.wraps(function)
    def whole(x: np.ndarray | float) -> np.ndarray:
        numbers = np.asarray(x, dtype=np.float64)
        if numbers.size <= _BLOCK:
            return function(numbers)
        flat, out = numbers.reshape(-1), np.empty(numbers.size)
        for start in range(0, numbers.size, _BLOCK):
            out[start : start + _BLOCK] = function(flat[start : start + _BLOCK])
        return out.reshape(numbers.shape)

    return whole


@_in_blocks
def sin(x: np.ndarray) -> np.ndarray:
    """Sines of angles up to a million radians, float64."""
    return _turned(x, 0)


@_in_blocks
def cos(x: np.ndarray) -> np.ndarray:
    """Cosines of angles up to a million radians, float64."""
    return _turned(x, 1)


@_in_blocks
def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithms of normal positive numbers, float64."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < math.sqrt(0.5)
    f = np.where(small, 2 * mantissa, mantissa) - 1  # in [√½ − 1, √2 − 1]
    exponent = exponent - small
    s = f / (2 + f)  # log(1 + f) = 2 atanh(s), and 2s = f − s·f
    square = s * s
    high, low, lowest = _LN2_PARTS
    rest = s * (f - square * _series(_LOGARITHM, square)) - exponent * lowest - exponent * low
    return exponent * high + (f - rest)


@_in_blocks
def exp(x: np.ndarray) -> np.ndarray:
    """Exponentials of numbers from −700 to 700, float64."""
    whole = np.rint(x / float(_LN2))
    r, rest = _reduced(x, whole, _LN2_PARTS)
    return np.ldexp(1 + (r + (rest + r * r * _series(_EXPONENTIAL, r))), whole.astype(np.int32))


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    """``1 / (1 + exp(−x))``, float64."""
    return 1 / (1 + exp(-np.asarray(x)))


def _turned(x: np.ndarray, quarters: int) -> np.ndarray:
    """``sin(x + quarters·π/2)``: the angle left after whole quarters, and sine or cosine of it."""
    whole = np.rint(x / float(_PI / 2))
    r, rest = _reduced(x, whole, _HALF_PI)
    square = r * r
    sine = r + (r * square * _series(_SINE, square) + rest)
    half = 0.5 * square
    one = 1 - half
    cosine = one + ((1 - one - half) + (square * square * _series(_COSINE, square) - r * rest))
    quarter = whole.astype(np.int64) + quarters
    value = np.where(quarter & 1, cosine, sine)
    return np.where(quarter & 2, -value, value)


def _reduced(x: np.ndarray, whole: np.ndarray, parts: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """``x − whole · sum(parts)`` as a number and what its rounding left out."""
    high, low, lowest = parts
    first = x - whole * high
    taken = whole * low
    second = first - taken
    lost = (first - second) - taken
    rest = lost - whole * lowest
    r = second + rest
    return r, (second - r) + rest


def _series(coefficients: list[float], x: np.ndarray) -> np.ndarray:
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
