"""A relevance pass beside one gradient pass and beside zennit; and what a pruned network costs before and after.

    python -m benchmarks.lrp_pruning_speed

The paper says that scoring by relevance costs about one gradient pass. Counted in convolutions of one size, a pass
forwards and the gradient of activations are two, the gradient of weights is a third; relevance by the positive rule is
three (forwards, the positive part of it, and its transpose), five where inputs are negative. Zennit's composite with
the same rule gives the same numbers (checked before timing) on a network of convolutions and ReLUs; it hooks modules,
ours intercepts functions. One process, one thread.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import compare, record, table
from isthmus.compression.relevance_pruning import compress
from isthmus.lenses.relevance import Composite, relevance, resting
from isthmus.lenses.relevance_rules import Epsilon, Positive

SIDE, BATCH = 64, 8


def gradient(model: nn.Module, x: Tensor, label: Tensor, weights: bool) -> Tensor:
    """One pass forwards and back, of activations alone or of weights too."""
    if weights:
        F.cross_entropy(model(x), label).backward()
        model.zero_grad()
        return x
    with resting(model):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(leaf), label), leaf)[0]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from zennit.composites import EpsilonPlus

    x, label = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % 10
    plain: Any = timm.create_model("vgg11", num_classes=10).eval()
    plain = nn.Sequential(plain.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10, bias=False)).eval()
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None
    rules, theirs = Composite(Positive(), Epsilon()), EpsilonPlus(zero_params=["bias"])
    a, b = relevance(plain, x, label, rules).input, relevance(plain, x, label, theirs).input
    off = float((a - b).abs().max() / b.abs().max())
    assert off < 1e-3, f"zennit and ours differ by {off:.1e}"
    rows = compare(
        {
            "vgg, gradient of activations": lambda: gradient(plain, x, label, False),
            "vgg, gradient of activations and weights": lambda: gradient(plain, x, label, True),
            "vgg, relevance": lambda: relevance(plain, x, label, rules),
            "vgg, relevance by zennit": lambda: relevance(plain, x, label, theirs),
        },
        rounds=5,
    )
    model = timm.create_model("resnet18", num_classes=10).eval()
    rows |= compare(
        {
            "resnet18, gradient of activations": lambda: gradient(model, x, label, False),
            "resnet18, gradient of activations and weights": lambda: gradient(model, x, label, True),
            "resnet18, relevance, norms folded": lambda: relevance(model, x, label),
        },
        rounds=5,
    )
    small = compress(model, x, [(x, label)], keep=0.5, step=0.25)
    with torch.no_grad():
        rows |= compare(
            {"resnet18, whole": lambda: model(x), "resnet18, half of its filters": lambda: small.model(x)}, rounds=5
        )
    print(table(rows))
    cost = {"before": small.report["before"], "after": small.report["after"]}
    print(cost)
    record("lrp_pruning_speed", rows, side=SIDE, batch=BATCH, pruned=cost, apart_from_zennit=off)


if __name__ == "__main__":
    main()
