"""Pictures from predicted latents: the nearest ones seen in training, and new ones by a small conditional decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from isthmus.codec import Loss
from isthmus.data import Memory
from isthmus.decoders.latent_painter import LatentPainter
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.metrics.retrieval import correlation, two_way_identification
from isthmus.recipes._meg_decoding_trials import cosine

SIZE = 24


class Painting(nn.Module):
    """Mean squared error of ``painter(batch["latent"])`` against ``batch["image"]``."""

    def __init__(self, painter: LatentPainter) -> None:
        super().__init__()
        self.painter = painter

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        return Loss(F.mse_loss(self.painter(batch["latent"]), batch["image"]))


def teach(run: Run, latents: Tensor, images: Tensor, training: Training) -> LatentPainter:
    """Train a painter on true latents ``(N, F)`` and the pictures ``(N, 3, H, W)`` that they belong to."""
    small = small_pictures(images)
    run.seed_everything("painter")
    painter = LatentPainter(latents.shape[1], small.shape[-1])
    found = fit(run, "painter", Painting(painter), Memory("pictures", {"latent": latents, "image": small}), training)
    trained: Any = found.objective
    return trained.painter


def small_pictures(images: Tensor) -> Tensor:
    """uint8 pictures at :data:`SIZE` pixels."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    small = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def nearest(predicted: Tensor, latents: Tensor) -> Tensor:
    """Which of ``latents`` ``(M, F)`` is nearest by cosine to each prediction: int64 ``(N,)``."""
    return cosine(predicted, latents).argmax(1)


def scores(pictures: Tensor, seen: Tensor) -> dict[str, float]:
    """Pictures against those seen, both ``(N, 3, H, W)`` in [0, 1]: correlation of pixels, SSIM, two-way on pixels."""
    similar = correlation(pictures.flatten(1), seen.flatten(1))
    ssim = structural_similarity_index_measure(pictures, seen, data_range=1.0)
    assert isinstance(ssim, Tensor)
    found = {"pixcorr": float(similar.diagonal().mean()), "ssim": float(ssim)}
    if len(pictures) > 1:
        found["two_way"] = two_way_identification(similar)
    return found


def draw(rows: Mapping[str, Tensor], columns: int = 10) -> Figure:
    """Rows of pictures ``(N, 3, H, W)`` in [0, 1], named."""
    shown = min(columns, min(len(pictures) for pictures in rows.values()))
    figure = Figure(figsize=(0.9 * shown + 1, 0.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), shown, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure
