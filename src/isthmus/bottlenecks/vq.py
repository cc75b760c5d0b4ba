"""Vector quantisation: every place of a map becomes the number of its nearest code (VQ-VAE, arXiv 1711.00937).

``VQ(codes=512, dim=64)`` between a convolutional encoder and decoder is an image tokenizer::

    codec = Codec(ConvTokenizer(dim=16), VQ(64, 16), ConvDetokenizer(dim=16))
    tokens = codec.encode(images).indices  # (B, h, w)
    images = codec.decoder(codec.bottleneck.embed(tokens))
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, NonNegative, Share, checked
from isthmus.codec import Code, part
from isthmus.layers.codebook import EMACodebook
from isthmus.layers.straight_through import straight_through


@part
@checked
class VQ(nn.Module):
    """Replaces every vector of a pyramid of one level by the nearest code; gradients pass straight through.

    In training mode the codes follow a moving average of the vectors that chose them (appendix A.1 of the paper),
    starting from k-means of the first batch, and codes that win almost nothing are put on vectors of the batch.

    Args:
        codes: number of codes K.
        dim: channels of the map.
        commitment: weight β of ‖x - code‖², the encoder's share of the loss.
        decay: of the moving average.
        threshold: vectors a step that a code has to win to stay; 0 keeps all.

    Shapes: ``[(B, dim, H, W)]`` or ``[(B, N, dim)]`` → the same, ``indices`` ``(B, H, W)`` or ``(B, N)``, ``bits``
    ``(B,)``, H·W·log2 K.

    Raises:
        ValueError: a pyramid of several levels or another width; fewer than two codes.
    """

    started: Tensor

    def __init__(
        self,
        codes: Count,
        dim: Count,
        commitment: NonNegative = 0.25,
        decay: Share = 0.97,
        threshold: NonNegative = 0.5,
    ) -> None:
        super().__init__()
        if codes < 2:
            raise ValueError(f"a code book needs at least two codes, got {codes}.")
        self.num_codes, self.dim, self.commitment = codes, dim, commitment
        self.codebook = EMACodebook(codes, dim, decay=decay, threshold=threshold)
        self.register_buffer("started", torch.tensor(False))

    def forward(self, features: list[Tensor]) -> Code:
        """Quantise; in training mode the codes learn as well."""
        x = self._last(features)
        vectors = x.detach().reshape(-1, self.dim)
        if self.training:
            if not bool(self.started):
                self.codebook.start(vectors.float(), steps=10)
                self.started.fill_(True)
            self.codebook.update(vectors)
        index, _ = self.codebook(vectors)
        quantised = self.codebook.codes[index].view_as(x).to(x.dtype)
        loss = self.commitment * F.mse_loss(x.float(), quantised.float())
        index = index.view(x.shape[:-1])
        bits = torch.full((len(x),), index[0].numel() * math.log2(self.num_codes), device=x.device)
        passed = straight_through(x, quantised)
        return Code([passed.movedim(-1, 1) if features[0].ndim == 4 else passed], index, loss, bits)

    def embed(self, indices: Tensor) -> list[Tensor]:
        """What the decoder gets for indices ``(B, H, W)`` or ``(B, N)``.

        Raises:
            ValueError: an index that is no code.
        """
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_codes:
            low, high = int(indices.min()), int(indices.max())
            raise ValueError(f"indices must lie in [0, {self.num_codes}), got {low} to {high}.")
        found = self.codebook.codes[indices]
        return [found.movedim(-1, 1) if indices.ndim == 3 else found]

    def _last(self, features: list[Tensor]) -> Tensor:
        """The level with channels last."""
        axis = 1 if features[0].ndim == 4 else -1
        if len(features) != 1 or features[0].ndim not in (3, 4) or features[0].shape[axis] != self.dim:
            told = ", ".join(str(tuple(level.shape)) for level in features)
            raise ValueError(f"VQ takes one level (B, {self.dim}, H, W) or (B, N, {self.dim}), got {told}.")
        return features[0].movedim(1, -1) if features[0].ndim == 4 else features[0]
