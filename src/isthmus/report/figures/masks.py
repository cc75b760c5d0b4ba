"""Masks as pictures: a colour a class, rows of pictures with a legend, colours laid over a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from isthmus.report.figures.words import LITERAL, shortened

#: The most classes that a legend names.
_NAMED = 24


def palette(classes: int) -> list[list[int]]:
    """A colour for every class: black for the first, then hues far from each other."""
    colours = [[0, 0, 0]]
    for number in range(1, classes):
        hue, light = (number * 0.61803) % 1.0, (0.95, 0.7)[number % 2]
        colours.append([round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.8, light)])
    return colours[:classes]


def masks(images: Tensor, rows: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Pictures over their masks, and the names of the classes that occur.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        rows: masks int64 ``(N, H, W)`` by what they are; a value without a name is drawn grey.
        names: of the classes, by number.
    """
    colours = torch.tensor([*palette(len(names)), [128, 128, 128]], dtype=torch.uint8)
    figure = Figure(figsize=(1.6 * len(images) + 1, 1.55 * (1 + len(rows)) + 0.4), layout="constrained")
    axes = figure.subplots(1 + len(rows), len(images), squeeze=False)
    drawn = {"picture": images.permute(0, 2, 3, 1)}
    for name, mask in rows.items():
        known = (mask >= 0) & (mask < len(names))
        drawn[name] = colours[torch.where(known, mask, len(names))]
    for line, (name, pictures) in zip(axes, drawn.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=9)
    present = sorted({int(value) for mask in rows.values() for value in mask.unique() if 0 <= value < len(names)})
    patches = [Patch(color="#{:02x}{:02x}{:02x}".format(*colours[value].tolist())) for value in present[:_NAMED]]
    legend = figure.legend(
        patches, [shortened(names[value], 24) for value in present[:_NAMED]], loc="outside lower center", ncols=6
    )
    for text in legend.get_texts():
        text.set(fontsize=8, **LITERAL)
    return figure


def coloured(mask: Tensor, classes: int) -> Image.Image:
    """A mask ``(H, W)`` as a picture with a palette, whose values are the class numbers."""
    picture = Image.fromarray(mask.to(torch.uint8).numpy(), "P")
    picture.putpalette([value for colour in palette(classes) for value in colour])
    return picture


def overlaid(image: Tensor, mask: Tensor, classes: int) -> Image.Image:
    """A picture ``(3, H, W)`` of bytes, half hidden by the colours of its mask ``(H, W)``."""
    colours = torch.tensor(palette(classes), dtype=torch.float32)[mask].permute(2, 0, 1)
    mixed = torch.where(mask > 0, 0.5 * image.float() + 0.5 * colours, image.float())
    return Image.fromarray(mixed.round().to(torch.uint8).permute(1, 2, 0).numpy())
