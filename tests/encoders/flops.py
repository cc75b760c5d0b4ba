"""Multiply-adds of networks, counted as papers count them, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(
    model: nn.Module, size: int, extra: Mapping[type[nn.Module], float] | None = None, only: str = ""
) -> float:
    """Multiply-adds of one image of ``size`` pixels, in 1e9.

    Args:
        model: on the meta device.
        size: side of the image.
        extra: operations per output value of kinds of layers, which some counters add to products and convolutions.
        only: operators of torch to count, such as ``"mm addmm"``; all without it.
    """
    added = 0.0

    def listen(each: float) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal added
            added += each * output.numel()

        return hook

    hooks = [
        module.register_forward_hook(listen(each))
        for kind, each in (extra or {}).items()
        for module in model.modules()
        if isinstance(module, kind)
    ]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()["Global"]
    wanted = [f"aten.{name}" for name in only.split()]
    return (sum(n for op, n in counts.items() if not wanted or str(op) in wanted) / 2 + added) / 1e9


def agrees(measured: float, published: str) -> bool:
    """Whether a value rounds to the published digits, or is within one percent."""
    digits = len(published.partition(".")[2])
    return f"{measured:.{digits}f}" == published or abs(measured - float(published)) <= 0.01 * float(published)
