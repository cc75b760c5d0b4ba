"""The network of relevance pruning's plane sets (arXiv 1912.08881)."""

from __future__ import annotations

from torch import nn

from isthmus.bounds import Count, checked
from isthmus.codec import part


@part
@checked
class PlaneNet(nn.Sequential):
    """2 → width → width → width → num_classes, dropout after the first activation.

    Args:
        num_classes: outputs.
        width: units of a hidden layer.
        last: an activation after the third hidden layer; the released network has none there.
    """

    def __init__(self, num_classes: Count, width: Count = 256, last: bool = True) -> None:
        super().__init__(
            *(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(width, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU() if last else nn.Identity()),
            nn.Linear(width, num_classes),
        )
