"""From a level of features to a vector of latents: what the bottlenecks of a few numbers share.

``LatentHead`` brings a level into the form ``(…, L)``; ``PlainLatents`` pass it on. ``GaussianLatents`` are those of a
variational autoencoder (β-VAE, ICLR 2017; β-TCVAE, arXiv 1802.04942); ``FSQ`` rounds bounded latents to a fixed grid
(arXiv 2309.15505).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, NonNegative, Positive, checked
from isthmus.codec import Code, part
from isthmus.layers.pool import as_tokens
from isthmus.layers.straight_through import straight_through


class LatentHead(nn.Module):
    """A level as latents ``(…, width)``: as it is with channels last, or averaged over places and mapped linearly.

    Args:
        width: numbers wanted.
        channels: of the level, where it is to be averaged and mapped.

    Raises:
        ValueError: a level of another width.
    """

    def __init__(self, width: int, channels: int | None = None) -> None:
        super().__init__()
        self.width, self.channels = width, channels
        self.linear = None if channels is None else nn.Linear(channels, width)

    def forward(self, level: Tensor) -> Tensor:
        """``(B, C)``, ``(B, N, C)`` or ``(B, C, H, W)`` to latents."""
        want = self.width if self.channels is None else self.channels
        have = level.shape[1] if level.ndim == 4 else level.shape[-1]
        if level.ndim not in (2, 3, 4) or have != want:
            hint = "" if self.channels is not None else f" Give channels={have} to map any level to the latents."
            raise ValueError(f"the level should have {want} channels, got {tuple(level.shape)}.{hint}")
        if self.linear is None:
            return level.movedim(1, -1) if level.ndim == 4 else level
        return self.linear(level if level.ndim == 2 else as_tokens(level).mean(1))

    def restore(self, z: Tensor, level: Tensor) -> Tensor:
        """Latents ``(…, L)`` in the layout of the level that they come from."""
        return z.movedim(-1, 1) if level.ndim == 4 and self.linear is None else z


@part
@checked
class PlainLatents(nn.Module):
    """Latents as they are, those of an ordinary autoencoder.

    Args:
        latents: L.
        channels: as of :class:`isthmus.bottlenecks.latent_quantization.LatentQuantization`.

    Shapes: ``[(B, L)]`` → the same.
    """

    def __init__(self, latents: Count, channels: Count | None = None) -> None:
        super().__init__()
        self.latents = latents
        self.head = LatentHead(latents, channels)

    def forward(self, features: list[Tensor]) -> Code:
        """The last level, mapped where ``channels`` say so."""
        z = self.head(features[-1])
        return Code([self.head.restore(z, features[-1])], None, z.new_zeros(()))


@part
@checked
class GaussianLatents(nn.Module):
    """Latents of a variational autoencoder: a mean and a variance each, sampled in training, the mean otherwise.

    The loss is ``beta * KL / scale`` (β-VAE); with ``total_correlation``, of the three terms that KL falls into
    (index-code mutual information, total correlation, dimension-wise KL) only the second is multiplied by β, each
    estimated by stratified sampling within the batch (β-TCVAE, appendix C).

    Args:
        latents: L; the level has 2 L channels, means first, unless ``channels`` maps it.
        beta: β.
        channels: as of :class:`isthmus.bottlenecks.latent_quantization.LatentQuantization`.
        total_correlation: β-TCVAE.
        samples: size of the data set, which β-TCVAE's estimate needs.
        scale: what the loss is divided by, the number of pixels where the reconstruction is a mean over those.

    Shapes: ``[(B, 2 L)]`` → ``[(B, L)]``.

    Raises:
        ValueError: β-TCVAE without the size of the data.
    """

    def __init__(
        self,
        latents: Count,
        beta: NonNegative = 4.0,
        channels: Count | None = None,
        total_correlation: bool = False,
        samples: Natural = 0,
        scale: Positive = 1.0,
    ) -> None:
        super().__init__()
        if total_correlation and samples < 1:
            raise ValueError(f"β-TCVAE needs the number of training samples, got {samples}.")
        self.latents, self.beta, self.total_correlation = latents, beta, total_correlation
        self.samples, self.scale = samples, scale
        self.head = LatentHead(2 * latents, channels)

    def forward(self, features: list[Tensor]) -> Code:
        """Sample in training mode (from torch's generator, which the training loop seeds), else take the mean."""
        mean, log_variance = self.head(features[-1]).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        flat = [x.reshape(-1, self.latents) for x in (z, mean, log_variance)]
        if self.total_correlation:
            loss = self._decomposed(*flat)
        else:
            kl = 0.5 * (flat[1].square() + flat[2].exp() - 1 - flat[2]).sum(1)
            loss = self.beta * kl.mean()
        return Code([self.head.restore(z, features[-1])], None, loss / self.scale)

    def _decomposed(self, z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        count = len(z)
        of_own = _log_normal(z, mean, log_variance).sum(1)
        prior = _log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
        pairs = _log_normal(z[:, None], mean[None], log_variance[None])  # (B, B, L), sample by posterior
        weights = _stratified(count, max(self.samples, count), z)
        joint = torch.logsumexp(weights + pairs.sum(2), 1)
        single = torch.logsumexp(weights[..., None] + pairs, 1).sum(1)
        return (of_own - joint + self.beta * (joint - single) + single - prior).mean()


@part
@checked
class FSQ(nn.Module):
    """Finite scalar quantisation: latents are bounded by tanh and rounded to a fixed grid of ``values`` levels.

    Args:
        latents: L.
        values: levels V of every latent, or one number for each.
        channels: as of :class:`isthmus.bottlenecks.latent_quantization.LatentQuantization`.
        normalise: bring the latents of a sample to mean 0 and deviation 1 before the tanh. Nothing
            else holds them back: where all samples first want the same, they run into its flat ends and stay there.

    Shapes: as of LatentQuantization; what passes lies in [-1, 1].

    Raises:
        ValueError: too few latents or levels; a level of another width.
    """

    levels: Tensor

    def __init__(
        self,
        latents: Count,
        values: Count | Sequence[Count] = 10,
        channels: Count | None = None,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        sizes = [values] * latents if isinstance(values, int) else list(values)
        if latents < 1 or len(sizes) != latents or min(sizes) < 2:
            raise ValueError(f"give at least one latent and, for each, at least two levels; got {latents}, {values}.")
        if normalise and latents < 2:
            raise ValueError("a single latent that is normalised is always 0; give two or more, or normalise=False.")
        self.latents, self.sizes, self.num_codes, self.normalise = latents, sizes, max(sizes), normalise
        self.head = LatentHead(latents, channels)
        self.register_buffer("levels", torch.tensor(sizes), persistent=False)

    def forward(self, features: list[Tensor]) -> Code:
        """Round the last level."""
        z = self.head(features[-1])
        z = F.layer_norm(z, (self.latents,)) if self.normalise else z
        # tanh spreads over half a step more than the outer levels on either side, so that these are reached.
        half = (self.levels - 1) / 2 * 1.001
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        bounded = (z + (offset / half).atanh()).tanh() * half - offset
        rounded = straight_through(bounded, bounded.detach().round())
        index = (rounded.detach() + self.levels // 2).long()
        middle = (self.levels - 1) / 2 - self.levels // 2
        passed = (rounded - middle) / ((self.levels - 1) / 2)
        bits = torch.full((len(z),), sum(math.log2(size) for size in self.sizes), device=z.device)
        bits = bits * (index[0].numel() // self.latents)
        return Code([self.head.restore(passed, features[-1])], index, z.new_zeros(()), bits)

    def embed(self, indices: Tensor) -> list[Tensor]:
        """What the decoder gets for numbers ``(…, L)``."""
        return [indices / ((self.levels - 1) / 2) - 1]


def _log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * ((x - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def _stratified(count: int, samples: int, like: Tensor) -> Tensor:
    """Log weights ``(B, B)`` of every sample's posterior in the estimate of q(z): its own counts 1 in ``samples``."""
    if count == 1:
        return like.new_zeros(1, 1)
    own, other = 1 / samples, (samples - 1) / samples / (count - 1)
    weights = torch.full((count, count), other, dtype=like.dtype, device=like.device)
    return weights.fill_diagonal_(own).log()
