"""Losses of two networks that play against each other, as functions of a critic and two batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Critique(NamedTuple):
    """What a Wasserstein critic is trained by; its loss is ``(value + weight * penalty).mean()``.

    Attributes:
        value: ``critic(fake) - critic(real)``, as the critic gives it, ``(B, 1)`` or ``(B,)``.
        penalty: ``(‖∇_x critic(x)‖₂ - 1)²`` at points between real and fake, ``(B,)``.
    """

    value: Tensor
    penalty: Tensor


def wgan_gp(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, epsilon: Tensor) -> Critique:
    """Wasserstein critic with gradient penalty (Gulrajani et al., arXiv 1704.00028, equation 3).

    Args:
        critic: samples ``(B, …)`` to values ``(B, 1)`` or ``(B,)``; one sample's value must not depend on the others.
        real, fake: ``(B, …)``; no gradient goes into what made ``fake``.
        epsilon: share of the real sample at the point of the penalty, in [0, 1], one a sample: ``(B, 1, 1, 1)``.

    Raises:
        ValueError: batches of different shapes.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real and fake samples must be alike, got {tuple(real.shape)} and {tuple(fake.shape)}.")
    fake = fake.detach()
    between = (epsilon * real + (1 - epsilon) * fake).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    # The norm's own derivative is infinite at 0; this keeps a dead critic trainable.
    norm = (slope.flatten(1).square().sum(1) + 1e-24).sqrt()
    return Critique(critic(fake) - critic(real), (norm - 1).square())
