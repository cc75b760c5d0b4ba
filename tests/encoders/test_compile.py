"""Every architecture is compiled as one graph, and exported with a batch of any size; both give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from isthmus.encoders.images.hornet import HorNet
from isthmus.encoders.images.inceptionnext import mixer_network
from isthmus.encoders.images.unireplknet import UniRepLKNet

DIMS = (8, 16, 32, 64)
# What torch says of itself while it traces: that it makes an instance of an autograd function, and looks into caches.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


def _timm(name: str, **arguments: Any) -> nn.Module:
    return timm.create_model(name, num_classes=3, **arguments)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "hornet": lambda: HorNet((1, 1, 1, 1), DIMS, num_classes=3),
    "hornet with global filters": lambda: HorNet(
        (1, 1, 1, 1), DIMS, filters=[None, None, (4, 3), (2, 2)], num_classes=3
    ),
    "inceptionnext": lambda: mixer_network("inception", (1, 1), (32, 64), mlp_ratios=2.0, num_classes=3),
    "unireplknet": lambda: UniRepLKNet([1, 1], DIMS[:2], [(13,), (3,)], num_classes=3),
    "transnext": lambda: _timm("transnext_micro", depths=(1, 1, 1, 1)),
    "convit": lambda: _timm("convit_tiny", img_size=64, depth=2, local_up_to_layer=1),
    "convit of later sizes": lambda: _timm("convit_tiny_plus", img_size=64, depth=2, local_up_to_layer=1),
    "metamixer": lambda: _timm("metamixer_ffnet_1", depths=(1, 1, 1, 1)),
}


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[request.param]().eval()


@torch.no_grad()
def test_it_is_one_graph(model: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_its_training_pass_is_one_graph(model: nn.Module) -> None:
    model.train()
    for module in model.modules():  # the same statistics in both passes
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    x = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="eager")(x).sum().backward()
    compiled = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).sum().backward()
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_it_is_exported_for_any_batch(model: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (1, 5):
        other = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)
