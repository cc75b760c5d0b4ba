"""Square roots that every machine rounds alike, as IEEE 754 asks.

``torch.sqrt`` on the CPU goes through a vendor's vector mathematics, which is an ulp off on some processors; numpy's
square root is the processor's own instruction, correctly rounded everywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square roots, on the device and in the precision of ``x`` (float32 or float64)."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else torch.sqrt(x)
