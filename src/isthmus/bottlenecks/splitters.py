"""From one wide embedding to many small queries: how the discrete key-value bottleneck (arXiv 2207.11240) splits.

Each maps tokens ``(B, N, D)`` to queries ``(B, C, N, K)``, one for every codebook, and tells ``codebooks`` and ``dim``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import part


@part
@checked
class RandomProjection(nn.Module):
    """A fixed random projection for every codebook; each number of a query weighs the whole embedding, with norm 1.

    Args:
        channels: width D of the embedding.
        codebooks: C.
        dim: width K of a query.

    Raises:
        ValueError: one of them is below 1.
    """

    weight: Tensor

    def __init__(self, channels: Count, codebooks: Count, dim: Count) -> None:
        super().__init__()
        self.channels, self.codebooks, self.dim = channels, codebooks, dim
        self.register_buffer("weight", F.normalize(torch.randn(codebooks, channels, dim), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, C, N, K)``."""
        return torch.einsum("bnd,cdk->bcnk", x, self.weight)


@part
@checked
class Chunk(nn.Module):
    """Channels cut into consecutive blocks, one for every codebook.

    Args:
        channels: width D of the embedding.
        codebooks: C, a divisor of ``channels``.

    Raises:
        ValueError: the channels cannot be cut so.
    """

    def __init__(self, channels: Count, codebooks: Count) -> None:
        super().__init__()
        if channels % codebooks:
            raise ValueError(
                f"{channels} channels cannot be cut into {codebooks} equal chunks; give a divisor of {channels}, or "
                "project with RandomProjection."
            )
        self.channels, self.codebooks, self.dim = channels, codebooks, channels // codebooks

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, C, N, K)``."""
        return x.unflatten(-1, (self.codebooks, self.dim)).transpose(1, 2)


@part
@checked
class LearnedProjection(nn.Module):
    """One linear layer, whose output is ordered with the numbers of a query outside, codebooks inside.

    The lookup passes no gradient on to it: it is learned elsewhere, or stays as it is.

    Args:
        channels: width D of the embedding.
        codebooks: C.
        dim: width K of a query.
        bias: the published one has none; files of other packages do.

    Raises:
        ValueError: one of the numbers is below 1.
    """

    def __init__(self, channels: Count, codebooks: Count, dim: Count, bias: bool = False) -> None:
        super().__init__()
        self.channels, self.codebooks, self.dim = channels, codebooks, dim
        self.proj = nn.Linear(channels, dim * codebooks, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, C, N, K)``."""
        return self.proj(x).unflatten(-1, (self.dim, self.codebooks)).permute(0, 3, 1, 2)
