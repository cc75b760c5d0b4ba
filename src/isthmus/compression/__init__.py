"""Make a network smaller: relevance pruning, learned codebooks, one-way filters, fixed point.

Everything here is ``compress(model, example, calibration=None) -> Compressed``, and the result runs as a plain module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Compressed:
    """A smaller network.

    Attributes:
        model: runs as the one it was made from did.
        bits: what its parameters and buffers take.
        report: what was done to it, as plain data.
    """

    model: nn.Module
    bits: int
    report: dict[str, Any] = field(default_factory=dict)


def bits_of(model: nn.Module) -> int:
    """Bits of a module's parameters and of the buffers that are saved; shared ones count once."""
    tensors = {t.data_ptr() if t.numel() else id(t): t for t in model.state_dict().values()}
    return sum(8 * t.numel() * t.element_size() for t in tensors.values())
