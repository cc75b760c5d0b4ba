"""Shortcuts that append zero channels, told to torch-pruning: it would take channel i for channel i on both sides.

A shortcut with p zero channels in front hands channel i on as channel i + p. Channels that are padding have no
counterpart in front of it; one that goes makes the padding thinner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.layers.padded_shortcut import PaddedShortcut


class PaddingPruner:
    """What torch-pruning calls for a :class:`PaddedShortcut`; channels are counted at its output on both sides."""

    pruning_dim: int | None = None

    def prune_out_channels(self, layer: PaddedShortcut, idxs: Sequence[int]) -> PaddedShortcut:
        """These channels of the output go."""
        layer.drop(idxs)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: PaddedShortcut) -> int:
        """Channels of the output."""
        return layer.out_channels

    def get_in_channels(self, layer: PaddedShortcut) -> int:
        """Channels of the input."""
        return layer.channels


class _Shift:
    """Channels of the input as those of the output, or back; reads the padding as it is when it is asked."""

    def __init__(self, layer: PaddedShortcut, back: bool) -> None:
        self.layer, self.back = layer, back

    def __call__(self, indices: Sequence[Any]) -> list[Any]:
        front = self.layer.zeros_before
        if not self.back:
            return [index._replace(idx=index.idx + front) for index in indices]
        inside = range(front, front + self.layer.channels)
        return [index._replace(idx=index.idx - front) for index in indices if index.idx in inside]


def shift_channels(graph: Any) -> None:
    """Give the edges in front of every padded shortcut of a dependency graph their shift."""
    for layer, node in graph.module2node.items():
        if not isinstance(layer, PaddedShortcut):
            continue
        for source in node.inputs:
            for edge in source.dependencies:
                if edge.target is node:
                    edge.index_mapping[1] = _Shift(layer, back=False)
            for edge in node.dependencies:
                if edge.target is source:
                    edge.index_mapping[1] = _Shift(layer, back=True)
