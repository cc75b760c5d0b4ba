"""Multiply-accumulates: the same number whichever kernels run, and gradients of grouped convolutions."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from isthmus.compression.operations import multiply_accumulates


@pytest.mark.parametrize(("wide", "groups"), [(8, 8), (4, 2), (4, 1)])
def test_either_gradient_of_a_convolution_takes_what_the_convolution_took(wide: int, groups: int) -> None:
    x = torch.randn(1, 8, 10, 10, requires_grad=True)
    conv = nn.Conv2d(8, wide, 3, padding=1, groups=groups)
    forward = 100 * wide * (8 // groups) * 9
    assert multiply_accumulates(conv, x) == forward
    assert multiply_accumulates(conv, x, backward=True) == 3 * forward
    assert multiply_accumulates(conv, x.detach(), backward=True) == 2 * forward
    assert x.grad is None
    assert conv.weight.grad is None


def test_fused_attention_counts_as_its_two_products() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_classes=0).eval()
    x = torch.randn(1, 3, 32, 32)
    fused = multiply_accumulates(model, x)
    model.blocks[0].attn.fused_attn = False
    assert fused == multiply_accumulates(model, x)
    tokens, width = 5, 48
    layers = tokens * (width * 3 * width + width * width + 2 * width * 4 * width)
    assert fused == 4 * width * 3 * 16 * 16 + layers + 2 * tokens * tokens * width


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def test_kernels_that_hide_layers_are_taken_apart() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert multiply_accumulates(encoder, torch.randn(1, 5, 16)) == 5 * 16 * (48 + 16 + 64) + 2 * 5 * 5 * 16
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3)):
        assert multiply_accumulates(Recurrent(kind).eval(), torch.randn(1, 5, 8)) == 5 * 2 * 8 * 8 * gates
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()
    assert torch.backends.mha.get_fastpath_enabled()
