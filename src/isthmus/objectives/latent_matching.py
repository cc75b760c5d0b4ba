"""Learn to predict the latent of what was seen: find it among others, and hit it.

Benchetrit, Banville, King (arXiv 2310.19812), section 2: ``L = λ L_CLIP + (1 - λ) L_MSE`` with λ = 0.75; the
contrastive term reads the retrieval head, the regression the generation head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.codec import Loss
from isthmus.layers.random import rows
from isthmus.objectives.contrastive import Side, contrastive_loss


class LatentMatching(nn.Module):
    """Loss of ``codec(signal, condition).prediction`` (two latents) against ``batch["latent"]`` ``(B, F)``.

    Args:
        codec: encoder and heads; gets the conditions subject and positions from the batch.
        scale: maps ``(signal, subject)`` to the scaled signal, not trained; the identity where left out.
        weight: λ, of the contrastive term.
        normalize, symmetric, temperature: of the contrastive term; ``temperature`` learns 1/τ from 1/0.07.
        noise: sd of what is added to the scaled signal in training.
    """

    def __init__(
        self,
        codec: nn.Module,
        scale: nn.Module | None = None,
        weight: float = 0.75,
        normalize: Side = "both",
        symmetric: bool = True,
        temperature: bool = True,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1 or noise < 0:
            raise ValueError(f"weight must lie in [0, 1] and noise be 0 or more, got {weight} and {noise}.")
        self.codec, self.scale = codec, scale
        self.normalize: Side = normalize
        self.weight, self.symmetric, self.noise = weight, symmetric, noise
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07) if temperature else 0.0), temperature)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """``signal`` ``(B, C, T)``, ``subject`` ``(B,)``, ``positions`` and ``latent`` to the loss and its terms."""
        signal, target = batch["signal"], batch["latent"]
        condition = {key: batch[key] for key in ("subject", "positions") if key in batch}
        if self.scale is not None:
            signal = self.scale(signal, batch.get("subject"))
        if self.training:
            # The same disc for all processes that share a batch, as if there were one.
            condition["centre"] = torch.rand(condition["positions"].shape[-1] if "positions" in condition else 2,
                                             generator=generator).to(signal.device)  # fmt: skip
            if self.noise:
                drawn = rows(lambda n: torch.randn(n, *signal.shape[1:], generator=generator), len(signal), generator)
                signal = signal + self.noise * drawn.to(signal)
        latents = self.codec(signal, condition).prediction
        clip = contrastive_loss(
            latents.retrieval, target, self.log_scale.exp(), self.normalize, symmetric=self.symmetric
        )
        mse = F.mse_loss(latents.generation.float(), target.float())
        loss = self.weight * clip + (1 - self.weight) * mse
        return Loss(loss, {"contrastive": clip.detach(), "regression": mse.detach()}, {"latents": latents})
