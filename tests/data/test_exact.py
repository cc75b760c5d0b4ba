"""Built-in data rest on arithmetic that every machine rounds alike; the references here are exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
