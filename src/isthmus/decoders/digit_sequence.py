"""Reading a whole number at once: one softmax for its length, one for every digit (Goodfellow et al., arXiv 1312.6082).

    decoder = DigitSequence(encoder.feature_info[-1].channels, max_digits=5)
    scores = decoder(encoder(images))            # NumberScores: length (B, 7), digits (B, 5, 10)
    reading = read(scores)                       # the likeliest number, and its probability

Digits are independent given the image, so the best digit in every place and then the best length by its running sum is
the exact joint maximum; taking the likeliest length first is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, Share, checked
from isthmus.codec import part
from isthmus.layers.pool import as_tokens


class NumberScores(NamedTuple):
    """Logits: ``length`` ``(B, N + 2)`` of 0 … N digits and of more than N, ``digits`` ``(B, N, classes)``."""

    length: Tensor
    digits: Tensor


class Reading(NamedTuple):
    """What an image says: ``length`` int64 ``(B,)`` (N + 1: more than N, refused), ``digits`` int64 ``(B, N)`` with -1
    behind the end, ``log_prob`` ``(B,)`` of that answer."""

    length: Tensor
    digits: Tensor
    log_prob: Tensor

    def strings(self) -> list[str | None]:
        """The numbers as text; ``None`` where there are more digits than can be read."""
        most = self.digits.shape[1]
        rows = zip(self.length.tolist(), self.digits.tolist(), strict=True)
        return [None if n > most else "".join(str(d) for d in row[:n]) for n, row in rows]


@part
@checked
class DigitSequence(nn.Module):
    """Length and digit heads on one level of any encoder.

    Maps are pooled to a grid, tokens are averaged, vectors are taken as they are; ``hidden`` layers with ReLU follow,
    then affine heads.

    Args:
        channels: of the level that is read.
        max_digits: N, the longest number that is told; longer ones are refused.
        classes: symbols in every place.
        grid: places a map is pooled to, rows and columns or both alike; 1 keeps nothing of where things are.
        hidden: widths of the layers between.
        dropout: on the hidden layers.
        level: which entry of the pyramid.

    Raises:
        ValueError: no digit, no class, or no place.
    """

    def __init__(
        self,
        channels: Count,
        max_digits: Count = 5,
        classes: Count = 10,
        grid: Count | Sequence[Count] = 4,
        hidden: Sequence[Count] = (),
        dropout: Share = 0.0,
        level: int = -1,
    ) -> None:
        super().__init__()
        rows, columns = (grid, grid) if isinstance(grid, int) else grid
        self.max_digits, self.classes, self.level = max_digits, classes, level
        self.channels, self.pool = channels, nn.AdaptiveAvgPool2d((rows, columns))
        self._cells = rows * columns
        widths = [channels * self._cells, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        self.dense = nn.Sequential(*layers)
        self.length_head = nn.Linear(widths[-1], max_digits + 2)
        self.digit_heads = nn.Linear(widths[-1], max_digits * classes)  # all places in one product

    def forward(self, features: list[Tensor]) -> NumberScores:
        """The pyramid to logits.

        Raises:
            ValueError: the level has another number of channels.
        """
        level = features[self.level]
        if level.ndim == 4:
            level = self.pool(level).flatten(1)
        else:
            level = as_tokens(level).mean(1)
            if self._cells > 1:  # one vector in the place of every cell, so that one decoder serves maps and tokens
                level = level.repeat_interleave(self._cells, 1)
        if level.shape[1] != self.channels * self._cells:
            raise ValueError(
                f"the level has {level.shape[1] // self._cells} channels; this decoder was made for {self.channels}."
            )
        hidden = self.dense(level)
        return NumberScores(self.length_head(hidden), self.digit_heads(hidden).unflatten(1, (self.max_digits, -1)))


def targets(numbers: Sequence[Tensor], max_digits: int) -> tuple[Tensor, Tensor]:
    """Digits of every image, int64 ``(K,)`` each, to what is learnt.

    Returns:
        length: int64 ``(B,)``, N + 1 for numbers of more than N digits.
        digits: int64 ``(B, N)``, -1 where there is none; all -1 for those.
    """
    length = torch.tensor([min(len(number), max_digits + 1) for number in numbers])
    digits = torch.full((len(numbers), max_digits), -1)
    for row, number in zip(digits, numbers, strict=True):
        if len(number) <= max_digits:
            row[: len(number)] = number
    return length, digits


def negative_log_likelihood(scores: NumberScores, length: Tensor, digits: Tensor) -> Tensor:
    """-log P(length) - Σ log P(digit) over the digits that exist, ``(B,)``, float32 at least.

    Whatever ``digits`` holds behind the end is not looked at; numbers of more than N digits teach the length alone.

    Args:
        scores: of the images.
        length: int64 ``(B,)`` in 0 … N + 1.
        digits: int64 ``(B, N)``.

    Raises:
        ValueError: a length or a digit that there is not.
    """
    places, classes = scores.digits.shape[1:]
    exists = torch.arange(places, device=length.device) < length.where(length <= places, 0)[:, None]
    if length.device.type == "cpu":
        if not 0 <= int(length.min()) <= int(length.max()) <= places + 1:
            raise ValueError(f"lengths must lie in 0 to {places + 1}, got {int(length.min())} to {int(length.max())}.")
        seen = digits[exists]
        if len(seen) and not 0 <= int(seen.min()) <= int(seen.max()) < classes:
            raise ValueError(f"digits must lie in 0 to {classes - 1}, got {int(seen.min())} to {int(seen.max())}.")
    dtype = torch.promote_types(scores.length.dtype, torch.float32)
    loss = F.cross_entropy(scores.length.to(dtype), length, reduction="none")
    target = digits.where(exists, -1)
    each = F.cross_entropy(scores.digits.to(dtype).flatten(0, 1), target.flatten(), reduction="none", ignore_index=-1)
    return loss + each.view_as(target).sum(1)


def read(scores: NumberScores) -> Reading:
    """The likeliest number: the exact joint maximum over length and digits, in O(N)."""
    return _reading(scores, joint=True)


def read_length_first(scores: NumberScores) -> Reading:
    """The likeliest length, then its likeliest digits: what many ports do; not the likeliest number."""
    return _reading(scores, joint=False)


def _reading(scores: NumberScores, joint: bool) -> Reading:
    dtype = torch.promote_types(scores.length.dtype, torch.float32)
    length, digits = scores.length.to(dtype).log_softmax(-1), scores.digits.to(dtype).log_softmax(-1)
    best, which = digits.max(-1)
    places = best.shape[1]
    running = F.pad(best.cumsum(1), (1, 1))  # of 0 … N digits; "more than N" says nothing about digits
    running[:, -1] = 0
    total = length + running
    told = (total if joint else length).argmax(-1)
    behind = torch.arange(places, device=told.device) >= told.where(told <= places, 0)[:, None]
    return Reading(told, which.masked_fill(behind, -1), total.gather(1, told[:, None])[:, 0])


def right(reading: Reading, length: Tensor, digits: Tensor) -> Tensor:
    """``(B,)`` True where length and every digit are right; there is no partial credit."""
    places = digits.shape[1]
    behind = torch.arange(places, device=length.device) >= length.where(length <= places, 0)[:, None]
    return (reading.length == length) & (reading.digits == digits.masked_fill(behind, -1)).all(1)


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :0]


@part
@checked
class AbsentDigits(nn.Module):
    """The baseline of many ports: no length head, and in every place an eleventh class, "there is no digit here".

    Args:
        decoder: gives the features and widths; its heads are replaced.
    """

    def __init__(self, decoder: DigitSequence) -> None:
        super().__init__()
        self.decoder = decoder
        hidden = decoder.length_head.in_features
        decoder.length_head = _Nothing()  # type: ignore[assignment]
        decoder.digit_heads = nn.Linear(hidden, decoder.max_digits * (decoder.classes + 1))

    def forward(self, features: list[Tensor]) -> NumberScores:
        """Logits of the places, and none of the length."""
        return self.decoder(features)

    @staticmethod
    def loss(scores: NumberScores, length: Tensor, digits: Tensor) -> Tensor:
        """Σ over all places of the cross entropy, ``(B,)``."""
        places, classes = scores.digits.shape[1:]
        behind = torch.arange(places, device=length.device) >= length[:, None]
        target = digits.masked_fill(behind, classes - 1).clamp_min(0)
        each = F.cross_entropy(scores.digits.flatten(0, 1), target.flatten(), reduction="none")
        return each.view_as(target).sum(1)

    @staticmethod
    def read(scores: NumberScores) -> Reading:
        """The likeliest class in every place; the number ends at the first place without a digit."""
        best, which = scores.digits.log_softmax(-1).max(-1)
        absent = which == scores.digits.shape[2] - 1
        length = (~absent).long().cumprod(1).sum(1)
        behind = torch.arange(which.shape[1], device=which.device) >= length[:, None]
        return Reading(length, which.masked_fill(behind, -1), best.sum(1))
