"""Learning masks: cross entropy of every pixel, at the resolution of the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import Loss


class Segmentation(nn.Module):
    """``decoder(encoder(image))``, brought to the size of ``batch["mask"]``, against it.

    Args:
        encoder: images to a pyramid.
        decoder: the pyramid to logits ``(B, K, h, w)``; a single one is that of 1 against 0, a binary mask.
        ignore: a class that is not learnt (unlabelled pixels); ``None`` learns all.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, ignore: int | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder, self.ignore = encoder, decoder, ignore

    def logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, K, *size)``, of the images' own size without one; a binary mask has K = 2."""
        logits = F.interpolate(self.decoder(self.encoder(images)), size or images.shape[2:], mode="bilinear")
        # The softmax over 0 and z is the sigmoid of z.
        return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """A batch with ``image`` and ``mask`` int64 ``(B, H, W)`` to the loss and the share of right pixels.

        Raises:
            ValueError: a class that the decoder does not have.
        """
        mask: Tensor = batch["mask"]
        logits = self.logits(batch["image"], (mask.shape[1], mask.shape[2]))
        known = torch.ones_like(mask, dtype=torch.bool) if self.ignore is None else mask != self.ignore
        if mask.device.type == "cpu" and bool(known.any()):
            low, high = int(mask[known].min()), int(mask[known].max())
            if not 0 <= low <= high < logits.shape[1]:
                raise ValueError(f"masks hold classes {low} to {high}; the decoder has {logits.shape[1]}, from 0 on.")
        count = known.sum().clamp_min(1)
        loss = F.cross_entropy(logits, mask.where(known, -100), ignore_index=-100, reduction="sum") / count
        right = ((logits.argmax(1) == mask) & known).sum() / count
        return Loss(loss, {"pixel_accuracy": right}, {"logits": logits})
