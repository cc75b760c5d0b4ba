"""What the SparK recipe measures and draws on held-out images: the loss, leaks, filled places, speed, reconstructions.

:mod:`isthmus.recipes.spark` says what these numbers are for.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from isthmus import data
from isthmus.data.transforms import CenterCrop, Compose, Resize
from isthmus.encoders.backbone import Backbone
from isthmus.engine.run import Run
from isthmus.layers.masking import random_mask
from isthmus.layers.sparse_conv import sparse_features
from isthmus.objectives.spark import SparK, visible_cells


def held_out(dataset: data.Dataset, size: int, objective: SparK, run: Run, count: int = 256) -> list[dict[str, Tensor]]:
    """Up to ``count`` held-out images and masks that are the same for every variant."""
    transform = Compose([Resize(size), CenterCrop(size)])
    chosen = dataset.select(range(min(count, len(dataset))))
    generator, batches = torch.Generator().manual_seed(run.seed), []
    for batch in data.evaluation_batches(chosen, 64, transform=transform):
        grid = objective.grid(batch["image"])
        keep = visible_cells(grid[0] * grid[1], objective.ratio)
        visible = random_mask(len(batch["image"]), grid, keep, generator)
        image = batch["image"].to(run.fabric.device)
        batches.append({"image": image, "visible": visible.to(image.device)})
    return batches


@torch.no_grad()
def mean_loss(objective: SparK, batches: Sequence[dict[str, Tensor]]) -> float:
    objective.eval()
    losses = [objective.loss(objective.normalise(b["image"]), b["visible"]).loss * len(b["image"]) for b in batches]
    return float(sum(losses)) / sum(len(b["image"]) for b in batches)


@torch.no_grad()
def structure(run: Run, objective: SparK, seen: Sequence[dict[str, Tensor]]) -> None:
    """Hidden pixels change nothing; tiles are masked maps; hidden places stay empty through all stages."""
    image, visible = objective.normalise(seen[0]["image"][:8]), seen[0]["visible"][:8]
    pixels = visible.repeat_interleave(objective.patch, 1).repeat_interleave(objective.patch, 2)[:, None]
    encoder = copy.deepcopy(objective.encoder).eval()
    features: Any = sparse_features
    masked = features(encoder, image, visible, "masked")
    changed = features(encoder, torch.where(pixels, image, 1 - image.flip(0)), visible, "masked")
    tiled = features(encoder, image, visible, "tiled")
    run.metric("leak", max(float((a - b).abs().max()) for a, b in zip(masked, changed, strict=True)))
    run.metric(
        "tile_error", max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(masked, tiled, strict=True))
    )
    share = float(visible.float().mean())
    filled = [float((a != 0).any(1).float().mean()) for a in masked]
    dense = [float((a != 0).any(1).float().mean()) for a in encoder(image * pixels)]
    run.metric("filled_excess", max(filled) - share, unit="of all places")
    run.metric("filled_dense", dense[-1], unit="of all places")


def speed(run: Run, name: str = "resnet50", size: int = 224, batch: int = 2) -> None:
    """Encoder time, forwards and backwards, of masked maps over that of tiles; the best of three each, in turn."""
    run.seed_everything("speed")
    features: Any = sparse_features
    device = run.fabric.device
    encoder = Backbone(name).to(device).train()
    image = torch.rand(batch, 3, size, size, device=device)
    grid = (size // 32, size // 32)
    keep = visible_cells(grid[0] * grid[1], 0.6)
    visible = random_mask(batch, grid, keep, torch.Generator().manual_seed(0)).to(device)
    best = {"masked": float("inf"), "tiled": float("inf")}
    for _ in range(3):
        for mode in best:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.stack([f.sum() for f in features(encoder, image, visible, mode)]).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[mode] = min(best[mode], time.perf_counter() - start)
    run.metric("tile_speedup", best["masked"] / best["tiled"], unit="times, ResNet-50 encoder")


def draw(run: Run, objectives: dict[str, SparK], seen: Sequence[dict[str, Tensor]], count: int = 8) -> None:
    """Original, what is visible, and predictions, side by side."""
    image, visible = seen[0]["image"][:count], seen[0]["visible"][:count]
    rows = {"original": image, "visible": greyed(image, visible, next(iter(objectives.values())).patch)}
    for name, objective in objectives.items():
        rows[name] = reconstruct(objective, image, visible)
    figure = _sheet(rows)
    run.figure(
        "reconstructions",
        figure,
        "Held-out images. Hidden patches are predicted in units of their own mean and contrast, and drawn with the "
        "true ones, as in the paper.",
    )


@torch.no_grad()
def reconstruct(objective: SparK, image: Tensor, visible: Tensor) -> Tensor:
    objective.eval()
    normal = objective.normalise(image)
    return objective.draw(normal, objective.predict(normal, visible), visible)


def greyed(image: Tensor, visible: Tensor, patch: int) -> Tensor:
    pixels = visible.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return torch.where(pixels, image, torch.full_like(image, 0.5))


def _sheet(rows: dict[str, Tensor]) -> Figure:
    """One row of pictures for every entry, its name in front."""
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.3 * count + 0.9, 1.35 * len(rows)))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, images.cpu(), strict=True):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.3)
    return figure
