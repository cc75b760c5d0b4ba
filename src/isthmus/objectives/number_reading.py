"""Learning to read numbers: the exact log-likelihood of length and digits (arXiv 1312.6082, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import Loss


class NumberReading(nn.Module):
    """``batch["image"]`` and ``batch["labels"]``, the digits of every image as int64 ``(K,)``, to a loss.

    Args:
        encoder: images to a pyramid.
        decoder: the pyramid to ``(length, digits)`` logits.
        targets: digits of every image → ``length (B,)``, ``digits (B, N)``.
        likelihood: ``(scores, length, digits)`` → losses ``(B,)``.
        read: scores → a reading; ``right(reading, length, digits)`` says which are right.
        right: see there.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, targets: Any, likelihood: Any, read: Any, right: Any
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.targets, self.likelihood, self.read, self.right = targets, likelihood, read, right

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """The mean loss, and the share of numbers that are read right in every digit (``accuracy``)."""
        image: Tensor = batch["image"]
        scores = self.decoder(self.encoder(image))
        length, digits = (each.to(image.device) for each in self.targets(batch["labels"]))
        loss = self.likelihood(scores, length, digits).mean()
        with torch.no_grad():
            accuracy = self.right(self.read(scores), length, digits).float().mean()
        return Loss(loss, {"accuracy": accuracy}, {"scores": scores})
