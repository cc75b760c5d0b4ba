"""Pictures whose discs can only be told apart by a cue far away: what a wide receptive field is needed for."""

from __future__ import annotations

import numpy as np
import torch

from isthmus.data.dataset import Memory
from isthmus.layers.random import derive_seed

FAR, CUE = 60, 24


def cue_scenes(count: int, size: int, seed: int, split: str) -> Memory:
    """``count`` pictures with masks: 0 ground, 1 discs under a red cue, 2 discs under a blue one.

    The cue is a square in one corner; all discs of a picture are alike and lie at least 60 pixels from it.

    Args:
        count: pictures; both cues take turns.
        size: side, at least 96.
        seed, split: what the pictures are drawn from.
    """
    if size < 96:
        raise ValueError(f"far discs need pictures of at least 96 pixels, got {size}.")
    draw = np.random.default_rng(derive_seed(seed, "cues", split) % 2**63)
    rows, columns = np.mgrid[:size, :size]
    images = np.empty((count, 3, size, size), np.uint8)
    masks = np.zeros((count, size, size), np.int64)
    for i in range(count):
        ground = 0.35 + 0.1 * draw.random() + 0.06 * draw.standard_normal((3, size, size))
        corner = draw.integers(2, size=2) * (size - CUE - 2)
        centre = corner + CUE / 2 + 1
        for _ in range(draw.integers(2, 6)):
            radius = draw.integers(7, 13)
            for _try in range(50):
                place = draw.integers(radius, size - radius, size=2)
                if np.hypot(*(place - centre)) - radius >= FAR:
                    inside = (rows - place[0]) ** 2 + (columns - place[1]) ** 2 <= radius**2
                    ground[:, inside] = 0.7 + 0.06 * draw.standard_normal((3, int(inside.sum())))
                    masks[i][inside] = 1 + i % 2
                    break
        cue = np.array([0.9, 0.15, 0.15]) if i % 2 == 0 else np.array([0.15, 0.15, 0.9])
        ground[:, corner[0] + 1 : corner[0] + 1 + CUE, corner[1] + 1 : corner[1] + 1 + CUE] = cue[:, None, None]
        images[i] = np.clip(np.round(255 * ground), 0, 255)
    data = {"image": torch.from_numpy(images), "mask": torch.from_numpy(masks)}
    return Memory(f"cues ({split})", data, ("image", "mask"))
