"""Mixing the sensors of a recording by where they are on the head, whatever their number.

Défossez et al. 2023 (arXiv 2208.12266, section 2.3): every output attends to the sensors by a learned function of
their positions, written as a Fourier series over the layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, NonNegative, checked
from isthmus.codec import Condition, part

MISSING = -0.1
"""Both coordinates of a sensor that a recording lacks."""


def fourier(positions: Tensor, dim: int, margin: float = 0.2) -> Tensor:
    """Fourier embedding of places in the unit square or cube.

    With n frequencies an axis, ``phase_ij = 2π (i (x + margin) + j (y + margin)) / (1 + 2 margin)``; all cosines come
    first, then all sines, x varying slowest. The margin keeps opposite edges apart, since the functions are periodic.

    Args:
        positions: ``(..., A)``, A = 2 or 3 axes, in [0, 1].
        dim: D, with (D / 2)^(1 / A) a whole number n.
        margin: around the unit square.

    Returns:
        ``(..., D)``.

    Raises:
        ValueError: no such whole number.
    """
    axes = positions.shape[-1]
    count = frequencies(dim, axes)
    steps = 2 * math.pi / (1 + 2 * margin) * torch.arange(count, device=positions.device, dtype=positions.dtype)
    phase = (positions[..., 0, None] + margin) * steps
    for axis in range(1, axes):
        phase = phase[..., None] + ((positions[..., axis, None] + margin) * steps).view(
            *positions.shape[:-1], *[1] * axis, count
        )
    phase = phase.flatten(-axes)
    return torch.cat([phase.cos(), phase.sin()], -1)


def frequencies(dim: int, axes: int) -> int:
    """How many frequencies an axis has in an embedding of ``dim`` numbers.

    Raises:
        ValueError: the dimension is not 2 n^axes.
    """
    count = round((dim / 2) ** (1 / axes)) if dim > 0 else 0
    if not count or 2 * count**axes != dim:
        raise ValueError(f"an embedding over {axes} axes has 2·n^{axes} numbers, such as {2 * 8**axes}; got {dim}.")
    return count


def missing(positions: Tensor) -> Tensor:
    """Which sensors are not there: ``(..., C)`` bool from positions ``(..., C, A)``."""
    return (positions == MISSING).all(-1)


def within(positions: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Which sensors lie in a disc: ``(..., C)`` bool."""
    return torch.linalg.vector_norm(positions - centre, dim=-1) <= radius


def drop_channels(x: Tensor, positions: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Zero the missing sensors and those in a disc, without rescaling the others; ``x`` is ``(B, C, T)``."""
    kept = ~(missing(positions) | within(positions, centre, radius))
    return x * kept[..., None].to(x.dtype)


def usage_penalty(weights: Tensor, strength: float) -> Tensor:
    """The published penalty on attention ``(…, O, C)``: strength × Σ_c mean weight of sensor c.

    Attention sums to one over sensors, so its value is the strength and its gradient is zero; kept for comparison.
    """
    return strength * weights.flatten(0, -2).mean(0).sum()


@part
@checked
class SpatialAttention(nn.Module):
    """Mix sensors by where they are: output o weighs sensor c by ``softmax_c <head_o, fourier(position_c)>``.

    Weights depend on the layout and not on the signal, so they are made once for each layout of a batch.

    Args:
        channels: O, outputs.
        dim: D, numbers of the position embedding.
        dropout: radius of the disc of sensors that is banned in training, one disc a batch; the softmax makes up for
            it. 0 bans none. A recording whose sensors all lie in the disc keeps them.
        subjects: heads for each of so many subjects; 0 shares them.
        axes: of the positions, 2 or 3.
    """

    conditions = frozenset({"positions", "subject", "centre"})

    def __init__(
        self, channels: Count, dim: Count = 2048, dropout: NonNegative = 0.2, subjects: Natural = 0, axes: Count = 2
    ) -> None:
        super().__init__()
        frequencies(dim, axes)
        if dropout < 0:
            raise ValueError(f"the radius of the banned disc must be 0 or more, got {dropout}.")
        self.dim, self.dropout, self.subjects, self.axes = dim, dropout, subjects, axes
        shape = (subjects, channels, dim) if subjects else (channels, dim)
        self.heads = nn.Parameter(torch.randn(shape) / dim**0.5)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """``(B, C, T)`` with ``positions`` ``(C, A)`` or ``(B, C, A)`` → ``(B, O, T)``."""
        weights = self.weights(condition["positions"], condition.get("subject"), condition.get("centre"))
        if weights.shape[-1] != x.shape[1]:
            raise ValueError(f"there are positions of {weights.shape[-1]} sensors, and the signal has {x.shape[1]}.")
        return weights.to(x.dtype) @ x

    def weights(self, positions: Tensor, subject: Tensor | None = None, centre: Tensor | None = None) -> Tensor:
        """Attention ``(O, C)`` where all samples share a layout and heads, else ``(B, O, C)``.

        Args:
            positions: ``(C, A)`` or ``(B, C, A)``.
            subject: ``(B,)``, for heads of each subject.
            centre: ``(A,)``, of the banned disc; drawn in training where it is left out.

        Raises:
            ValueError: a recording has no sensor at all, or positions have another number of axes.
        """
        if positions.shape[-1] != self.axes:
            raise ValueError(f"positions must have {self.axes} coordinates, got {tuple(positions.shape)}.")
        positions = positions.to(self.heads.dtype)
        if positions.ndim == 3 and not self.subjects:
            if not bool((positions == positions[:1]).all()):
                layouts, place = positions.flatten(1).unique(dim=0, return_inverse=True)
                return self._softmax(layouts.view(-1, *positions.shape[1:]), self.heads, centre)[place]
            positions = positions[0]
        if not self.subjects:
            return self._softmax(positions, self.heads, centre).squeeze(0)
        if subject is None:
            raise ValueError("attention with heads of each subject needs the condition subject.")
        if int(subject.min()) < 0 or int(subject.max()) >= self.subjects:
            raise ValueError(f"attention has heads for subjects 0 to {self.subjects - 1}, got {subject.tolist()}.")
        return self._softmax(positions, self.heads[subject], centre)

    def _softmax(self, positions: Tensor, heads: Tensor, centre: Tensor | None) -> Tensor:
        absent = missing(positions)
        if bool(absent.all(-1).any()):
            raise ValueError("a recording has no sensor with a position; every one has both coordinates at -0.1.")
        banned = absent
        if self.training and self.dropout:
            centre = torch.rand(self.axes, device=positions.device) if centre is None else centre
            disc = within(positions, centre.to(positions), self.dropout)
            left = ~(absent | disc)
            banned = absent | (disc & left.any(-1, keepdim=True))
        scores = heads @ fourier(positions, self.dim).mT
        return scores.masked_fill(banned.unsqueeze(-2), -math.inf).softmax(-1)
