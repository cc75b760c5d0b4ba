"""Segmenters on held-out pictures: intersection over union, examples, colours of classes."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from isthmus.data import Dataset, evaluation_batches, example_batch
from isthmus.data.transforms import Compose, Resize
from isthmus.engine import Run
from isthmus.objectives.segmentation import Segmentation
from isthmus.recipes import _image_classification as shared


@torch.no_grad()
def measured(
    run: Run,
    objective: Segmentation,
    dataset: Dataset,
    classes: int,
    ignore: int | None,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Intersection over union, of every class and their mean, and the share of right pixels."""
    from torchmetrics import JaccardIndex

    objective.to(run.fabric.device).eval()
    jaccard = JaccardIndex("multiclass", num_classes=classes, ignore_index=ignore, average="none")
    right = total = 0
    seen = torch.zeros(classes, dtype=torch.bool)
    for batch in evaluation_batches(dataset, 16, transform=Compose([Resize(size), shared.Normalize()])):
        mask = batch["mask"]
        told = objective.logits(run.fabric.to_device(batch["image"]), (mask.shape[1], mask.shape[2])).argmax(1).cpu()
        known = torch.ones_like(mask, dtype=torch.bool) if ignore is None else mask != ignore
        jaccard.update(told, mask)
        right, total = right + int((told == mask)[known].sum()), total + int(known.sum())
        seen[mask[known].unique()] = True
    each = jaccard.compute()
    values = [float(v) if s else float("nan") for v, s in zip(each, seen, strict=True)]
    return {"miou": float(np.nanmean(values)), "each": values, "accuracy": right / max(1, total)}


@torch.no_grad()
def examples(
    run: Run,
    objective: Segmentation,
    dataset: Dataset,
    classes: int,
    size: tuple[int, int],
    name: str = "examples",
) -> None:
    """Held-out pictures, their masks and what is told of them, as a figure of the run."""
    chosen = range(min(6, len(dataset)))
    batch = example_batch(dataset, chosen, Resize(size))
    normal = shared.Normalize()({"image": batch["image"]}, torch.Generator())["image"]
    told = objective.logits(run.fabric.to_device(normal)).argmax(1).cpu()
    colours = torch.tensor(palette(max(classes, int(batch["mask"].max()) + 1)), dtype=torch.uint8)
    figure = Figure(figsize=(1.6 * len(chosen), 4.6), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for column in range(len(chosen)):
        pictures = (batch["image"][column].permute(1, 2, 0), colours[batch["mask"][column]], colours[told[column]])
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.axis("off")
    run.figure(name, figure, "Held-out pictures, their masks, and the masks that are told.")


def palette(classes: int) -> list[list[int]]:
    """A colour for every class: black for the first, then hues far from each other."""
    colours = [[0, 0, 0]]
    for number in range(1, classes):
        hue, light = (number * 0.61803) % 1.0, (0.95, 0.7)[number % 2]
        colours.append([round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.8, light)])
    return colours[:classes]


def overlaid(image: Tensor, mask: Tensor, classes: int) -> Image.Image:
    """A picture ``(3, H, W)`` of bytes, half hidden by the colours of its mask ``(H, W)``."""
    colours = torch.tensor(palette(classes), dtype=torch.float32)[mask].permute(2, 0, 1)
    mixed = torch.where(mask > 0, 0.5 * image.float() + 0.5 * colours, image.float())
    return Image.fromarray(mixed.round().to(torch.uint8).permute(1, 2, 0).numpy())
