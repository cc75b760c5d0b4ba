"""Pictures from predicted latents: the nearest ones seen in training, and new ones by a small conditional decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from isthmus.codec import Loss, load_weights, save_weights, write_atomically
from isthmus.data import Memory
from isthmus.decoders.latent_painter import LatentPainter
from isthmus.decoders.ridge import Ridge, match_moments
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.metrics.retrieval import correlation, two_way_identification
from isthmus.tasks.brain.trials import Trials, averaged_predictions, cosine, predict, ridges

SIZE = 24
_PAINTER, _KNOWN = "painter.safetensors", "pictures.safetensors"
_OWN = 10
"""Trials whose predictions have moments of their own; those of fewer are taken from the run."""


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


@dataclass(frozen=True)
class Generation:
    """All that makes pictures of predictions.

    Attributes:
        painter: latents, and low-level features where there are any, to pictures.
        latent, thumbs: what was seen in training: ``(M, F)``, uint8 ``(M, 3, 24, 24)``.
        moments: ``mean`` and ``std`` of what the painter was taught on, ``own_mean`` and ``own_std`` of predictions.
        low: a ridge a subject for the low-level features, which no latent tells.
    """

    painter: LatentPainter
    latent: Tensor
    thumbs: Tensor
    moments: Mapping[str, Tensor]
    low: Mapping[int, Ridge] = field(default_factory=dict)

    @torch.no_grad()
    def of(self, predicted: Tensor, trials: Trials) -> tuple[Tensor, Tensor]:
        """Generated pictures and the nearest that were seen, both ``(N, 3, 24, 24)`` in [0, 1].

        Args:
            predicted: ``(N, F)`` of the generation head.
            trials: the scaled signals behind them.
        """
        near = self.thumbs[nearest(predicted, self.latent)].float() / 255
        if self.low:
            predicted = torch.cat([predicted, predict(dict(self.low), trials)], 1)
        own = {} if len(predicted) >= _OWN else {name: self.moments[name] for name in ("own_mean", "own_std")}
        return self.painter(match_moments(predicted, self.moments["mean"], self.moments["std"], **own)), near

    def save(self, folder: Path) -> None:
        """Two files in a folder; of pictures that are alike in their latents one is kept."""
        _, place = self.latent.unique(dim=0, return_inverse=True)
        first = torch.full((int(place.max()) + 1,), len(place)).scatter_reduce_(
            0, place, torch.arange(len(place)), "amin"
        )
        tensors = {"latent": self.latent[first], "thumbs": self.thumbs[first], **self.moments}
        for who, ridge in self.low.items():
            tensors |= {f"low.{who}.{name}": value for name, value in ridge.state_dict().items()}
        save_weights(self.painter, folder / _PAINTER)
        write_atomically(folder / _KNOWN, save({name: t.contiguous() for name, t in tensors.items()}))

    @classmethod
    def load(cls, folder: Path) -> Generation | None:
        """What :meth:`save` wrote; ``None`` where the data had no pictures."""
        if not (folder / _KNOWN).is_file():
            return None
        tensors = load_file(folder / _KNOWN)
        low: dict[int, Ridge] = {}
        for name in [name for name in tensors if name.startswith("low.") and name.endswith(".weight")]:
            ridge = Ridge(1.0, *tensors[name].shape)
            ridge.load_state_dict({k: tensors[name.replace("weight", k)] for k in ridge.state_dict()})
            low[int(name.split(".")[1])] = ridge
        painter = LatentPainter(len(tensors["mean"]), SIZE)
        load_weights(painter, folder / _PAINTER)
        moments = {name: tensors[name] for name in ("mean", "std", "own_mean", "own_std")}
        return cls(painter.eval(), tensors["latent"], tensors["thumbs"], moments, low)


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


def paint(
    run: Run,
    latents: tuple[Tensor, Tensor],
    train: Trials,
    test: Trials,
    training: Training,
    published: Mapping[str, str],
) -> Generation | None:
    """Pictures of test stimuli from predicted latents: nearest neighbours, and the conditional decoder.

    Args:
        run: which records scores and pictures.
        latents: of both heads for every test trial.
        train: scaled trials.
        test: likewise.
        training: of the conditional decoder.
        published: figures of the paper, by metric.
    """
    if train.image is None or test.image is None:
        run.note("The data have no pictures, so none were generated.")
        return None
    mean_trials = test.averaged()
    assert mean_trials.image is not None
    predicted = averaged_predictions(latents[1], test)
    inputs, given, low = train.latent, predicted, {}
    if train.low is not None:  # what the latent does not tell, a ridge reads from the signal, as the papers do
        low = ridges(train, train.low)
        inputs, given = torch.cat([inputs, train.low], 1), torch.cat([given, predict(low, mean_trials)], 1)
    painter = teach(run, inputs, train.image, training).cpu().eval()
    spread = given.std(0) if len(given) > 1 else torch.zeros_like(given[0])
    moments = {"mean": inputs.mean(0), "std": inputs.std(0), "own_mean": given.mean(0), "own_std": spread}
    thumbs = small_pictures(train.image)
    generation = Generation(painter, train.latent, thumbs, moments, low)
    painted, near = generation.of(predicted, mean_trials)
    seen = small_pictures(mean_trials.image).float() / 255
    for name, made in (("painted", painted), ("nearest", near)):
        for measure, value in scores(made, seen).items():
            metric = f"{measure}_{name}"
            run.metric(metric, value, published=published.get(metric))
    run.metric("pixcorr_shuffled", scores(painted.roll(1, 0), seen)["pixcorr"])
    rows = {"seen": seen, "nearest": near, "generated": painted}
    run.figure("pictures", draw(rows), "Test pictures, the nearest of training, and the decoder's.")
    return generation
