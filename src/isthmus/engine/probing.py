"""What frozen features are good for: probes trained on labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.data import Dataset, Memory, evaluation_batches, example_batch
from isthmus.data.transforms import Transform
from isthmus.engine.fit import fit
from isthmus.engine.run import Run
from isthmus.engine.training import Training
from isthmus.objectives.classification import Classification

_BATCH = 256  # images a batch where nothing is trained
_KEPT = 2**29  # bytes of frozen features that are computed once and kept


class Level(nn.Module):
    """One level of a timm network, as timm counts them, as a pyramid of one map ``(B, C, H, W)``.

    Unlike ``Backbone`` it tells levels of one reduction apart.
    """

    def __init__(self, network: nn.Module, index: int) -> None:
        super().__init__()
        self.network, self.index = network, index

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to ``[(B, C, H, W)]``."""
        take: Callable[..., list[Tensor]] = self.network.forward_intermediates  # type: ignore[assignment]
        return list(take(x, indices=[self.index], output_fmt="NCHW", intermediates_only=True))


def probe(
    run: Run,
    phase: str,
    encoder: nn.Module,
    make_head: Callable[[Tensor], nn.Module],
    dataset: Dataset,
    training: Training,
    transform: Transform,
    augmented: Transform | None = None,
) -> Classification:
    """Train a head on what a frozen encoder sees, and return both as one classifier.

    Without augmentation the features are computed once, if they take no more than half a gibibyte.

    Args:
        run: whose devices and seed.
        phase: name of the training phase.
        encoder: images to a pyramid of one level; it gets no gradients and stays in evaluation mode.
        make_head: given that level for one image, makes the head.
        dataset: images with ``label``.
        training: of the head.
        transform: makes images ready for the encoder.
        augmented: the same, with augmentation, for training; ``None`` trains without.
    """
    encoder = encoder.to(run.fabric.device).eval()
    with torch.no_grad():
        first = example_batch(dataset, [0], transform)["image"]
        (level,) = (level.cpu() for level in encoder(run.fabric.to_device(first)))
    head = make_head(level)
    if augmented is not None or level.numel() * level.element_size() * len(dataset) > _KEPT:
        objective = Classification(encoder, head, frozen=True)
        fit(run, phase, objective, dataset, training, augmented or transform)
        return objective
    found = list(_features(run, encoder, dataset, transform))
    columns = {"features": torch.cat([levels[0] for levels, _ in found]), "label": torch.cat([y for _, y in found])}
    fit(run, phase, Classification(_Pyramid(), head, key="features"), Memory(phase, columns), training)
    return Classification(encoder, head, frozen=True)


def level_index(network: nn.Module, asked: int | None = None) -> int:
    """Which level of a timm network is probed, counted from 0.

    Args:
        network: a timm model.
        asked: counted from either end; without it ``conv2`` where there is one, else the last but one.

    Raises:
        UserError: the network does not hand out its levels, or has no such level.
    """
    info: Any = getattr(network, "feature_info", None)
    levels = list(info.info if hasattr(info, "info") else info or [])
    name = type(network).__name__
    if not levels or not hasattr(network, "forward_intermediates"):
        raise UserError(f"{name} does not hand out its middle layers; choose another timm network.")
    usual = next((i for i, level in enumerate(levels) if level.get("stage") == "conv2"), max(0, len(levels) - 2))
    index = usual if asked is None else asked
    if not -len(levels) <= index < len(levels):
        raise UserError(f"{name} has {len(levels)} levels; --layer is from 0 to {len(levels) - 1}.")
    return index % len(levels)


def first_per_class(labels: np.ndarray, number: int) -> np.ndarray:
    """Places of the first ``number`` samples of every class, in the order of the source; all of them for 0."""
    if not number:
        return np.arange(len(labels))
    kept = [np.flatnonzero(labels == each)[:number] for each in np.unique(labels)]
    return np.sort(np.concatenate(kept))


class _Pyramid(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


@torch.no_grad()
def _features(run: Run, encoder: nn.Module, dataset: Dataset, transform: Transform):
    for batch in evaluation_batches(dataset, _BATCH, transform=transform):
        levels = encoder(run.fabric.to_device(batch["image"]))
        yield [level.cpu() for level in levels], batch["label"]
