"""ConViT: a transformer that starts as a convolution learns from fewer images (d'Ascoli et al., arXiv 2103.10697).

The paper's claim: with gated positional attention in its first layers, started as a convolution, a vision transformer
is more sample-efficient; the fewer training images, the larger the gain over the same transformer without.

What is measured here: a small ConViT and its twin without gated layers are trained on few and on more images for the
same number of steps and compared on held-out ones; how far every layer looks, and how open every gate is, over
training; and whether an untrained head looks at the offset that the initialisation gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Positive, Share
from isthmus.catalog import published
from isthmus.codec import UserError
from isthmus.data import Dataset, evaluation_batches
from isthmus.data.inputs import Inputs
from isthmus.data.subsets import subset
from isthmus.data.transforms.augmentation import IMAGENET
from isthmus.encoders.images.convit import GPSA, ConViT, locality, relative_offsets
from isthmus.engine import Run, Training
from isthmus.engine.comparison import Comparison, Trained
from isthmus.report import figures
from isthmus.tasks import classification
from isthmus.tasks.classification import DEIT, ClassificationConfig, ClassificationTask

needs = classification.NEEDS
answer = classification.answer

_KINDS = ("ConViT", "ViT")


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about two minutes on two cores."""

    images: tuple[Positive, ...] = (100, 400)
    """Training images of every comparison, ascending; up to 1 as a share of the source and of each of its classes."""
    size: Count = 8
    """Pixels a side of what the networks see."""
    patch: Count = 2
    """Pixels a side of a patch."""
    dim: Count = 36
    """Width of the tokens."""
    heads: Count = 9
    """Heads; a square number."""
    depth: Count = 4
    """Blocks."""
    local: Natural = 3
    """Blocks with gated positional attention, from the first; the twin has none."""
    mlp_ratio: Positive = 2.0
    """Hidden width of the MLPs over that of the tokens."""
    locality_strength: Positive = 1.0
    """How sharp the heads start; larger is sharper."""
    drop_path: Share = 0.0
    """Stochastic depth."""
    training: Training = Training(
        steps=800, batch_size=50, lr=2e-3, weight_decay=0.05, warmup_steps=40, clip=1.0, evaluate_every=50
    )
    """Training of every network; at every evaluation distances and gates are measured."""
    mean: tuple[float, ...] = (0.3, 0.3, 0.3)
    """Mean of the channels, for normalisation."""
    std: tuple[Positive, ...] = (0.37, 0.37, 0.37)
    """Standard deviation of the channels."""
    eval_split: str = "val+test"
    """Part of the data to measure on."""

    @classmethod
    def paper(cls) -> Config:
        """ConViT-S and its twin on five shares of ImageNet-1k, as many updates for each as 300 epochs of all images."""
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            images=(0.05, 0.1, 0.3, 0.5, 1.0),
            size=224,
            patch=16,
            dim=432,
            depth=12,
            local=10,
            mlp_ratio=4.0,
            drop_path=0.1,
            training=Training(
                steps=300 * 1251,
                batch_size=1024,
                lr=1e-3,
                weight_decay=0.05,
                warmup_steps=5 * 1251,
                warmup_from=1e-3,
                final_lr_ratio=1e-2,
                evaluate_every=10 * 1251,
                workers=8,
            ),
            augmentation=replace(DEIT, repeats=3),
            smoothing=0.1,
            mean=IMAGENET[0],
            std=IMAGENET[1],
            eval_split="val",
        )


def check(config: Config) -> None:
    """Refuse numbers of images that do not ascend, and networks that cannot be built."""
    if list(config.images) != sorted(config.images) or not config.images:
        raise UserError(f"images must be ascending numbers, got {config.images}.")
    with torch.device("meta"):
        _network(config, config.local, 2)


def run(config: Config, run: Run) -> None:
    """Train both networks on every number of images, compare, and draw how locality changes."""
    inputs = Inputs.of(None, (config.size, config.size), mean=config.mean, std=config.std)
    task = classification.open(config, run, inputs)
    run.metric("offset_share", offset_share(_network(config, config.local, task.num_classes).blocks[0].attn))

    images = next(evaluation_batches(task.held_out, min(64, len(task.held_out)), transform=task.measured))["image"]
    images = run.fabric.to_device(images)
    subsets = _subsets(config, task)
    datasets: dict[str, Dataset] = {}
    makers: dict[str, Callable[[], nn.Module]] = {}
    started: dict[str, dict[str, float]] = {}
    for number in config.images:
        for kind, local in {"ConViT": config.local, "ViT": 0}.items():
            makers[_arm(kind, number)] = partial(_network, config, local, task.num_classes)
            datasets[_arm(kind, number)] = subsets[number]

    def train(arm: str, network: nn.Module) -> Trained:
        started[arm] = _locality(network, images)
        return task.train(arm, network, datasets[arm], evaluate=partial(_locality, images=images))

    reported = published("convit") if config.size == 224 else None
    arms = Comparison(run, makers, train, task.measure, reported)
    accuracies = {
        kind: [(number, arms[_arm(kind, number)].metrics["accuracy"]) for number in config.images] for kind in _KINDS
    }
    gains = [ours[1] - twin[1] for ours, twin in zip(*accuracies.values(), strict=True)]
    for number, gain in zip(config.images, gains, strict=True):
        run.metric(f"gain_{number:g}_images", gain)
    if len(gains) > 1:
        run.metric("gain_lost_with_images", gains[0] - gains[-1])

    figure = figures.lines(accuracies, "training images", "accuracy", log_x=True)
    run.figure("sample_efficiency", figure, "Held-out accuracy, by the number of training images.")
    largest = {kind: arms[_arm(kind, config.images[-1])] for kind in _KINDS}
    curves = {kind: _over_training(started[arm.name], arm.curves) for kind, arm in largest.items()}
    network = largest["ConViT"].model
    _draw_locality(run, curves, network, task)
    task.show(network)
    task.keep(network, "the ConViT of the most images")


# -------------------------------------------------------------------------------------------------------------- parts


def _network(config: Config, local: int, num_classes: int) -> ConViT:
    return ConViT(
        config.size,
        config.patch,
        num_classes=num_classes,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        local_up_to_layer=local,
        locality_strength=config.locality_strength,
    )


def _arm(kind: str, number: float) -> str:
    return f"{kind.lower()}_{number:g}".replace(".", "_")


def _subsets(config: Config, task: ClassificationTask) -> dict[float, Dataset]:
    """Training images by their number; shares of the source are shares of every class too."""
    largest = round(max(number if number > 1 else number * len(task.source) for number in config.images))
    labels = task.source.labels if any(0 < number < 1 for number in config.images) else None
    return {
        number: subset(
            task.source,
            number,
            task.run.seed,
            config.training.batch_size,
            largest,
            labels if number < 1 else None,
        )
        for number in config.images
    }


# ---------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def offset_share(layer: GPSA, side: int = 14) -> float:
    """Share of heads and inner places from which positional attention is largest at the head's own offset.

    Where the square of offsets has an even side, the offset lies between cells, and its nearest cells count. A place
    is inner when the offset of every head is on the grid.
    """
    attention = layer.positional((side, side))
    width = int(layer.num_heads**0.5)
    margin = width // 2
    inner = torch.zeros(side, side, dtype=torch.bool)
    inner[margin : side - margin, margin : side - margin] = True
    delta = relative_offsets((side, side))[..., :2]
    right = total = 0
    for head in range(width**2):
        target = torch.tensor([head // width, head % width]) - (width - 1) / 2  # columns, rows
        distance = (delta - target).square().sum(-1)
        near = distance <= distance.amin(1, keepdim=True) + 1e-3
        hit = near.gather(1, attention[head].argmax(1, keepdim=True))[:, 0]
        right, total = right + int(hit[inner.flatten()].sum()), total + int(inner.sum())
    return right / total


def _locality(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Mean distance and, where there is one, mean gate of every layer."""
    training = network.training
    found = {}
    for index, layer in enumerate(locality(network.eval(), images)):  # type: ignore[arg-type]
        found[f"distance_{index}"] = float(layer.distance.mean())
        if layer.gates is not None:
            found[f"gate_{index}"] = float(layer.gates.mean())
    network.train(training)
    return found


def _over_training(
    start: Mapping[str, float], curves: Mapping[str, Sequence[tuple[int, float]]]
) -> dict[str, list[tuple[float, float]]]:
    return {name: [(0.0, value), *curves.get(f"evaluate/{name}", ())] for name, value in start.items()}


def _draw_locality(
    run: Run, curves: Mapping[str, Mapping[str, Any]], network: nn.Module, task: ClassificationTask
) -> None:
    distances = {
        f"{kind} layer {key.removeprefix('distance_')}": points
        for kind, found in curves.items()
        for key, points in found.items()
        if key.startswith("distance")
    }
    caption = "How far the heads of a layer look on average, over training on the most images (layers from 0)."
    run.figure("locality", figures.lines(distances, "step", "mean distance in patches"), caption)
    gates = {key.removeprefix("gate_"): points for key, points in curves["ConViT"].items() if key.startswith("gate")}
    if not gates:
        return
    drawn = figures.lines({f"layer{index}": points for index, points in gates.items()}, "step", "gate")
    run.figure("gates", drawn, "Weight of position against content, mean over the heads.")
    for index, points in gates.items():
        run.metric(f"gate_layer_{index}", points[-1][1])
    batch = next(evaluation_batches(task.held_out, 64, transform=task.measured))
    layers = locality(network, run.fabric.to_device(batch["image"]))  # type: ignore[arg-type]
    heads = {
        f"layer {i} head {h}": float(gate)
        for i, layer in enumerate(layers)
        if layer.gates is not None
        for h, gate in enumerate(layer.gates)
    }
    if len(heads) <= 40:
        run.figure("heads", figures.bars(heads, "gate"), "The gate of every head after training.")
