"""Several objectives on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import Loss


class Together(nn.Module):
    """The sum of objectives that share a batch, and usually an encoder; each brings its own weight.

    ``Together({"spark": SparK(…), "rotation": Rotation(encoder, weight=0.3)})``. Every objective's loss and metrics
    appear under ``<name>_…``; the outputs stay apart, as ``outputs[name]``.

    Args:
        objectives: name → objective without ``turns``.

    Raises:
        ValueError: none is given, or one of them takes turns with several optimisers.
    """

    def __init__(self, objectives: Mapping[str, nn.Module]) -> None:
        super().__init__()
        alternating = [name for name, objective in objectives.items() if hasattr(objective, "turns")]
        if alternating or not objectives:
            raise ValueError(f"Together adds losses of one optimiser; {alternating or 'nothing'} cannot be added.")
        self.objectives = nn.ModuleDict(objectives)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """The batch to the sum of the losses."""
        results: dict[str, Loss] = {name: objective(batch, generator) for name, objective in self.objectives.items()}
        metrics: dict[str, Tensor] = {}
        for name, result in results.items():
            metrics[f"{name}_loss"] = result.loss.detach()
            metrics.update({f"{name}_{key}": value for key, value in result.metrics.items()})
        loss = torch.stack([result.loss for result in results.values()]).sum()
        return Loss(loss, metrics, {name: result.outputs for name, result in results.items()})
