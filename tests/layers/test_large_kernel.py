"""The fast depthwise convolution equals ``conv2d`` in outputs and in every kind of derivative."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from isthmus.layers.large_kernel import Backend, DepthwiseConv

CASES = [
    # kernel, dilation, map: below and above the limits at which the route changes, kernels larger than the map
    (3, 1, (9, 9)),
    (5, 1, (7, 10)),
    (3, 5, (14, 12)),
    (7, 2, (9, 16)),
    (13, 1, (6, 14)),
    ((11, 13), 1, (14, 13)),
    ((1, 11), 1, (8, 9)),
    (15, 1, (10, 7)),
    (31, 1, (48, 50)),
    # taps that no cell of the map meets, down to a single one that is left
    (13, 1, (4, 4)),
    (7, 2, (3, 4)),
    (3, 5, (4, 9)),
    (3, 4, (4, 4)),
    (7, 1, (1, 1)),
    ((5, 13), 1, (9, 1)),
]


def _map(*shape: int, last: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _results(module: DepthwiseConv, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    wave = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * wave).sum(), [x, module.weight, module.bias])]


def _close(got: list[Tensor], want: list[Tensor], bound: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) <= bound * max(float(b.detach().abs().max()), 1.0)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("kernel", "dilation", "size"), CASES, ids=str)
def test_every_backend_computes_conv2d_and_its_gradients(
    kernel: int | tuple[int, int], dilation: int, size: tuple[int, int], last: bool
) -> None:
    module, x = DepthwiseConv(6, kernel, "direct", dilation=dilation), _map(3, 6, *size, last=last)
    want = _results(module, x)
    backends: tuple[Backend, ...] = ("auto", "fft") if dilation == 1 else ("auto",)
    for backend in backends:
        module.backend = backend
        _close(_results(module, x), want)
        with torch.no_grad():
            _close([module(x)], want[:1])


def test_second_derivatives_are_right() -> None:
    """Gradient penalties and some lenses differentiate a gradient."""
    module, x = DepthwiseConv(4, 7), _map(2, 4, 8, 8).requires_grad_()
    found = []
    for backend in ("auto", "direct"):
        module.backend = backend
        (first,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        found.append(list(torch.autograd.grad(first.pow(2).sum(), [x, module.weight])))
    _close(*found)


@pytest.mark.parametrize("kernel", [7, 13, 15])
def test_per_sample_gradients_by_vmap(kernel: int) -> None:
    module, x = DepthwiseConv(4, kernel), _map(3, 4, 8, 8)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)["weight"]
    for sample, got in zip(x, each, strict=True):
        _close([got], [grad(loss)(parameters, sample)["weight"]])


def test_stride_keeps_every_second_cell() -> None:
    module, x = DepthwiseConv(4, 5), _map(2, 4, 9, 12)
    strided = DepthwiseConv(4, 5, stride=2)
    strided.load_state_dict(module.state_dict())
    _close([strided(x)], [module(x)[..., ::2, ::2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    module = DepthwiseConv(4, 13).to(dtype)
    assert module(_map(1, 4, 9, 9).to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(DepthwiseConv(4, 13)(_map(1, 4, 9, 9))).all()


def test_it_is_a_conv2d_for_checkpoints_counters_and_exporters() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module, x = DepthwiseConv(4, 13), _map(1, 4, 10, 10)
    torch.nn.Conv2d(4, 4, 13, padding=6, groups=4).load_state_dict(module.state_dict())
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 169 * 4 * 100
    exported = torch.export.export(copy.deepcopy(module).eval(), (x,)).module()
    _close([exported(x)], [module(x)])


def test_what_cannot_be_centred_is_refused() -> None:
    for arguments in ({"kernel": 4}, {"kernel": 0}, {"kernel": (5, 6)}, {"kernel": 5, "dilation": 0}):
        with pytest.raises(ValueError, match="odd kernel"):
            DepthwiseConv(4, **arguments)
    with pytest.raises(ValueError, match="stride 1"):
        DepthwiseConv(4, 5, "fft", stride=2)
