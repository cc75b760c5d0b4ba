"""Pictures in rotations of their own: the control of what is learnt from upright ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.data.hashing import below, words
from isthmus.data.transforms.pictures import Transform
from isthmus.objectives.rotation import rotate_all


class Turned(Transform):
    """Every image in a rotation of its own, drawn from ``seed``, that is the same whenever it comes up."""

    def __init__(self, seed: int, rotations: Sequence[int]) -> None:
        self.seed, self.rotations = seed, tuple(rotations)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Square images ``(B, C, S, S)``, turned by what their ``index`` says."""
        draws = words(self.seed, batch["index"].cpu().numpy(), 1)[:, 0]
        which = torch.from_numpy(below(draws, len(self.rotations)))
        copies = rotate_all(batch["image"], self.rotations).unflatten(0, (-1, len(self.rotations)))
        return {**batch, "image": copies[torch.arange(len(which)), which]}
