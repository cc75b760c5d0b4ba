"""Rules of layer-wise relevance propagation: how a layer hands the relevance of its outputs to its inputs.

A layer with inputs x and weights w makes z = Σ x·w. Every rule here has one form: S = R / Z, and the inputs get
x · (Wᵀ S), with a Z and weights of its own (Yeom et al., arXiv 1912.08881; Montavon et al. 2017 for z^B). Wᵀ comes from
autograd, so that any stride, padding, dilation or number of groups is right. Where Z is zero nothing is handed on.
A bias in Z swallows its share of the relevance. The rules that equal gradient times input in a network of ReLUs need it
there (:class:`Simple`, :class:`Epsilon`); the others leave it out, as the paper does, unless ``bias`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]
Bound = float | Sequence[float]


class Rule(Protocol):
    """``rule(linear, x, weight, bias, relevance)`` → relevance of x, of its shape.

    ``linear(x, weight)`` is the layer without its bias; ``bias`` can be added to what it returns.
    """

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Simple:
    """LRP-0: Z = Σ x·w + b; positive and negative contributions may cancel, so it is noisy.

    The released code leaves the bias out (``bias=False``); what it then divides by has nothing to do with the output
    whose relevance it hands on, and may be zero.
    """

    epsilon: float = 1e-9
    bias: bool = True

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        z, pull = adjoint(linear, x, weight)
        z = z + bias if self.bias and bias is not None else z
        return x * pull(ratio(relevance, z + self.epsilon))


@dataclass(frozen=True)
class Positive:
    """z+ (α1 β0): only positive contributions, x⁺·w⁺ + x⁻·w⁻ (+ b⁺); after a ReLU that is x·w⁺. The paper's rule."""

    epsilon: float = 1e-9
    bias: bool = False

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        parts = [(x.clamp(min=0), weight.clamp(min=0))]
        if bool((x < 0).any()):
            parts.append((x.clamp(max=0), weight.clamp(max=0)))
        shift = bias.clamp(min=0) if self.bias and bias is not None else 0.0
        return _shared(linear, parts, relevance, self.epsilon + shift)


@dataclass(frozen=True)
class PositiveWeights:
    """The released form of z+: Z = Σ x·w⁺ whatever the sign of x. It differs where inputs are negative."""

    epsilon: float = 1e-9

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        return _shared(linear, [(x, weight.clamp(min=0))], relevance, self.epsilon)


@dataclass(frozen=True)
class AlphaBetaWeights:
    """The released form of αβ: α shares of what weights above zero carry and β = 1 - α of those below, whatever x is.

    Args:
        alpha: shares of the positive weights.
        epsilon: added to every input.
        drop: hand nothing on where the weights of one sign carry nothing. The released code divides by that zero,
            which is infinite or NaN there.
    """

    alpha: float = 2.0
    epsilon: float = 1e-9
    drop: bool = True

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        shifted = x + self.epsilon
        positive, negative = [(shifted, weight.clamp(min=0))], [(shifted, weight.clamp(max=0))]
        if not self.drop:
            up, pull_up = adjoint(linear, *positive[0])
            down, pull_down = adjoint(linear, *negative[0])
            return shifted * (pull_up(self.alpha * relevance / up) + pull_down((1 - self.alpha) * relevance / down))
        found = self.alpha * _shared(linear, positive, relevance, 0.0)
        if self.alpha != 1:
            found = found + (1 - self.alpha) * _shared(linear, negative, relevance, 0.0)
        return found


@dataclass(frozen=True)
class AlphaBeta:
    """α shares of the positive contributions and β = 1 - α of the negative ones, each normalised alone.

    Contributions are x·w (and b): x⁻·w⁻ is positive. Bach et al. 2015, eq. 60.
    """

    alpha: float = 2.0
    epsilon: float = 1e-9
    bias: bool = False

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        above, below, up, down = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
        b = bias if self.bias and bias is not None else x.new_zeros(())
        shift = self.epsilon + b.clamp(min=0)
        found = self.alpha * _shared(linear, [(above, up), (below, down)], relevance, shift)
        if self.alpha != 1:
            shift = b.clamp(max=0) - self.epsilon
            found = found + (1 - self.alpha) * _shared(linear, [(above, down), (below, up)], relevance, shift)
        return found


@dataclass(frozen=True)
class Gamma:
    """Positive contributions count 1 + γ times where an output is positive, negative ones where it is negative.

    Montavon et al. 2019, in the form for inputs of any sign (Andéol et al. 2021).
    """

    gamma: float = 0.25
    epsilon: float = 1e-6
    bias: bool = True

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        above, below, up, down = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
        b = bias if self.bias and bias is not None else x.new_zeros(())
        with torch.no_grad():
            out = linear(x, weight) + (b if bias is None else bias)
        more_up, more_down = weight + self.gamma * up, weight + self.gamma * down
        found = torch.zeros_like(x)
        for chosen, parts, shift in (
            (out > 0, [(above, more_up), (below, more_down)], b + self.gamma * b.clamp(min=0) + self.epsilon),
            (out < 0, [(above, more_down), (below, more_up)], b + self.gamma * b.clamp(max=0) - self.epsilon),
        ):
            found = found + _shared(linear, parts, relevance * chosen, shift)
        return found


@dataclass(frozen=True)
class Flat:
    """Every input of an output takes the same part, whatever its value and weight (Lapuschkin et al. 2019)."""

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        z, pull = adjoint(linear, torch.ones_like(x), torch.ones_like(weight))
        return pull(ratio(relevance, z))


@dataclass(frozen=True)
class SquaredWeights:
    """w²: inputs take part by their squared weights, whatever their value (Montavon et al. 2017)."""

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        z, pull = adjoint(linear, torch.ones_like(x), weight.square())
        return pull(ratio(relevance, z))


@dataclass(frozen=True)
class Epsilon:
    """Z = Σ x·w + b, pushed away from zero by ε; the layer swallows the bias's share."""

    epsilon: float = 1e-6
    bias: bool = True

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        z, pull = adjoint(linear, x, weight)
        if self.bias and bias is not None:
            z = z + bias
        return x * pull(ratio(relevance, z, self.epsilon))


@dataclass(frozen=True)
class Box:
    """z^B, for inputs between known bounds, such as pixels: Z = Σ x·w - l·w⁺ - h·w⁻.

    Args:
        low: least value of an input, one number or one a channel.
        high: largest.
        epsilon: pushes Z away from zero.
    """

    low: Bound = -1.0
    high: Bound = 1.0
    epsilon: float = 1e-9

    @classmethod
    def of_pixels(cls, mean: Sequence[float], std: Sequence[float], per_channel: bool = False) -> Box:
        """Bounds of pixels in [0, 1] that were normalised; one pair for all channels, as released, or one a channel."""
        low = tuple(-m / s for m, s in zip(mean, std, strict=True))
        high = tuple((1 - m) / s for m, s in zip(mean, std, strict=True))
        return cls(low, high, 1e-6) if per_channel else cls(min(low), max(high), 1e-6)

    def __call__(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
        low, high = self._bound(self.low, x), self._bound(self.high, x)
        parts = [(x, weight), (-low, weight.clamp(min=0)), (-high, weight.clamp(max=0))]
        maps = [(part, *adjoint(linear, part, w)) for part, w in parts]
        z = maps[0][1] + maps[1][1] + maps[2][1]
        s = ratio(relevance, z, self.epsilon)
        return sum((part * pull(s) for part, _, pull in maps), torch.zeros_like(x))

    def _bound(self, value: Bound, x: Tensor) -> Tensor:
        if isinstance(value, int | float):
            return torch.full_like(x, value)
        if x.ndim < 2 or len(value) != x.shape[1]:
            raise ValueError(f"z^B has bounds for {len(value)} channels, the input has {x.shape[1]}; give as many.")
        return x.new_tensor(value).view(-1, *[1] * (x.ndim - 2)).expand_as(x).contiguous()


# ---------------------------------------------------------------------------------------------------------- arithmetic


def adjoint(linear: Linear, x: Tensor, weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """z = W x, and the function s → Wᵀ s."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        z = linear(leaf, weight.detach())
    return z.detach(), lambda s: torch.autograd.grad(z, leaf, s)[0]


def ratio(relevance: Tensor, z: Tensor, epsilon: float = 0.0) -> Tensor:
    """R / (Z + ε·sign Z), and zero where Z is too small to divide by: what reached nothing came from nothing."""
    z = z + epsilon * z.sign()
    small = z.abs() <= torch.finfo(z.dtype).tiny
    return (relevance / z.masked_fill(small, 1)).masked_fill(small, 0)


def _shared(linear: Linear, parts: list[tuple[Tensor, Tensor]], relevance: Tensor, shift: float | Tensor) -> Tensor:
    """All parts contribute to one Z, and ``shift`` is added to it; their inputs are handed their shares."""
    maps = [(x, *adjoint(linear, x, w)) for x, w in parts]
    z = maps[0][1]
    for _, other, _ in maps[1:]:
        z = z + other
    s = ratio(relevance, z + shift)
    found = maps[0][0] * maps[0][2](s)
    for x, _, pull in maps[1:]:
        found = found + x * pull(s)
    return found
