"""Learning labels: a whole classifier, or a head on frozen features."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import Loss


class Classification(nn.Module):
    """Cross entropy of ``head(model(x))`` with ``batch["label"]``, int64 ``(B,)`` or soft ``(B, classes)``.

    Args:
        model: a whole classifier; with a head an encoder, which maps ``batch[key]`` to what the head reads.
        head: gives logits ``(B, classes)``.
        frozen: learn the head alone. The encoder then gets no gradients and stays in evaluation mode, so that batch
            norm neither uses nor changes the statistics of a batch.
        smoothing: label smoothing ε, shared by all classes; soft labels bring their own.
        binary: the mean over classes of binary cross entropies (Wightman et al. 2021, arXiv 2110.00476, section 3).
        key: the batch column that is read.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module | None = None,
        frozen: bool = False,
        smoothing: float = 0.0,
        binary: bool = False,
        key: str = "image",
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False) if frozen else model
        self.head = nn.Identity() if head is None else head
        self.frozen, self.smoothing, self.binary, self.key = frozen, smoothing, binary, key

    def train(self, mode: bool = True) -> Self:
        """Training mode for all that is trained."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def logits(self, x: Any) -> Tensor:
        """Input to logits ``(B, classes)``."""
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            features = self.model(x)
        return self.head(features)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """The batch to the loss and the share of labels that get the highest score (``accuracy``)."""
        logits, label = self.logits(batch[self.key]), batch["label"]
        hard = label if label.ndim == 1 else label.argmax(1)
        accuracy = (logits.detach().argmax(1) == hard).float().mean()
        return Loss(self.loss(logits, label), {"accuracy": accuracy}, {"logits": logits})

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """The mean loss over samples; raises where a label is no class of the logits.

        Raises:
            ValueError: a label outside ``[0, classes)``.
        """
        classes = logits.shape[1]
        on_cpu = label.device.type == "cpu"  # elsewhere the look would hold up the queue
        if on_cpu and label.ndim == 1 and not 0 <= int(label.min()) <= int(label.max()) < classes:
            raise ValueError(f"labels must lie in [0, {classes}), got {int(label.min())} to {int(label.max())}.")
        if not self.binary:
            return F.cross_entropy(logits, label, label_smoothing=self.smoothing if label.ndim == 1 else 0.0)
        if label.ndim == 1:
            label = F.one_hot(label, classes) * (1 - self.smoothing) + self.smoothing / classes
        return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype))
