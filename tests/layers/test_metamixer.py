"""The frame of MetaMixer and what fills it: attention, feed-forward networks, FFNified attention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from isthmus.layers.metamixer import (
    ConvNorm,
    InnerProduct,
    MetaMixer,
    NormConvSkip,
    Residual,
    convolutional_ffn,
    depthwise,
    feed_forward,
    ffnet_block,
    ffnified_attention,
    reparam_depthwise,
    reparameterize,
    self_attention,
    strip_depthwise,
)
from isthmus.layers.reparam import ReparamConv
from tests.layers.test_reparam import trained


def maps(height: int = 6, width: int = 9, channels: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height + width))


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=bound * float(b.detach().abs().max()), rtol=0)


# ---------------------------------------------------------------------------------------------------------- the frame


def test_attention_fills_the_frame() -> None:
    """Slots: queries, inner products with keys of x, softmax, weighted sums of values of x; computed slot by slot."""
    torch.manual_seed(0)
    mixer, x = trained(self_attention(8, 2, 12)), maps()
    frame = MetaMixer(mixer.query, mixer.key, mixer.activation, mixer.value)  # type: ignore[arg-type]
    with torch.no_grad():
        close(mixer(x), frame(x))
        coefficients = mixer.activation(mixer.key(mixer.query(x), x))  # type: ignore[operator]
    assert coefficients.shape == (2, 2, 54, 54)
    close(coefficients.sum(-1), torch.ones(2, 2, 54))


def test_attention_equals_that_of_pytorch() -> None:
    torch.manual_seed(0)
    mixer: Any = self_attention(8, 2, project=lambda a, b: nn.Conv2d(a, b, 1))
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        for part, conv in enumerate((mixer.query, mixer.key.keys, mixer.value.values)):
            theirs.in_proj_weight[8 * part : 8 * part + 8] = conv.weight.flatten(1)
            theirs.in_proj_bias[8 * part : 8 * part + 8] = conv.bias
        theirs.out_proj.weight.copy_(mixer.value.project.weight.flatten(1))
        theirs.out_proj.bias.copy_(mixer.value.project.bias)
        x = maps()
        tokens = x.flatten(2).mT
        close(mixer(x).flatten(2).mT, theirs(tokens, tokens, tokens)[0])


def test_feed_forward_network_fills_the_frame() -> None:
    torch.manual_seed(0)
    mixer: Any = feed_forward(8, 3)
    x = maps()
    hidden = F.gelu(F.linear(x.permute(0, 2, 3, 1), mixer.key.weight.flatten(1), mixer.key.bias))
    wanted = F.linear(hidden, mixer.value.weight.flatten(1), mixer.value.bias).permute(0, 3, 1, 2)
    close(mixer(x), wanted)


def test_ffnified_attention_is_query_convolution_gelu_convolution() -> None:
    """No norm but the one behind the query, the activation between key and value; 3x3 operators have a bias alone."""
    torch.manual_seed(0)
    mixer: Any = trained(ffnified_attention(8, 3))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in mixer.modules()) == 1
    x, c, n = maps(), mixer.query.conv, mixer.query.norm
    assert c.bias is None
    q = F.batch_norm(F.conv2d(x, c.weight), n.running_mean, n.running_var, n.weight, n.bias)
    key, value = mixer.key.conv, mixer.value.conv
    k = F.gelu(F.conv2d(q, key.weight, key.bias, padding=1, groups=8))
    close(mixer(x), F.conv2d(k, value.weight, value.bias, padding=1, groups=8))
    seven: Any = ffnified_attention(8, 7, 3)
    assert [tuple(c.weight.shape[2:]) for c in seven.modules() if isinstance(c, nn.Conv2d)] == [
        (1, 1),
        (7, 7),
        (3, 3),
        (3, 3),
    ]


def test_own_operators_fill_the_frame() -> None:
    class Gate(nn.Module):
        dynamic = True

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return h * x

    mixer = MetaMixer(nn.Identity(), nn.Identity(), nn.ReLU(), Gate())
    x = maps()
    assert torch.equal(mixer(x), x.relu() * x)


# --------------------------------------------------------------------------------------------------- units and merging


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 13])
@pytest.mark.parametrize("make", [depthwise, reparam_depthwise, strip_depthwise])
def test_units_of_every_odd_kernel_merge_exactly(kernel: int, make: Any) -> None:
    """The published unit is right for 7x7 only: its small kernel may be even, its padding is always two."""
    unit, x = trained(make(8, kernel)), maps()
    with torch.no_grad():
        before = unit(x)
        assert before.shape == x.shape
        reparameterize(unit)
        close(unit(x), before)
    assert [p.ndim for p in unit.parameters()] == [4, 1]


def test_branches_are_the_published_ones() -> None:
    def sides(unit: ReparamConv) -> list[tuple[int, ...]]:
        return [tuple(m.weight.shape[2:]) for m in unit.modules() if isinstance(m, nn.Conv2d)]

    assert sides(reparam_depthwise(4, 7)) == [(7, 7), (3, 3)]
    assert sides(reparam_depthwise(4, 9)) == [(9, 9), (5, 5)]
    assert sides(strip_depthwise(4, 9)) == [(9, 9), (5, 5), (1, 9), (9, 1)]
    assert sides(strip_depthwise(4, 3)) == [(3, 3), (1, 3), (3, 1)]
    assert sides(depthwise(4, 5)) == [(5, 5)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNorm(8, 6, 3, 2),
        lambda: NormConvSkip(8),
        lambda: ffnified_attention(8, 7, 3),
        lambda: convolutional_ffn(8, 7, 2),
        lambda: self_attention(8, 2),
        lambda: ffnet_block(8, ffnified_attention(8, 3), convolutional_ffn(8, 3), layer_scale=0.5, squeeze_excite=True),
    ],
    ids=["conv norm", "norm conv skip", "ffnified", "ffn", "attention", "block"],
)
def test_merging_leaves_no_norm_and_the_same_outputs(make: Any) -> None:
    torch.manual_seed(0)
    module, x = trained(make()), maps()
    with torch.no_grad():
        before = module(x)
        close(reparameterize_model(module)(x), before)  # timm finds the same functions
        reparameterize(module)
        close(module(x), before)
        reparameterize(module)
        close(module(x), before)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        reparameterize(make())


def test_layer_scale_folds_into_the_last_convolution() -> None:
    torch.manual_seed(0)
    x = maps()
    for mixer in (ffnified_attention(8, 7), ffnified_attention(8, 3), convolutional_ffn(8, 3)):
        block: Any = trained(Residual(mixer, 8, layer_scale=0.3))
        with torch.no_grad():
            before = block(x)
            reparameterize(block, fold_scales=True)
            close(block(x), before)
        assert block.gamma is None
        block.fold_scale()
    with pytest.raises(ValueError, match="does not end in a merged convolution"):
        Residual(ffnified_attention(8, 7), 8, layer_scale=0.3).fold_scale()


def test_squeeze_excite_stands_behind_the_sum() -> None:
    """Not inside the residual: with a silent mixer the block's first half is SE(x), not x + something."""
    torch.manual_seed(0)
    block: Any = ffnet_block(8, ffnified_attention(8, 3), nn.Identity(), layer_scale=0.0, squeeze_excite=True).eval()
    assert [name for name, _ in block.named_children()] == ["token_mixer", "se", "channel_mixer"]
    x = maps()
    close(block(x), block.se(x))
    assert block.se.fc1.out_channels == 8, "a quarter of the channels, rounded to eights"


def test_activation_behind_the_sum() -> None:
    x = maps()
    close(Residual(nn.Identity(), 8, activation=nn.GELU)(x), F.gelu(2 * x))


def test_drop_path_leaves_out_whole_samples() -> None:
    torch.manual_seed(0)
    block = Residual(nn.Identity(), 8, drop_path=0.5).train()
    x = torch.ones(64, 8, 2, 2)
    kept = block(x)[:, 0, 0, 0]
    assert sorted(kept.unique().tolist()) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ffnified_attention(8, 4), "must be odd"),
        (lambda: ffnified_attention(8, 7, 6), "must be odd"),
        (lambda: strip_depthwise(8, 8), "must be odd"),
        (lambda: convolutional_ffn(8, 2), "must be odd"),
        (lambda: ConvNorm(8, 8, 2), "kernel 2: a centred convolution needs an odd kernel"),
        (lambda: convolutional_ffn(8, 3, 0.01), "ratio 0.01 leaves no channel of 8"),
        (lambda: self_attention(8, 3), "3 heads do not divide a width of 8"),
        (lambda: InnerProduct(nn.Identity(), 8, 0), "0 heads do not divide"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
