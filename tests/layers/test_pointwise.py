"""1x1 convolutions as products: the numbers of ``nn.Conv2d``, and ``nn.Conv2d`` itself wherever somebody watches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.layers.pointwise import PointwiseConv


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers_and_gradients_are_those_of_conv2d(layout: torch.memory_format, bias: bool) -> None:
    ours, theirs = PointwiseConv(6, 10, bias), nn.Conv2d(6, 10, 1, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for conv in (ours, theirs):
        x = torch.randn(3, 6, 5, 7, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=layout).requires_grad_()
        y = conv(x)
        (y * y.detach().cos()).sum().backward()
        found.append([y, x.grad, *(p.grad for p in conv.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_whoever_watches_sees_a_convolution() -> None:
    conv, x = PointwiseConv(6, 10), torch.randn(1, 6, 5, 7)
    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert [str(op) for op in counter.get_flop_counts()["Global"]] == ["aten.convolution"]
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert conv.half()(x.half()).dtype == torch.float16
    assert conv.float()(x[0]).shape == (10, 5, 7)
