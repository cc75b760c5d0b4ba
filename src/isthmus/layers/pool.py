"""From a level of a pyramid to tokens and to one vector a sample, whatever the level's layout."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from isthmus.bounds import one_of

#: timm's names of global poolings; the empty one keeps the map.
Pooling = Annotated[
    str,
    one_of(("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")),
]


def as_tokens(level: Tensor) -> Tensor:
    """``(B, C, H, W)`` maps, ``(B, N, C)`` tokens or ``(B, C)`` vectors to tokens ``(B, N, C)``."""
    if level.ndim == 4:
        return level.flatten(2).transpose(1, 2)
    return level if level.ndim == 3 else level.unsqueeze(1)


class GlobalMean(nn.Module):
    """The mean of one level of a pyramid over its cells: features to vectors ``(B, C)``.

    Args:
        level: which entry of the pyramid; the deepest by default.
    """

    def __init__(self, level: int = -1) -> None:
        super().__init__()
        self.level = level

    def forward(self, features: list[Tensor]) -> Tensor:
        """A pyramid to ``(B, C)``."""
        return as_tokens(features[self.level]).mean(1)
