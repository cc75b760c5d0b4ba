"""Figures of recipes that sample images token by token."""

from __future__ import annotations

import io
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from isthmus.samplers.ordinary import Decoded
from isthmus.tasks.tokens.pictures import ImageTokens


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
