"""ConViT: a transformer that starts as a convolution learns from fewer images (d'Ascoli et al., arXiv 2103.10697).

The paper's claim: with gated positional attention in its first layers, started as a convolution, a vision transformer
is more sample-efficient; the fewer training images, the larger the gain over the same transformer without.

What is measured here: a small ConViT and its twin without gated layers are trained on few and on more images for the
same number of steps and compared on held-out ones; how far every layer looks, and how open every gate is, over
training; and whether an untrained head looks at the offset that the initialisation gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.catalog import published
from isthmus.codec import UserError
from isthmus.data import evaluation_batches, load
from isthmus.encoders.images.convit import GPSA, ConViT, locality, relative_offsets
from isthmus.engine import Run, Training, read_config
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._image_classification import IMAGENET, Augmentation
from isthmus.report import figures

needs = ("image", "label")


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on two cores."""

    data: str = "digits"
    """Labelled images; any source will do."""
    images: tuple[float, ...] = (100, 400)
    """Training images of every comparison, ascending; up to 1 as a share of the source and of each of its classes."""
    size: int = 8
    """Pixels a side of what the networks see."""
    patch: int = 2
    """Pixels a side of a patch."""
    dim: int = 36
    """Width of the tokens."""
    heads: int = 9
    """Heads; a square number."""
    depth: int = 4
    """Blocks."""
    local: int = 3
    """Blocks with gated positional attention, from the first; the twin has none."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLPs over that of the tokens."""
    locality_strength: float = 1.0
    """How sharp the heads start; larger is sharper."""
    drop_path: float = 0.0
    """Stochastic depth."""
    training: Training = Training(
        steps=800, batch_size=50, lr=2e-3, weight_decay=0.05, warmup_steps=40, clip=1.0, evaluate_every=50
    )
    """Training of every network; at every evaluation distances and gates are measured."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Changes of training images."""
    smoothing: float = 0.0
    """Label smoothing."""
    mean: tuple[float, ...] = (0.3, 0.3, 0.3)
    """Mean of the channels, for normalisation."""
    std: tuple[float, ...] = (0.37, 0.37, 0.37)
    """Standard deviation of the channels."""
    train_split: str = "train"
    """Part of the data to train on."""
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
            augmentation=replace(shared.DEIT, repeats=3),
            smoothing=0.1,
            mean=IMAGENET[0],
            std=IMAGENET[1],
            eval_split="val",
        )


def run(config: Config, run: Run) -> None:
    """Train both networks on every number of images, compare, and draw how locality changes."""
    if list(config.images) != sorted(config.images) or not config.images:
        raise UserError(f"images must be ascending numbers, got {config.images}.")
    source = load(config.data, config.train_split, needs, run.seed)
    held_out = load(config.data, config.eval_split, needs, run.seed)
    classes = shared.class_names(source, held_out)
    augmented, plain = _transforms(config, len(classes))
    run.log(f"{config.data}: {len(source)} images to train on, {len(held_out)} held out, {len(classes)} classes.")
    run.metric("offset_share", offset_share(_network(config, config.local, len(classes)).blocks[0].attn))

    watched = next(evaluation_batches(held_out, min(64, len(held_out)), transform=plain))["image"]
    largest = max(n if n > 1 else n * len(source) for n in config.images)
    shares = any(0 < n < 1 for n in config.images)
    labels = shared.all_labels(load(config.data, config.train_split, ("label",), run.seed)) if shares else None
    accuracies: dict[str, list[tuple[float, float]]] = {"ConViT": [], "ViT": []}
    gains, networks, watching = [], {}, {}
    for number in config.images:
        balanced = labels if number < 1 else None
        chosen = shared.subset(source, number, run.seed, config.training.batch_size, round(largest), balanced)
        for name, local in (("ConViT", config.local), ("ViT", 0)):
            run.seed_everything("network")
            network = _network(config, local, len(classes))
            start = _looked(network, watched)
            told = f"{name.lower()}_{number:g}".replace(".", "_")
            result = shared.train(
                run,
                told,
                network,
                chosen,
                config.training,
                augmented,
                config.smoothing,
                _Watch(run, watched),
                config.augmentation.repeats,
            )
            trained: Any = result.objective
            networks[name], watching[name] = trained.model, _over_training(start, result.curves)
            found = shared.accuracy(shared.confusion(run, trained.model, len(classes), held_out, plain))
            accuracies[name].append((number, found))
            reported = published("convit").get(f"accuracy_{told}") if config.size == 224 else None
            run.metric(f"accuracy_{told}", found, published=reported)
        gains.append(accuracies["ConViT"][-1][1] - accuracies["ViT"][-1][1])
        run.metric(f"gain_{number:g}_images", gains[-1])
    if len(gains) > 1:
        run.metric("gain_lost_with_images", gains[0] - gains[-1])

    figure = shared.curves(accuracies, "training images", "accuracy", log=True)
    run.figure("sample_efficiency", figure, "Held-out accuracy, by the number of training images.")
    _draw_locality(run, watching, networks["ConViT"], plain, held_out)
    shared.look(run, networks["ConViT"], classes, held_out, plain)
    shared.keep(
        run, networks["ConViT"], classes, f"the ConViT of the most images: {_how_to_load(config, len(classes))}"
    )


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Classify pictures with the trained ConViT: ``classes.json``, and every picture with its class above it."""
    saved = read_config(run_dir)["config"]
    names = ("size", "patch", "dim", "heads", "depth", "local", "mlp_ratio", "locality_strength")
    config = Config(**{key: saved[key] for key in names}, mean=tuple(saved["mean"]), std=tuple(saved["std"]))
    plain = _transforms(config, 1)[1]
    return shared.classify(run_dir, inputs, out, lambda classes: _network(config, config.local, classes), plain)


def convert(path: Path, out: Path) -> Path:
    """A published checkpoint of ConViT (tiny, small, base) as safetensors for timm.

    Raises:
        UserError: no such checkpoint.
    """
    state = shared.read_checkpoint(path, "ConViT")
    head = state.get("head.weight")
    arguments = {"num_classes": 0 if head is None else len(head)}
    names = ("convit_tiny", "convit_small", "convit_base", "convit_tiny_plus", "convit_small_plus", "convit_base_plus")
    return shared.convert_for_timm(state, path, out, dict.fromkeys(names, arguments))


# -------------------------------------------------------------------------------------------------------------- parts


def _network(config: Config, local: int, classes: int) -> ConViT:
    return ConViT(
        config.size,
        config.patch,
        num_classes=classes,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        local_up_to_layer=local,
        locality_strength=config.locality_strength,
    )


def _transforms(config: Config, classes: int) -> tuple[Any, Any]:
    pct = shared.usual_crop(config.size)
    return shared.transforms(
        config.size, classes, config.augmentation, config.mean, config.std, config.smoothing, crop_pct=pct
    )


def _how_to_load(config: Config, classes: int) -> str:
    sizes = {
        "img_size": config.size,
        "patch_size": config.patch,
        "embed_dim": config.dim // config.heads,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "local_up_to_layer": config.local,
        "num_classes": classes,
        "checkpoint_path": shared.NETWORK,
    }
    return f"timm.create_model('convit_tiny', {', '.join(f'{key}={value!r}' for key, value in sizes.items())})"


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


def _looked(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Mean distance and, where there is one, mean gate of every layer."""
    training = network.training
    found = {}
    for index, layer in enumerate(locality(network.eval(), images)):  # type: ignore[arg-type]
        found[f"distance_{index}"] = float(layer.distance.mean())
        if layer.gates is not None:
            found[f"gate_{index}"] = float(layer.gates.mean())
    network.train(training)
    return found


class _Watch:
    """What ``fit`` evaluates: the locality of the network that is trained, on the same images every time."""

    def __init__(self, run: Run, images: Tensor) -> None:
        self.images = run.fabric.to_device(images)

    def __call__(self, objective: nn.Module) -> dict[str, float]:
        return _looked(objective.model, self.images)  # type: ignore[arg-type]


def _over_training(
    start: Mapping[str, float], curves: Mapping[str, Sequence[tuple[int, float]]]
) -> dict[str, list[tuple[float, float]]]:
    return {name: [(0.0, value), *curves.get(f"evaluate/{name}", ())] for name, value in start.items()}


def _draw_locality(
    run: Run, watching: Mapping[str, Mapping[str, Any]], network: nn.Module, plain: Any, held_out: Any
) -> None:
    distances = {
        f"{name} layer {key.removeprefix('distance_')}": points
        for name, found in watching.items()
        for key, points in found.items()
        if key.startswith("distance")
    }
    caption = "How far the heads of a layer look on average, over training on the most images (layers from 0)."
    run.figure("locality", shared.curves(distances, "step", "mean distance in patches"), caption)
    gates = {f"layer {k.removeprefix('gate_')}": v for k, v in watching["ConViT"].items() if k.startswith("gate")}
    if not gates:
        return
    named = {name.replace("layer ", "layer"): points for name, points in gates.items()}
    run.figure(
        "gates", shared.curves(named, "step", "gate"), "Weight of position against content, mean over the heads."
    )
    for name, points in gates.items():
        run.metric(f"gate_{name.replace(' ', '_')}", points[-1][1])
    batch = next(evaluation_batches(held_out, 64, transform=plain))
    layers = locality(network, run.fabric.to_device(batch["image"]))  # type: ignore[arg-type]
    heads = {
        f"layer {i} head {h}": float(g)
        for i, layer in enumerate(layers)
        if layer.gates is not None
        for h, g in enumerate(layer.gates)
    }
    if len(heads) <= 40:
        run.figure("heads", figures.bars(heads, "gate"), "The gate of every head after training.")
