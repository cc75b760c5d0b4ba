"""Classifying by the crop that the content of a picture selects: what a classifier needs for it, and its use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.data import Memory, evaluation_batches
from isthmus.data.inputs import Inputs
from isthmus.data.transforms import CenterCrop, Compose, Normalize, Resize
from isthmus.robustness.crop_selection import CropSelection
from isthmus.robustness.shifts import EIGHT, view
from isthmus.saved import Saved
from isthmus.tasks.applying import Answer, Item, annotated


def source(side: int) -> Compose:
    """Pictures that reach a pixel further than a view of ``side`` pixels on every side."""
    return Compose([Resize(side + 2), CenterCrop(side + 2)])


def prepared(network: nn.Module, crops: Tensor, size: int) -> Tensor:
    """Crops as a classifier takes them: ``size`` pixels a side, 0 leaves them, normalised as it was trained."""
    if size:
        crops = nn.functional.interpolate(crops, (size, size), mode="bilinear", antialias=True)
    inputs = Inputs.of(network)
    return Normalize(inputs.mean, inputs.std)({"image": crops}, torch.Generator())["image"]


def selecting(network: nn.Module, crop: int, size: int, **options: Any) -> CropSelection:
    """A classifier of views by the crop that they select, on its device.

    Args:
        network: the classifier.
        crop: pixels a side of the crop.
        size: pixels a side that the classifier takes; 0 is that of the crop.
        options: of :class:`CropSelection`.
    """
    inputs = Inputs.of(network)
    chooser = CropSelection(network, crop, mean=inputs.mean, std=inputs.std, size=size or None, **options)
    like = next(network.parameters(), torch.empty(0))
    return chooser.to(like.device).eval()


def answer(kept: Saved, item: Item) -> Answer:
    """The class of the crop that a picture's content selects, and whether one pixel would change it.

    The picture is resized and cut as in the run; the crop is said in pixels of the picture.

    Raises:
        UserError: a picture that is smaller than the crop.
    """
    facts, classes = kept.facts, kept.labels or []
    side, crop = facts["view"], facts["crop"]
    if min(item.image.shape[1:]) < crop + 2:
        raise UserError(f"smaller than the crop of {crop} pixels and a pixel around it")
    picture = Memory("picture", {"image": item.image[None]})
    image = next(evaluation_batches(picture, 1, transform=source(side)))["image"].to(item.device)
    views = torch.cat([view(image, side, shift) for shift in ((0, 0), *EIGHT)])
    robust = selecting(kept.model, crop, facts["size"], score=facts["score"])
    with torch.no_grad():
        offset = robust.select(views[:1]).offset[0]
        logits = robust(views)
    probability, predicted = logits[0].softmax(0), logits.argmax(1).tolist()
    best = int(probability.argmax())
    top, left, width = _in_picture(item.image.shape[1:], side, crop, offset.tolist())
    figure = annotated(item.image, classes[best])
    figure.axes[0].add_patch(Rectangle((left - 0.5, top - 0.5), width, width, fill=False, color="tab:red", lw=2))
    found = {
        "class": classes[best],
        "probability": round(float(probability[best]), 4),
        "crop": {"top": round(top), "left": round(left), "size": round(width)},
        "classes_one_pixel_off": sorted({classes[number] for number in predicted}),
        "stable": len(set(predicted)) == 1,
    }
    return Answer(found, figure)


def _in_picture(size: Sequence[int], view: int, crop: int, offset: Sequence[int]) -> tuple[float, float, float]:
    """Top, left and side of a crop of a view, in pixels of a picture of this size that was resized and cut for it."""
    scale = min(size) / (view + 2)
    top, left = ((side / scale - view - 2) / 2 + 1 + at for side, at in zip(size, offset, strict=True))
    return top * scale, left * scale, crop * scale
