"""One vector a picture (or one a place) from any encoder: what streams of embeddings are made of."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import FeatureInfo, part
from isthmus.layers.pool import as_tokens


@part
@checked
class Embedding(nn.Module):
    """The deepest level of an encoder as tokens, averaged or laid out flat, minus a mean.

    Args:
        encoder: ``Backbone("resnet50")``, ``Pixels()``, any encoder.
        channels: numbers D of a token.
        pool: ``mean`` of all places, all numbers laid out ``flat``, or every place a token of its own (``none``).
        grey: average the channels first, for pixels.

    Attributes:
        mean: buffer ``(D,)``, subtracted; :meth:`centre` measures it.
    """

    mean: Tensor

    def __init__(
        self, encoder: nn.Module, channels: Count, pool: Literal["mean", "flat", "none"] = "mean", grey: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.channels, self.pool, self.grey = encoder, channels, pool, grey
        self.feature_info = [FeatureInfo(channels, 1, "NTC")]
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to ``[(B, N, D)]``, with N = 1 where places are pooled or flat.

        Raises:
            ValueError: another number of channels comes out of the encoder.
        """
        level = self.encoder(x)[-1]
        level = level.mean(1, keepdim=True) if self.grey else level
        tokens = level.flatten(1)[:, None] if self.pool == "flat" else as_tokens(level)
        tokens = tokens.mean(1, keepdim=True) if self.pool == "mean" else tokens
        if tokens.shape[-1] != self.channels:
            raise ValueError(f"embeddings have {self.channels} numbers, got {tokens.shape[-1]} from {tuple(x.shape)}.")
        return [tokens - self.mean.to(tokens.dtype)]

    @torch.no_grad()
    def centre(self, embeddings: Tensor) -> None:
        """Take the mean of embeddings ``(M, N, D)``, as they come out now, into ``mean``."""
        self.mean.add_(embeddings.flatten(0, -2).mean(0).to(self.mean))
