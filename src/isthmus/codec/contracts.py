"""The contracts that cross rooms: what an encoder, a bottleneck, a decoder and an objective take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

Condition = Mapping[str, Tensor]


class FeatureInfo(NamedTuple):
    """One level of a pyramid: its channels, its reduction (input pixels or samples per cell) and its layout."""

    channels: int
    reduction: int
    format: str = "NCHW"  # or "NTC": (batch, tokens, channels)


def feature_levels(feature_info: Iterable[Any]) -> list[FeatureInfo]:
    """The levels of an encoder, or of lists as a model file has them.

    Raises:
        ValueError: something that is no level.
    """
    levels = []
    for level in feature_info:
        if not isinstance(level, Sequence) or isinstance(level, str) or len(level) not in (2, 3):
            raise ValueError(f"feature_info has a FeatureInfo(channels, reduction) a level, got {level!r}.")
        levels.append(FeatureInfo(*level))
        if not all(isinstance(n, int) and n > 0 for n in level[:2]):
            raise ValueError(f"feature_info has channels and reductions of at least 1, got {level!r}.")
    return levels


@dataclass
class Code:
    """What a bottleneck lets through.

    Attributes:
        features: the pyramid handed to the decoder, finest level first.
        indices: int64, batch first, where the code is discrete; ``None`` otherwise.
        loss: scalar that training adds (commitment, rate, sparsity…).
        bits: ``(B,)`` cost of every sample where it is known; ``None`` otherwise.
    """

    features: list[Tensor]
    indices: Tensor | None = None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    bits: Tensor | None = None


@runtime_checkable
class Encoder(Protocol):
    """``encoder(x) -> list[Tensor]``, finest level first, described level by level in ``feature_info``."""

    feature_info: Sequence[FeatureInfo]

    def __call__(self, x: Tensor, /) -> list[Tensor]: ...


@runtime_checkable
class Bottleneck(Protocol):
    """``bottleneck(features) -> Code``; ``num_codes`` tells the alphabet where codes are discrete."""

    def __call__(self, features: list[Tensor], /) -> Code: ...


@runtime_checkable
class Decoder(Protocol):
    """``decoder(features) -> prediction``, a tensor or a small named tuple."""

    def __call__(self, features: list[Tensor], /) -> Any: ...


@runtime_checkable
class Neck(Protocol):
    """``neck(features) -> features`` with a ``feature_info`` of its own; decoders take one as ``neck=``."""

    feature_info: Sequence[FeatureInfo]

    def __call__(self, features: list[Tensor], /) -> list[Tensor]: ...


@runtime_checkable
class Fitted(Protocol):
    """Learns without gradients (k-means, ridge, EM, coding tables); using it before ``fit`` raises."""

    fitted: bool

    def fit(self, batches: Iterable[Any], /) -> Self: ...


class Loss(NamedTuple):
    """What an objective returns: the scalar to minimise, scalars to log, and anything worth drawing."""

    loss: Tensor
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 - a tuple's default; nobody writes to it
    outputs: Mapping[str, Any] = {}


class Turn(NamedTuple):
    """One optimiser of an alternating objective: who moves, and every how many steps."""

    name: str
    parameters: list[nn.Parameter]
    every: int = 1


@runtime_checkable
class Objective(Protocol):
    """``objective(batch, generator, turn=None) -> Loss``: what to learn. It holds the modules that it trains.

    Alternating objectives also have ``turns -> list[Turn]``; without it all parameters share one optimiser.
    """

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None, /) -> Loss: ...


def conditions_of(part: object) -> frozenset[str]:
    """The extra inputs (subject, positions, hole, class, text…) that a part declares in ``conditions``."""
    return frozenset(getattr(part, "conditions", frozenset()))


def call_part(part: Callable[..., Any], x: Any, condition: Condition | None = None) -> Any:
    """Call a part with the share of ``condition`` that it declares; parts that declare none see only ``x``."""
    names = conditions_of(part)
    if not names:
        return part(x)
    return part(x, {name: value for name, value in (condition or {}).items() if name in names})
