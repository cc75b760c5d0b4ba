"""Learning to tell what follows in series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import Loss


class Forecasting(nn.Module):
    """Mean squared error of ``model(past)`` against what follows, both parts of ``batch["signal"]``.

    Args:
        model: ``(B, M, history)`` → ``(B, M, horizon)``.
        history: values that are read; the rest of a window is to be told.

    Metrics: ``mae``, the mean absolute error.

    Raises:
        ValueError: a history below 1; in ``forward``, windows with nothing to tell.
    """

    def __init__(self, model: nn.Module, history: int) -> None:
        super().__init__()
        if history < 1:
            raise ValueError(f"history {history}: at least one value is read.")
        self.model, self.history = model, history

    def split(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        """A window ``(B, M, L)`` → past ``(B, M, history)`` and future."""
        if signal.shape[-1] <= self.history:
            raise ValueError(f"windows of {signal.shape[-1]} values leave nothing to tell after {self.history}.")
        return signal[..., : self.history], signal[..., self.history :]

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """The batch to the loss; ``outputs`` are the forecasts."""
        past, future = self.split(batch["signal"])
        told = self.model(past)
        error = told - future
        return Loss(error.square().mean(), {"mae": error.detach().abs().mean()}, {"forecast": told.detach()})
