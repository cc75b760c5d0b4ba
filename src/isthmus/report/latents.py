"""Figures of latents: what each one changes, and which cause it tells of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from isthmus.metrics.infomec import InfoMEC


def draw_traversal(image: Tensor, changed: Tensor, labels: Sequence[str]) -> Figure:
    """A row a latent, a column a value; left of every row the picture that it starts from, and what it tells of."""
    rows, columns = changed.shape[:2]
    figure = Figure(figsize=(0.75 * (columns + 1) + 1.2, 0.78 * rows), layout="constrained")
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    for row in range(rows):
        for column in range(columns + 1):
            axis = axes[row, column]
            picture = image if column == 0 else changed[row, column - 1]
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(labels[row], rotation=0, ha="right", va="center", fontsize=8)
    return figure


def draw_information(found: Mapping[str, InfoMEC], names: Sequence[str]) -> Figure:
    """Normalised mutual information of every cause (row) and latent (column), an axis an arm; inactive ones crossed."""
    width = max(scores.nmi.shape[1] for scores in found.values())
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    size = (columns * (0.28 * width + 0.6) + 1, rows * (0.28 * len(names) + 0.75))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (arm, scores) in zip(axes, found.items(), strict=False):
        axis.axis("on")
        axis.imshow(scores.nmi[scores.varies], cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"{arm.replace('_', ' ')} {scores.infom:.2f}", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xticks([])
        for latent in np.flatnonzero(~scores.active):
            axis.text(latent, (len(names) - 1) / 2, "×", ha="center", va="center", color="grey")
    return figure


def most_informative(scores: InfoMEC | None, names: Sequence[str], latents: int) -> list[str]:
    """For every latent, the cause that it tells most of, with the share; a dash for an inactive one."""
    if scores is None:
        return [f"latent {i}" for i in range(latents)]
    nmi = scores.nmi[scores.varies]
    best = nmi.argmax(0)
    return [f"{names[best[i]]} {nmi[best[i], i]:.2f}" if scores.active[i] else "–" for i in range(latents)]


def grid(images: Tensor, columns: int) -> Any:
    """Pictures ``(N, 3, H, W)`` in rows, as one image of readable size."""
    factor = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return to_pil_image(make_grid(images, nrow=columns, padding=2, pad_value=0.5))
