"""Latent quantisation: every latent takes the nearest value of a small table of its own (Hsu et al., arXiv 2305.18378).

    bottleneck = LatentQuantization(latents=12, values=10)
    code = bottleneck([z])                # z (B, 12): code.features [(B, 12)], code.indices (B, 12), code.loss
    z = bottleneck.embed(code.indices)    # back from the numbers

Behind any other encoder, ``LatentQuantization(12, channels=512)`` averages the deepest level over its places and maps
it to the latents first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from isthmus.bottlenecks.latents import LatentHead
from isthmus.bounds import Count, NonNegative, checked
from isthmus.codec import Code, part
from isthmus.layers.straight_through import straight_through


@part
@checked
class LatentQuantization(nn.Module):
    """One table of scalars a latent; the decoder sees the nearest values, gradients pass straight to the encoder.

    No gradient of the decoder reaches the tables: they move by the quantisation loss alone (section 3 of the paper).

    Args:
        latents: number L of latents.
        values: V, how many values a table has; or one number for every latent.
        channels: of the level that is averaged and mapped to the latents by a linear layer; without it, the level has
            L channels and every place of it is quantised.
        quantization: weight of ``mean_l (sg(z) - z_q)²``, which draws table values to the latents.
        commitment: weight of ``mean_l (z - sg(z_q))²``, which draws latents to table values.
        learned: tables move in training; else they stay where they begin, evenly spread over [-0.5, 0.5].
        shared: all latents use one table, for comparison.

    Shapes: ``[(B, L)]``, ``[(B, N, L)]`` or ``[(B, L, H, W)]`` → the same, ``indices`` with latents last; ``[(B, L)]``
    from any pyramid where ``channels`` is given. ``bits`` is ``(B,)``, the logarithms of the tables' sizes.

    Raises:
        ValueError: a level of another width, numbers that are not finite, or no latents or values.
    """

    valid: Tensor

    def __init__(
        self,
        latents: Count,
        values: Count | Sequence[Count] = 10,
        channels: Count | None = None,
        quantization: NonNegative = 0.01,
        commitment: NonNegative = 0.01,
        learned: bool = True,
        shared: bool = False,
    ) -> None:
        super().__init__()
        sizes = [values] * latents if isinstance(values, int) else list(values)
        if latents < 1 or len(sizes) != latents or min(sizes, default=0) < 1:
            raise ValueError(f"give at least one latent and, for each, at least one value; got {latents} and {values}.")
        if shared and len(set(sizes)) > 1:
            raise ValueError(f"one shared table has one size, got {sizes}.")
        self.latents, self.sizes, self.num_codes = latents, sizes, max(sizes)
        self.quantization, self.commitment, self.shared = quantization, commitment, shared
        self.head = LatentHead(latents, channels)
        rows = sizes[:1] if shared else sizes
        tables = torch.zeros(len(rows), self.num_codes)
        for row, size in zip(tables, rows, strict=True):
            row[:size] = torch.linspace(-0.5, 0.5, size)
        self.tables = nn.Parameter(tables, requires_grad=learned)
        valid = torch.arange(self.num_codes) < torch.tensor(rows)[:, None]
        self.register_buffer("valid", valid, persistent=False)

    def forward(self, features: list[Tensor]) -> Code:
        """Quantise the last level."""
        z = self.head(features[-1])
        if not self.training and not torch.isfinite(z).all():  # training watches its loss, and need not wait for this
            raise ValueError("latents are NaN or infinite; training has diverged, or the input holds such numbers.")
        index, quantised = self.nearest(z)
        pulls = self.pulls(z, quantised)
        loss = self.quantization * pulls[0].mean() + self.commitment * pulls[1].mean()
        bits = torch.full((len(z),), sum(math.log2(size) for size in self.sizes), device=z.device)
        passed = straight_through(z, quantised.detach())
        return Code([self.head.restore(passed, features[-1])], index, loss, bits * (index[0].numel() // self.latents))

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and values of the nearest entries for latents ``(…, L)``; the first on ties."""
        distance = (z.detach()[..., None] - self.tables.detach()).abs()
        if len(set(self.sizes)) > 1:
            distance = distance.masked_fill(~self.valid, torch.inf)
        index = distance.argmin(-1)
        return index, self.look_up(index)

    def look_up(self, index: Tensor) -> Tensor:
        """Values ``(…, L)`` of numbers ``(…, L)``, with gradient to the tables."""
        offset = 0 if self.shared else torch.arange(self.latents, device=index.device) * self.num_codes
        return self.tables.flatten()[index + offset]

    def pulls(self, z: Tensor, quantised: Tensor) -> tuple[Tensor, Tensor]:
        """The two squared distances, quantisation and commitment, each averaged over latents: ``(…,)``."""
        return (z.detach() - quantised).square().mean(-1), (z - quantised.detach()).square().mean(-1)

    def embed(self, indices: Tensor) -> list[Tensor]:
        """What the decoder gets for numbers ``(B, L)`` or ``(B, N, L)``.

        Raises:
            ValueError: a number that a table does not have, or another count of latents.
        """
        if indices.shape[-1] != self.latents:
            raise ValueError(f"indices have {self.latents} latents last, got {tuple(indices.shape)}.")
        sizes = torch.tensor(self.sizes, device=indices.device)
        if indices.numel() and not bool(((indices >= 0) & (indices < sizes)).all()):
            raise ValueError(f"indices must lie in [0, {self.num_codes}), got {int(indices.min())} and more.")
        return [self.look_up(indices)]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Codes ``(count, L)`` with every latent drawn evenly from its table: numbers, for :meth:`look_up`."""
        u = torch.rand(count, self.latents, generator=generator, device=generator.device).to(self.tables.device)
        sizes = torch.tensor(self.sizes, device=u.device)
        return torch.minimum((u * sizes).long(), sizes - 1)


def from_official(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tables, ``_values_per_latent.0`` and so on, as our ``tables``; shorter ones are filled with 0."""
    rows = [torch.as_tensor(params[f"_values_per_latent.{i}"]) for i in range(len(params))]
    return {"tables": nn.utils.rnn.pad_sequence(rows, batch_first=True)}
