"""Do small shifts change the answer? Exhaustively, for shifts of the camera and for cyclic ones (arXiv 2404.07153).

A *realistic* shift takes its view from a larger source, so that new content enters at the border as it does when a
camera moves; a *cyclic* shift wraps around. An image is *fooled* where any one of the shifts changes the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shift = tuple[int, int]

#: One pixel up, down, left, right; and the diagonals too.
FOUR: tuple[Shift, ...] = ((-1, 0), (1, 0), (0, -1), (0, 1))
EIGHT: tuple[Shift, ...] = (*FOUR, (-1, -1), (-1, 1), (1, -1), (1, 1))


def view(sources: Tensor, size: int | tuple[int, int], shift: Shift = (0, 0), cyclic: bool = False) -> Tensor:
    """The middle ``size`` window of every source, after a shift (down, across) of the camera.

    Args:
        sources: ``(B, C, H, W)``.
        size: side of the view, or (height, width).
        shift: pixels that the window moves.
        cyclic: roll the middle view instead, so that what leaves on one side enters on the other.

    Raises:
        ValueError: the source does not reach that far.
    """
    height, width = (size, size) if isinstance(size, int) else size
    top, left = (sources.shape[2] - height) // 2, (sources.shape[3] - width) // 2
    down, across = (0, 0) if cyclic else shift
    inside = (0 <= top + down <= sources.shape[2] - height and 0 <= left + across <= sources.shape[3] - width) and min(
        top, left
    ) >= 0
    if not inside:
        raise ValueError(
            f"a view of {height}×{width} shifted by {shift} does not fit into sources of {sources.shape[2]}×"
            f"{sources.shape[3]}; give larger sources or a smaller view."
        )
    cut = sources[:, :, top + down : top + down + height, left + across : left + across + width]
    return cut.roll((-shift[0], -shift[1]), (2, 3)) if cyclic else cut


@dataclass(frozen=True)
class Stability:
    """What :func:`stability` found.

    Attributes:
        images: how many were tried.
        accuracy: share of right answers on unshifted views; NaN without labels.
        flips: share of answers that a shift changes, mean over shifts.
        fooled: share of images whose answer at least one shift changes.
        by_shift: that share for every shift.
    """

    images: int
    accuracy: float
    flips: float
    fooled: float
    by_shift: dict[Shift, float]


@torch.no_grad()
def stability(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Mapping[str, Any]],
    size: int | tuple[int, int],
    shifts: Sequence[Shift] = FOUR,
    cyclic: bool = False,
) -> Stability:
    """Try every shift on every image.

    Args:
        predict: views ``(B, C, h, w)`` → logits ``(B, K)``, or labels ``(B,)``.
        batches: with ``image``, sources larger than the view by the largest shift on every side, and ``label``.
        size: of the view.
        shifts: (down, across) in pixels.
        cyclic: shifts wrap around.

    Raises:
        ValueError: no image, no shift, or a source that is too small.
    """
    if not shifts:
        raise ValueError("give at least one shift.")
    right = fooled = total = labelled = 0
    flips = dict.fromkeys(shifts, 0)
    for batch in batches:
        images = batch["image"]
        told = _labels(predict(view(images, size)))
        changed = torch.zeros_like(told, dtype=torch.bool)
        for shift in flips:
            other = _labels(predict(view(images, size, shift, cyclic))) != told
            flips[shift] += int(other.sum())
            changed |= other
        total, fooled = total + len(told), fooled + int(changed.sum())
        if "label" in batch:
            labelled += len(told)
            right += int((told == batch["label"].to(told.device)).sum())
    if not total:
        raise ValueError("there is no image to try shifts on.")
    by_shift = {shift: count / total for shift, count in flips.items()}
    mean = sum(by_shift.values()) / len(by_shift)
    return Stability(total, right / labelled if labelled else float("nan"), mean, fooled / total, by_shift)


@torch.no_grad()
@torch.no_grad()
def agreement(
    select: Callable[[Tensor], Any], batches: Iterable[Mapping[str, Any]], size: int | tuple[int, int]
) -> tuple[float, float]:
    """How often a view and its neighbours one pixel off choose the very same pixels of the source.

    Args:
        select: views to what has ``offset``, int64 ``(B, 2)``, of the window that is chosen.
        batches: with ``image``, a pixel larger than the view on every side.
        size: of the view.

    Returns:
        The share of pairs of views that agree, and the share of images of which all four neighbours agree.
    """
    same = all_same = total = 0
    for batch in batches:
        still = select(view(batch["image"], size)).offset
        agreeing = torch.ones(len(still), dtype=torch.bool, device=still.device)
        for shift in FOUR:
            moved = select(view(batch["image"], size, shift)).offset
            equal = (moved + torch.tensor(shift, device=moved.device) == still).all(1)
            same, agreeing = same + int(equal.sum()), agreeing & equal
        total, all_same = total + len(still), all_same + int(agreeing.sum())
    return same / max(1, len(FOUR) * total), all_same / max(1, total)


def similarity(
    embed: Callable[[Tensor], Tensor],
    batches: Iterable[Mapping[str, Any]],
    size: int | tuple[int, int],
    shifts: Sequence[Shift] = FOUR,
    cyclic: bool = False,
) -> Tensor:
    """For embedders: the cosine of every image's embedding ``(B, D)`` with that of its shifts, ``(N, shifts)``.

    The share of images below a threshold is ``(similarity(…).amin(1) < threshold).float().mean()``; say which one.
    """
    found = []
    for batch in batches:
        images = batch["image"]
        still = embed(view(images, size)).flatten(1)
        found.append(
            torch.stack(
                [F.cosine_similarity(still, embed(view(images, size, shift, cyclic)).flatten(1)) for shift in shifts],
                1,
            )
        )
    if not found:
        raise ValueError("there is no image to try shifts on.")
    return torch.cat(found)


def _labels(answer: Tensor) -> Tensor:
    return answer.argmax(1) if answer.ndim > 1 else answer
