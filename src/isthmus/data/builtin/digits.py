"""``digits``: 1,797 handwritten digits of 8×8 pixels that scikit-learn ships (UCI Optical Recognition, 1998)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from isthmus.codec import UserError
from isthmus.data.dataset import Memory, pick_needs
from isthmus.data.hashing import permutation
from isthmus.data.readers.decoding import resize_exactly
from isthmus.data.splits import check_split

_PARTS = {"test": (0, 360), "val": (360, 540), "train": (540, 1797), "all": (0, 1797)}


def load(split: str, needs: Sequence[str], seed: int, *, size: int = 8, name: str = "digits") -> Memory:
    """1,257 training, 180 validation and 360 test digits; which is which never changes, whatever the seed.

    Columns: ``image`` (grey in three channels, 0 paper to 255 ink), ``label`` 0 to 9. ``size`` enlarges by bicubic
    interpolation in fixed-point arithmetic, so that pixels are the same on every machine.
    """
    columns = ("image", "label")
    if size < 1:
        raise UserError(f"{name}: size must be at least 1, got {size}.")
    wanted = pick_needs(name, needs, columns)
    chosen = np.concatenate([np.arange(*_PARTS[part]) for part in check_split(name, split, _PARTS)])
    rows = permutation(1797, seed=0)[chosen]

    from sklearn.datasets import load_digits

    source: Any = load_digits()
    grey = ((source.images.astype(np.int64)[rows] * 255 + 8) // 16).astype(np.uint8)
    data = {"label": torch.from_numpy(source.target.astype(np.int64)[rows])}
    if "image" in wanted:
        grey = np.stack([resize_exactly(Image.fromarray(image), size) for image in grey])
        data["image"] = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)
    return Memory(name, {key: data[key] for key in wanted}, columns, [str(i) for i in range(10)])
