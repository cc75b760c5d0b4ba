"""Images made again from what is left of them: the objective of super-resolution and of autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import Loss


class Restoration(nn.Module):
    """Mean squared error between what a network makes of ``degrade(image)`` and the image.

    Args:
        network: degraded images to images ``(B, C, H, W)``.
        degrade: of images ``(B, C, H, W)``.
    """

    def __init__(self, network: nn.Module, degrade: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.degrade = network, degrade

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """A batch with ``image`` to the loss."""
        restored = self.network(self.degrade(batch["image"]))
        return Loss(F.mse_loss(restored, batch["image"]), {}, {"image": restored})
