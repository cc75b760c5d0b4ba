"""Stopping early: training ends when validation has not improved for a while, and its best weights come back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Patience:
    """Watches a validation loss; keeps the weights of its lowest value.

    Args:
        limit: evaluations in a row without a lower loss after which training ends; ``None`` never ends it.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.lowest, self.waited = math.inf, 0
        self.best: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        """Whether training ends now."""
        return self.limit is not None and self.waited >= self.limit

    def see(self, loss: float, weights: Callable[[], dict[str, Any]]) -> None:
        """Note an evaluation; ``weights()`` is copied where its loss is the lowest so far (NaN never is)."""
        if self.limit is None:
            return
        if loss < self.lowest:
            self.lowest, self.waited, self.best = loss, 0, _copied(weights())
        else:
            self.waited += 1

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps."""
        if self.limit is None:
            return None
        return {"lowest": self.lowest, "waited": self.waited, "best": self.best}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go back to a :meth:`state`."""
        if state is not None:
            self.lowest, self.waited, self.best = state["lowest"], state["waited"], state["best"]


def _copied(tree: Any) -> Any:
    """The same on the CPU, which later steps do not change."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_copied(value) for value in tree)
    return tree
