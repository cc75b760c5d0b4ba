"""Pictures of numbers: taken whole, and their digits read off captions and names of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.codec import UserError
from isthmus.data.transforms.pictures import Resize, Transform


class WholePicture(Resize):
    """The whole picture at a fixed size; boxes are of no use then."""

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        kept = {key: value for key, value in batch.items() if key not in ("boxes", "labels")}
        return {**super().__call__(kept, generator), **({"labels": batch["labels"]} if "labels" in batch else {})}


class Digits(Transform):
    """``labels`` from captions that are numbers, or from classes that are, where the source has no digits itself."""

    def __init__(self, classes: Sequence[str] | None) -> None:
        self.classes = classes

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = dict(batch)
        if "labels" not in batch and ("caption" in batch or "label" in batch):
            texts = batch["caption"] if "caption" in batch else [self._name(int(label)) for label in batch["label"]]
            batch["labels"] = [digits_of(text) for text in texts]
        return batch

    def _name(self, label: int) -> str:
        return str(label) if self.classes is None else self.classes[label]


def digits_of(text: str) -> Tensor:
    """The digits of a number, int64.

    Raises:
        UserError: something else than digits.
    """
    if not text.isascii() or not (text.isdigit() or text == ""):
        raise UserError(f"{text!r} is no number; captions and folder names have to be digits, such as 1984.")
    return torch.tensor([int(digit) for digit in text], dtype=torch.int64)
