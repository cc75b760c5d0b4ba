"""Merged convolutions compute what the branches computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from isthmus.layers.reparam import ReparamConv, embed_kernel, fuse_norm


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def trained(module: nn.Module) -> nn.Module:
    """A module in eval mode whose batch norms look as after training."""
    g = _generator()
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, (low, high) in (
                (m.weight, (0.5, 1.5)),
                (m.bias, (-1, 1)),
                (m.running_mean, (-1, 1)),
                (m.running_var, (0.5, 2)),
            ):
                t.data.uniform_(low, high, generator=g)
    return module.eval()


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * float(b.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_embedded_kernel_computes_the_dilated_convolution(dilation: int, groups: int) -> None:
    """Dense and grouped kernels too; the map is smaller than the kernel's span."""
    x, w = torch.randn(2, 4, 5, 6, generator=_generator()), torch.randn(4, 4 // groups, 3, 3, generator=_generator())
    small = F.conv2d(x, w, padding=dilation, dilation=dilation, groups=groups)
    _close(F.conv2d(x, embed_kernel(w, 9, dilation), padding=4, groups=groups), small)


@pytest.mark.parametrize(
    "conv",
    [
        ReparamConv(4, 13, [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]),
        ReparamConv(4, 31, [(5, 1)]),
        ReparamConv(4, 9, [(5, 1)], stride=2),
        ReparamConv(4, 7, [((1, 7), 1), ((7, 1), 1), (3, 1)]),
        ReparamConv(4, 5, [(3, 2)], groups=2),
        ReparamConv(4, 7, [(3, 3)], ndim=1),
        ReparamConv(4, 5, [(3, 1)], ndim=3),
        ReparamConv(4, 5),
        ReparamConv(4, 7, [(3, 1)], stride=2, out_channels=8),
    ],
    ids=["dilated", "small", "strided", "rectangles", "grouped", "1d", "3d", "alone", "widening"],
)
def test_merge_is_exact_and_a_second_one_does_nothing(conv: ReparamConv) -> None:
    trained(conv)
    x = torch.randn(2, 4, *(8, 11, 6)[: conv.ndim], generator=_generator())
    before = conv(x)
    conv.reparameterize()
    _close(conv(x), before)
    assert sum(1 for _ in conv.parameters()) == 2
    weight = conv.conv.weight
    conv.train().reparameterize()
    assert conv.conv.weight is weight


def test_following_norm_is_absorbed() -> None:
    net = trained(nn.Sequential(ReparamConv(4, 7, [(3, 3)]), nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 8, 8, generator=_generator())
    before = net(x)
    net[0].absorb(net[1])
    _close(net[0](x), before)


def test_norm_is_fused_into_a_convolution_with_bias() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    trained(norm)
    x = torch.randn(2, 3, 8, 8, generator=_generator())
    before = norm(conv(x))
    fuse_norm(conv, norm)
    _close(conv(x), before)


def test_timm_merges_ours() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 1), ReparamConv(4, 7, [(3, 3)])))
    x = torch.randn(2, 3, 8, 8, generator=_generator())
    merged = reparameterize_model(net)
    assert merged[1].merged
    assert not net[1].merged
    _close(merged(x), net(x))


def test_merged_form_is_built_for_merged_checkpoints() -> None:
    conv = trained(ReparamConv(4, 7, [(3, 3)]))
    conv.reparameterize()
    built = ReparamConv(4, 7, [(3, 3)], deploy=True)
    built.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 8, 8, generator=_generator())
    assert torch.equal(built(x), conv(x))


def test_training_mode_is_refused_and_untrained_norms_are_told() -> None:
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        ReparamConv(4, 7, [(3, 3)]).reparameterize()
    with pytest.warns(UserWarning, match="never updated"):
        ReparamConv(4, 7, [(3, 3)]).eval().reparameterize()


@pytest.mark.parametrize(("kernel", "branches"), [(6, ()), (7, [(4, 1)]), (7, [(3, 4)]), (7, [(3, 0)]), (7, [(9, 1)])])
def test_branches_that_cannot_be_centred_are_refused(kernel: int, branches: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="spans"):
        ReparamConv(4, kernel, branches)


def test_outputs_that_the_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="6 output channels: they must be a multiple of 4 groups"):
        ReparamConv(4, 7, out_channels=6)


def test_kernels_that_cannot_be_embedded_are_refused() -> None:
    w = torch.zeros(2, 1, 3, 3)
    for size, dilation in ((4, 1), (5, 3), ((5,), 1)):
        with pytest.raises(ValueError, match="cannot be centred"):
            embed_kernel(w, size, dilation)
    with pytest.raises(ValueError, match="dilation 0"):
        embed_kernel(w, 5, 0)
