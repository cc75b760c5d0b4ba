"""Choose the crop by its own content, so that a shifted view of a scene shows the network the very same pixels.

Robust inference by crop selection (Shifman and Weiss 2024, arXiv 2404.07153). Every crop gets a score that depends on
its own pixels only, the best crop is classified: two overlapping views have most crops in common, so most often the
best is the same one, and then the answer is the same bit by bit. Nothing is trained.

    robust = CropSelection(classifier, crop=224)          # any model of images (B, C, H, W)
    logits = robust(images)                               # 256 × 256 views, in [0, 1]
    chosen = robust.select(images)                        # where the crops are, for dense outputs

How often two views agree is known beforehand (:func:`same_crop_probability`): with k × k positions and a shift of one
pixel, (k − 1)/(k + 1). The paper's own score could not be seen; the hash used here makes crops exchangeable, which is
what that figure needs. Shifts by whole pixels are covered; resampled or re-encoded views are not, and neither is zoom.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Positive, checked
from isthmus.codec import part

Pair = tuple[int, int]
Score = Callable[[Tensor, Pair], Tensor]

_PRIME = 2**31 - 1  # products of two residues stay below 2⁶²
_CHANNEL, _TAP, _LAST = 1_103_515_245, 48_271, 1_664_525_041


class Selection(NamedTuple):
    """The crops chosen: ``offset`` int64 ``(B, 2)`` top and left, ``score`` ``(B,)`` of the chosen crop, ``tied``
    ``(B,)`` where another crop had the same score (the first in reading order is taken)."""

    offset: Tensor
    score: Tensor
    tied: Tensor


# ---------------------------------------------------------------------------------------------------- scores of crops


def quantise(images: Tensor, levels: int = 255) -> Tensor:
    """Pixels as int64, so that sums do not depend on their order: uint8 as it is, others ``round(x · levels)``.

    Raises:
        ValueError: a pixel is NaN or infinite.
    """
    if not images.is_floating_point():
        return images.long()
    images = images.float()
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(images).all()):
        raise ValueError("images have pixels that are NaN or infinite; crops cannot be compared by them.")
    return (images * levels).round().long()


def box_sums(x: Tensor, size: Pair) -> Tensor:
    """Sums over every ``size`` window: int64 ``(…, H, W)`` → ``(…, H−h+1, W−w+1)``, exact, in one pass."""
    height, width = size
    total = F.pad(x, (1, 0, 1, 0)).cumsum(-1).cumsum(-2)
    below, above = total[..., height:, :], total[..., :-height, :]
    return below[..., width:] - below[..., :-width] - above[..., width:] + above[..., :-width]


def hash_score(pixels: Tensor, size: Pair) -> Tensor:
    """An exchangeable score: int64 ``(B, C, H, W)`` → ``(B, H−h+1, W−w+1)`` below 2³¹ − 1.

    Channels and 3×3 neighbourhoods inside the crop are mixed modulo a prime, summed over the crop and mixed again, so
    that crops which share most of their pixels have unrelated scores.
    """
    x = (pixels * _powers(_CHANNEL, pixels.shape[1], pixels)[:, None, None]).remainder(_PRIME).sum(1).remainder(_PRIME)
    height, width = size
    if min(size) >= 3:
        taps = _powers(_TAP, 9, pixels)
        rows, columns = x.shape[1] - 2, x.shape[2] - 2
        shifted = [x[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        x = sum((y * taps[n]).remainder(_PRIME) for n, y in enumerate(shifted)).remainder(_PRIME)  # type: ignore[union-attr]
        height, width = height - 2, width - 2
    return _mixed(box_sums(_mixed(x), (height, width)).remainder(_PRIME))


def mean_score(pixels: Tensor, size: Pair) -> Tensor:
    """The brightness of the crop. Neighbours are alike, so that the best lies on the border more often than not."""
    return box_sums(pixels.sum(1), size)


def saliency_score(pixels: Tensor, size: Pair) -> Tensor:
    """How much neighbouring pixels inside the crop differ: prefers busy crops, agrees less often than the hash."""
    grey = pixels.sum(1)
    down, across = (grey.diff(dim=1)).abs(), (grey.diff(dim=2)).abs()
    height, width = size
    if min(size) < 2:
        return mean_score(pixels, size)
    return box_sums(down, (height - 1, width)) + box_sums(across, (height, width - 1))


SCORES: dict[str, Score] = {"hash": hash_score, "mean": mean_score, "saliency": saliency_score}


def _powers(base: int, count: int, like: Tensor) -> Tensor:
    values = [1]
    for _ in range(count):
        values.append(values[-1] * base % _PRIME)
    return torch.tensor(values[1:], device=like.device)


def _mixed(x: Tensor) -> Tensor:
    """Residues to residues; differences of neighbours leave no trace. Every product stays below 2⁶²."""
    x = (x * _LAST + 12_345).remainder(_PRIME)
    x = (x * x + x).remainder(_PRIME)
    return (x * _CHANNEL).remainder(_PRIME)


# --------------------------------------------------------------------------------------------------- choosing a crop


def select(scores: Tensor, previous: Tensor | None = None) -> Selection:
    """The first position with the highest score.

    Args:
        scores: ``(B, rows, columns)``, integers or floats.
        previous: ``(B,)`` scores of the crops chosen in the frame before. Where a position still has that score, it is
            kept, so that a video's crop moves only when its content leaves the view.

    Raises:
        ValueError: a score is NaN.
    """
    flat = scores.flatten(1)
    if scores.is_floating_point() and bool(scores.isnan().any()):
        raise ValueError("a score is NaN; crops cannot be ordered.")
    best = flat.amax(1)
    index = flat.argmax(1)
    if previous is not None:
        kept = flat == previous.to(flat.device, flat.dtype)[:, None]
        index = torch.where(kept.any(1), kept.int().argmax(1), index)
        best = flat.gather(1, index[:, None])[:, 0]
    tied = (flat == best[:, None]).sum(1) > 1
    width = scores.shape[2]
    return Selection(torch.stack([index // width, index % width], 1), best, tied)


def take(images: Tensor, offset: Tensor, size: Pair, cyclic: bool = False) -> Tensor:
    """Every image's own window: ``(B, C, H, W)`` and int64 ``(B, 2)`` → ``(B, C, h, w)``; cyclic ones wrap around."""
    (height, width), (rows, columns) = size, images.shape[2:]
    down = offset[:, :1] + torch.arange(height, device=offset.device)
    across = offset[:, 1:] + torch.arange(width, device=offset.device)
    if cyclic:
        down, across = down.remainder(rows), across.remainder(columns)
    down = down[:, None, :, None].expand(-1, images.shape[1], -1, columns)
    cut = images.gather(2, down.to(images.device))
    across = across[:, None, None, :].expand(-1, images.shape[1], height, -1)
    return cut.gather(3, across.to(images.device))


@part
@checked
class CropSelection(nn.Module):
    """A model that sees the chosen crop of every view instead of its centre.

    Takes images ``(B, C, H, W)`` in [0, 1] or uint8, or a list of images of different sizes, and gives what the model
    gives for their crops. Around an encoder it is an encoder (``feature_info`` is the model's).

    Args:
        model: a classifier, an embedder or an encoder.
        crop: pixels a side of a crop, or (height, width). The more positions it has in the view, the more stable the
            answer: :func:`smallest_window`.
        size: resize crops to this side, or (height, width), for the model; without it they stay as they are.
        score: ``hash``, ``mean``, ``saliency``, or a function of int64 pixels ``(B, C, H, W)`` and the crop's size that
            gives scores ``(B, H−h+1, W−w+1)``.
        window: choose among the middle ``window`` × ``window`` positions only.
        cyclic: choose among all crops of the view that wraps around; cyclic shifts then change nothing at all.
        mean, std: normalise for the model, a number a channel; the choice is made before.
        levels: grey levels that float pixels are rounded to for the choice.

    Raises:
        ValueError: an unknown score, or a crop, size or window that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        crop: Count | Sequence[Count],
        size: Count | Sequence[Count] | None = None,
        score: str | Score = "hash",
        window: Natural | None = None,
        cyclic: bool = False,
        mean: Sequence[float] = (),
        std: Sequence[Positive] = (),
        levels: Count = 255,
    ) -> None:
        super().__init__()
        if isinstance(score, str) and score not in SCORES:
            raise ValueError(f"there is no score {score!r}; there are {', '.join(SCORES)}, or give a function.")
        if cyclic and window is not None:
            raise ValueError("a cyclic choice is among all positions; leave out the window.")
        self.model = model
        self.crop, self.size = _pair(crop, "crop"), None if size is None else _pair(size, "size")
        self.window = None if window is None else _pair(window, "window")
        self.score: Score = SCORES[score] if isinstance(score, str) else score
        self.cyclic, self.levels = cyclic, levels
        self.register_buffer("mean", torch.tensor(list(mean) or [0.0])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(list(std) or [1.0])[:, None, None], persistent=False)
        if hasattr(model, "feature_info"):
            self.feature_info = model.feature_info

    def scores(self, images: Tensor) -> Tensor:
        """The score of every crop, ``(B, rows, columns)``.

        Raises:
            ValueError: the crop is larger than the view, or a pixel is not finite.
        """
        if images.ndim != 4:
            raise ValueError(f"crops are chosen in images (B, C, H, W), got an input of {images.ndim} dimensions.")
        pixels = quantise(images, self.levels)
        (height, width), (rows, columns) = self.crop, pixels.shape[2:]
        if height > rows or width > columns:
            raise ValueError(f"a crop of {height}×{width} does not fit into a view of {rows}×{columns}.")
        if self.cyclic:
            wrapped = torch.cat([pixels, pixels[:, :, : height - 1]], 2)
            return self.score(torch.cat([wrapped, wrapped[:, :, :, : width - 1]], 3), self.crop)
        if (height, width) == (rows, columns) and not torch.compiler.is_compiling():
            warnings.warn(
                "the crop is as large as the view: there is nothing to choose, nothing is gained", stacklevel=2
            )
        return self.score(pixels, self.crop)

    def select(self, images: Tensor, previous: Tensor | None = None) -> Selection:
        """Where the crop of every view is.

        Args:
            images: ``(B, C, H, W)``.
            previous: the ``score`` of the selection for the frame before, see :func:`select`.
        """
        scores = self.scores(images)
        top = left = 0
        if self.window is not None:
            rows, columns = (min(w, n) for w, n in zip(self.window, scores.shape[1:], strict=True))
            top, left = (scores.shape[1] - rows) // 2, (scores.shape[2] - columns) // 2
            scores = scores[:, top : top + rows, left : left + columns]
        chosen = select(scores, previous)
        return chosen._replace(offset=chosen.offset + torch.tensor([top, left], device=chosen.offset.device))

    def crops(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """What the model gets to see, ``(B, C, h, w)``: cut out, resized, normalised."""
        if not isinstance(images, Tensor):
            return torch.cat([self.crops(image[None]) for image in images])
        cut = take(images, self.select(images).offset, self.crop, self.cyclic)
        if not cut.is_floating_point():
            cut = cut.float() / 255
        if self.size is not None and self.size != self.crop:
            cut = F.interpolate(cut, self.size, mode="bilinear", antialias=True)
        return (cut - self.mean) / self.std

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """The model's answer on the chosen crops."""
        return self.model(self.crops(images))


def _pair(size: int | Sequence[int], name: str) -> Pair:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} is one positive number, or height and width; got {size}.")
    return pair


# --------------------------------------------------------------------------------------------------------- the theory


def same_crop_probability(positions: int | Pair, shifts: Sequence[Pair]) -> float:
    """How probable it is that the view and all its shifts choose one crop, where scores are exchangeable and distinct.

    It is the share of the crops that lie in any of the views which lie in all of them.

    Args:
        positions: k, the crop's positions along an axis, or (rows, columns).
        shifts: (down, across) of every further view, in pixels.
    """
    rows, columns = _pair(positions, "positions")
    places = [
        {(i + down, j + across) for i in range(rows) for j in range(columns)} for down, across in [(0, 0), *shifts]
    ]
    return len(set.intersection(*places)) / len(set.union(*places))


def smallest_window(agreement: float) -> int:
    """The fewest positions an axis with which a view and its neighbour, one pixel off, agree that often.

    Raises:
        ValueError: the agreement is not below 1; only the cyclic choice reaches that.
    """
    if not 0 <= agreement < 1:
        raise ValueError(f"agreement lies in [0, 1), got {agreement}.")
    return math.ceil(round((1 + agreement) / (1 - agreement), 9))
