"""How many multiply-accumulates a network takes, the same number on every device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def multiply_accumulates(model: nn.Module, example: Any, backward: bool = False) -> int:
    """Multiply-accumulates of products, convolutions and attention for ``model(example)``, as it is used.

    Fused attention is counted by its two products, and kernels that hide several layers are taken apart, so that it
    does not matter where the network runs.

    Args:
        model: in the mode in which it is to be counted; left as it is, gradients of parameters too.
        example: its input.
        backward: count the gradients of all parameters and inputs that want one as well.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward})
    with _taken_apart(), counter:
        if not backward:
            with torch.no_grad():
                model(example)
        else:
            leaves = [t for t in (example, *model.parameters()) if isinstance(t, Tensor)]
            before = [leaf.grad for leaf in leaves]
            with torch.enable_grad():
                model(example).sum().backward()
            for leaf, grad in zip(leaves, before, strict=True):
                leaf.grad = grad
    return counter.get_total_flops() // 2


@contextmanager
def _taken_apart() -> Iterator[None]:
    """Attention, transformer layers and recurrent layers run as the products that they consist of."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),  # torch: TF32 is for Intel GPUs
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _conv_backward(
    grad: Any, x: Any, weight: Any, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, transposed: bool,
    _output_padding: Any, _groups: int, wanted: Any, out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    """Either gradient of a convolution takes what the convolution took; torch's own count forgets the groups."""
    forward = conv_flop_count(list(x), list(weight), list(grad), transposed=transposed)
    return forward * (bool(wanted[0]) + bool(wanted[1]))
