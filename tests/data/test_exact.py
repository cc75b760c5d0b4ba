"""Built-in data rest on arithmetic that every machine rounds alike; the references here are exact fractions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.data import exact, load
from isthmus.data.builtin.scenes import SHAPES, TEXTURES, Space, encode, paint, sample
from isthmus.data.exact import sqrt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_square_roots_are_the_nearest_numbers_there_are(dtype: torch.dtype) -> None:
    drawn = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    numbers = drawn * torch.logspace(-6, 6, 2000, dtype=dtype)
    for number, root in zip(numbers.numpy(), sqrt(numbers).numpy(), strict=True):
        below, above = (Fraction(float(np.nextafter(root, root.dtype.type(end)))) for end in (-np.inf, np.inf))
        exact = Fraction(float(root))
        assert ((exact + below) / 2) ** 2 <= Fraction(float(number)) <= ((exact + above) / 2) ** 2


def _sine(angle: Fraction) -> Fraction:
    """By its power series, to 10⁻⁴⁰ for angles up to ten."""
    angle = Fraction(round(angle * 2**200), 2**200)
    term = total = angle
    for k in range(1, 40):
        term = Fraction(round(term * -angle * angle / (2 * k * (2 * k + 1)) * 2**200), 2**200)
        total += term
    return total


_HALF_PI = Fraction("1.57079632679489661923132169163975144209858469968755")


def _decimal(name: str) -> Callable[[float], Fraction]:
    def reference(number: float) -> Fraction:
        with localcontext(prec=50):
            return Fraction(getattr(Decimal(number), name)())

    return reference


@pytest.mark.parametrize(
    ("function", "reference", "low", "high"),
    [
        (exact.sin, lambda x: _sine(Fraction(x)), -10, 10),
        (exact.cos, lambda x: _sine(Fraction(x) + _HALF_PI), -8, 8),
        (exact.sin, lambda x: _sine(Fraction(x) % (4 * _HALF_PI)), 1e3, 1e6),
        (exact.log, _decimal("ln"), 2**-30, 4),
        (exact.log, _decimal("ln"), 0.999, 1.001),
        (exact.exp, _decimal("exp"), -5, 5),
        (exact.exp, _decimal("exp"), -700, 700),
    ],
    ids=["sin", "cos", "sin of large angles", "log", "log near 1", "exp", "exp of large numbers"],
)
def test_functions_are_within_an_ulp_of_the_truth(
    function: Callable[[np.ndarray], np.ndarray], reference: Callable[[float], Fraction], low: float, high: float
) -> None:
    numbers = np.random.default_rng(0).uniform(low, high, 200)
    for number, value in zip(numbers.tolist(), function(numbers).tolist(), strict=True):
        assert abs(Fraction(value) - reference(number)) <= Fraction(math.ulp(value)), number


def test_functions_are_exact_where_the_answer_is_a_number() -> None:
    assert exact.sin(np.zeros(2)).tolist() == [0, 0]
    assert exact.cos(0.0) == exact.exp(np.zeros(1)) == 1
    assert exact.log(2.0 ** np.arange(-3, 4)).tolist() == (np.arange(-3, 4) * math.log(2)).tolist()
    many = np.linspace(0, 7, 50_000).reshape(5, -1)  # in blocks, and one by one
    assert exact.sin(many).shape == many.shape
    assert exact.sin(many)[4, 77] == exact.sin(many[4, 77])


SAMPLES = {
    "fields": ("target", "801bf9f1df47bbe1"),
    "discs": ("image", "d1eb2f9484702493"),
    "planar:moon": ("signal", "c6bb1751c126d138"),
    "planar:spiral": ("signal", "fd6a8a40c12acd45"),
    "textures:24": ("image", "a54906da38b614f3"),
    "street-numbers": ("image", "a37ee9ef6cf6ddd1"),
    "sounds": ("audio", "8d58baf2eeb1c336"),
    "sounds:clicks": ("audio", "e7fc35652a7450c7"),
    "signals": ("signal", "e46ceb1a7b267b8c"),
    "signals:sinusoids": ("signal", "b52db13488469ef4"),
    "solids": ("points", "45eb8b12636efd75"),
    "clips": ("video", "2606a8cb2da9514a"),
    "series": ("signal", "64e52db632cf59e7"),
}


@pytest.mark.parametrize("source", SAMPLES)
def test_drawn_samples_are_the_same_on_every_machine(source: str) -> None:
    column, expected = SAMPLES[source]
    values = load(source, "test", (column,)).fetch(range(12))[column].numpy()
    assert hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest() == expected


@pytest.mark.parametrize("source", sorted(SAMPLES.keys() - {"street-numbers"}))
def test_drawn_samples_ask_no_mathematics_library(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a library's own rounding")

    for name in ("sin", "cos", "tan", "exp", "log", "log1p", "power", "tanh", "arctan2", "hypot", "hanning", "einsum"):
        monkeypatch.setattr(np, name, refused)
    with _Operations() as operations:
        load(source, "test", (SAMPLES[source][0],)).fetch(range(4))
    assert not operations.names & _ROUNDED_BY_LIBRARIES


class _Operations(TorchDispatchMode):
    """The names of all operations of torch that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__.removesuffix("_"))
        return func(*args, **(kwargs or {}))


#: What a vendor's mathematics library, or the order of a sum, may round in its own way.
_ROUNDED_BY_LIBRARIES = {
    *("sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "log2", "pow", "sin", "cos", "tan", "atan2", "tanh", "sigmoid"),
    *("erf", "hypot", "norm", "linalg_vector_norm", "mean", "std", "var", "mm", "bmm", "addmm", "matmul", "softmax"),
}


def test_scenes_use_no_operation_of_torch_that_machines_round_differently() -> None:
    space = Space(objects=range(7), shapes=SHAPES, fills=TEXTURES, textures=TEXTURES, shadows=(0, 60))
    scenes = sample(100, "uniform", torch.Generator().manual_seed(0), space)
    with _Operations() as operations:
        paint(encode(scenes), 32, ("image", "masks", "boxes", "depth"))
    assert "mul" in operations.names
    assert not operations.names & _ROUNDED_BY_LIBRARIES
