"""Figures of recipes that sample images token by token."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from isthmus.recipes._image_tokens import ImageTokens
from isthmus.samplers.ordinary import Decoded


def large(images: Tensor, columns: int) -> Any:
    """Pictures in rows, as one image of readable size."""
    factor = max(1, 48 // images.shape[-1])
    images = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return to_pil_image(make_grid(images, nrow=columns, padding=2, pad_value=0.5))


def png(image: Any) -> bytes:
    """The bytes of a PNG file of an image of :func:`large`."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def lines(found: Mapping[tuple[str, int], float]) -> Figure:
    """Passes a token by window, a line for every kind of first guess."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for start in dict.fromkeys(start for start, _ in found):
        points = [(window, value) for (each, window), value in found.items() if each == start]
        axis.plot(*zip(*points, strict=True), marker=".", label=start.replace("_", " "))
    axis.axhline(1.0, color="grey", linestyle=":")
    axis.set_xlabel("window")
    axis.set_ylabel("passes a token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure


def settled(pictures: ImageTokens, decoded: Decoded) -> Figure:
    """For the first pictures, the number of the pass that settled every token."""
    count = min(6, len(decoded.tokens))
    advances = torch.stack(decoded.advances)[:, :count]
    figure = Figure(figsize=(1.6 * count, 3.4), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    images = pictures.pictures(decoded.tokens[:count]).cpu()
    for column in range(count):
        number = torch.repeat_interleave(torch.arange(len(advances)), advances[:, column].cpu())
        axes[0, column].imshow(number.view(pictures.side, pictures.side).numpy(), cmap="viridis")
        axes[0, column].set_title(f"{int((advances[:, column] > 0).sum())} passes", fontsize=9)
        axes[1, column].imshow(images[column].permute(1, 2, 0).numpy(), interpolation="nearest")
        for axis in axes[:, column]:
            axis.axis("off")
    return figure
