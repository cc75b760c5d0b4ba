"""TransNeXt: a sharp neighbourhood and a coarse whole in one softmax, at any resolution (Shi, arXiv 2311.17132).

The paper's claim: attention that sees a small window and a pooled view of the map together, with queries scaled by the
logarithm of the number of keys they see, is a strong and robust backbone at many image sizes.

What is measured here, on scenes of 32 pixels with one of eight shapes: a small three-stage network, and the same with
window-only and with pooled-only attention, each of the same number of parameters. The network and its twin with the
scale of queries fixed at that of training are also tried, untouched, on the same scenes at 48, 64 and 96 pixels. Then,
on the trained network, which places of the map reach the centre of one attention layer.

What was found over three seeds: what reaches one layer is as the paper says, the two gains are not there. At 32 pixels
pooled attention alone is already at 0.97, because one shape fills the picture and a coarse view of it is enough, so the
window has nothing left to add. At other sizes a scene is drawn larger, not only with more cells: at 96 pixels every
network is near chance (0.15 to 0.19 of 8 classes) whatever scales its queries, so the growing shape, not the growing
number of keys, is what hurts. Both would need scenes of many small things, which a map of 32 pixels has no room for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Share
from isthmus.codec import UserError, create_timm
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.encoders.images.aggregated_attention import AggregatedAttention, Grid
from isthmus.encoders.images.attention_halves import PooledAttention, WindowAttention, fix_scale, widened
from isthmus.encoders.images.transnext import TransNeXt
from isthmus.engine import Run, Training
from isthmus.engine.comparison import Comparison, Trained, check_arms
from isthmus.report import figures
from isthmus.tasks import classification
from isthmus.tasks.classification import DEIT, ClassificationConfig, ClassificationTask

needs = classification.NEEDS
answer = classification.answer

Attention = Callable[[int, int, int, float], nn.Module]

#: Arms of the comparison: the setting that asks for each, and its attention.
_ARMS: dict[str, tuple[str, Attention]] = {
    "aggregated": ("", AggregatedAttention),
    "window": ("parts", WindowAttention),
    "pooled": ("parts", PooledAttention),
    "fixed_scale": ("fixed_scale", AggregatedAttention),
}


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about three minutes on two cores."""

    data: str = "scenes?space=easy"
    """Labelled images; scenes without a size of their own are drawn anew at every size, all others are resized."""
    encoder: str = ""
    """A published size, such as transnext_tiny; a small network of three stages without it."""
    pooling: tuple[Count, ...] = (4, 2, 1)
    """Of the small network: cells of a map to one of its pooled view, stage by stage; 1 is plain attention."""
    size: Count = 32
    """Pixels a side in training."""
    sizes: tuple[Count, ...] = (48, 64, 96)
    """Further sides at which the trained network is tried."""
    images: Natural = 2000
    """Images to train on; 0 is all."""
    test_images: Natural = 1000
    """Images to measure on; 0 is all."""
    parts: bool = True
    """Train the window-only and pooled-only networks too."""
    fixed_scale: bool = True
    """Train the network whose queries are scaled for the number of keys in training, too."""
    drop_path: Share = 0.0
    """Probability of leaving out the last block; it grows linearly from 0."""
    training: Training = Training(epochs=12, batch_size=64, lr=2e-3, weight_decay=0.05, warmup_epochs=1, clip=1.0)
    """Training of every network."""

    @classmethod
    def paper(cls) -> Config:
        """TransNeXt-T on ImageNet as published."""
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            encoder="transnext_tiny",
            size=224,
            sizes=(384,),
            images=0,
            test_images=0,
            parts=False,
            fixed_scale=False,
            drop_path=0.25,
            smoothing=0.1,
            augmentation=DEIT,
            training=Training(
                epochs=300,
                batch_size=1024,
                lr=1e-3,
                weight_decay=0.05,
                warmup_epochs=5,
                warmup_from=1e-3,
                final_lr_ratio=0.01,
                clip=1.0,
                workers=8,
            ),
            eval_split="val",  # the labels of ImageNet's test pictures are not public
        )


def check(config: Config) -> None:
    """Refuse networks that cannot be built."""
    if config.encoder and not config.encoder.startswith("transnext_"):
        raise UserError(f"encoder {config.encoder!r} is no TransNeXt; this recipe compares its kinds of attention.")
    check_arms({name: partial(make, 2) for name, make in _makers(config).items()})


def run(config: Config, run: Run) -> None:
    """Train the networks, try them at other sizes, look at one layer."""
    task = classification.open(replace(config, data=_drawn_at(config.data, config.size)), run, images=config.images)
    held_out = {size: _held_out(config, size, run.seed) for size in config.sizes} | {config.size: task.held_out}
    transforms = {size: classification.inputs_of(replace(config, size=size)).transform() for size in held_out}
    accuracies: dict[str, dict[int, float]] = {}

    def train(name: str, network: nn.Module) -> Trained:
        trained = task.train(name, network)
        accuracies[name] = {}
        for size, dataset in sorted(held_out.items()):
            found = accuracies[name][size] = task.measure(trained.model, dataset, transforms[size])["accuracy"]
            run.metric(f"accuracy_{size}" if name == "aggregated" else f"accuracy_{name}_{size}", found)
        return trained

    makers = {name: partial(make, task.num_classes) for name, make in _makers(config).items()}
    arms = Comparison(run, makers, train, lambda network: {})
    ours, size = accuracies["aggregated"], config.size
    if config.parts:
        run.metric("gain_over_parts", ours[size] - max(accuracies["window"][size], accuracies["pooled"][size]))
    if config.fixed_scale:
        fixed = accuracies["fixed_scale"]
        for other in config.sizes:
            run.metric(f"loss_saved_{other}", (fixed[size] - fixed[other]) - (ours[size] - ours[other]))
    if config.sizes:
        lines = {name.replace("_", "-"): sorted(points.items()) for name, points in accuracies.items()}
        figure = figures.lines(lines, "pixels a side", "accuracy on held-out images")
        run.figure("sizes", figure, f"Trained at {size} pixels, tried at others without any change.")
    network = arms.first.model
    _look_at_one_layer(run, cast(TransNeXt, network), task)
    task.show(network)
    task.keep(network, "the trained network; `isthmus apply` classifies pictures with it")


def sensitivity(attention: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """What reaches the centre of one attention layer: |∂ Σ y[centre]² / ∂x|, summed over channels, mean of images.

    Args:
        attention: maps ``(B, H, W, C)`` to itself.
        x: ``(B, H, W, C)``, in double precision, so that what is small is not lost.
        grid: of the stage.

    Returns:
        ``(H, W)``.
    """
    layer, x = copy.deepcopy(attention).double().eval(), x.detach().double().requires_grad_()
    y = layer(x, grid)
    (gradient,) = torch.autograd.grad(y[:, grid.size[0] // 2, grid.size[1] // 2].square().sum(), x)
    return gradient.abs().sum(-1).mean(0)


def _look_at_one_layer(run: Run, network: TransNeXt, task: ClassificationTask) -> None:
    """Whole map, nine cells, sharp centre: of the first layer, on held-out images."""
    batch = next(evaluation_batches(task.held_out, min(32, len(task.held_out)), transform=task.measured))
    image = run.fabric.to_device(batch["image"])
    grid, stage = network.grids(image.shape[2], image.shape[3], image.device)[0], network.stages[0]
    with torch.no_grad():
        x = stage.blocks[0].norm1(stage.embed(image))
    whole = sensitivity(stage.blocks[0].attn, x, grid)
    window = WindowAttention(x.shape[3], stage.blocks[0].attn.heads).to(x.device)
    window.load_state_dict(stage.blocks[0].attn.state_dict(), strict=False)
    sharp = sensitivity(window, x, grid)
    strongest = whole.flatten().topk(max(1, whole.numel() // 100)).indices
    rows, columns = strongest // grid.size[1] - grid.size[0] // 2, strongest % grid.size[1] - grid.size[1] // 2
    run.metric("covered_share", float((whole > 0).double().mean()))
    run.metric("window_cells", int((sharp > 0).sum()))
    run.metric("sharpest_in_window", float(((rows.abs() <= 1) & (columns.abs() <= 1)).double().mean()))
    run.figure(
        "sensitivity",
        figures.maps({"window and pooled view": whole, "window alone": sharp}, "gradient", log=True),
        "What reaches the centre of the first attention layer (logarithm of the gradient; white is none).",
    )


def _makers(config: Config) -> dict[str, Callable[[int], nn.Module]]:
    """The arms that were asked for: name → the network for so many classes."""

    def fixed(num_classes: int) -> TransNeXt:
        network = _network(config, num_classes)
        fix_scale(network, config.size)
        return network

    asked = {name: attention for name, (flag, attention) in _ARMS.items() if not flag or getattr(config, flag)}
    makers: dict[str, Callable[[int], nn.Module]] = {
        name: partial(_network, config, attention=attention) for name, attention in asked.items()
    }
    return makers | ({"fixed_scale": fixed} if config.fixed_scale else {})


def _network(config: Config, num_classes: int, attention: Attention = AggregatedAttention) -> TransNeXt:
    """The network; with another attention the gated units are widened to give the same number of parameters."""
    make: Any = partial(create_timm, config.encoder)
    if not config.encoder:
        sizes = {"embed_dims": (24, 48, 96), "depths": (1, 1, 2), "num_heads": (1, 2, 4), "sr_ratios": config.pooling}
        make = partial(TransNeXt, **sizes, patch_size=2, pretrain_size=config.size)
    make = partial(make, num_classes=num_classes, drop_path_rate=config.drop_path)
    ratios = (8, 8, 4, 4) if config.encoder else (4, 4, 4)
    if attention is AggregatedAttention:
        return make(mlp_ratios=ratios)
    return make(mlp_ratios=widened(make, ratios, attention), attention=attention)


def _drawn_at(data: str, size: int) -> str:
    """Scenes without a size of their own are drawn anew at every size."""
    name, mark, rest = data.partition("?")
    return f"scenes:{size}{mark}{rest}" if name == "scenes" else data


def _held_out(config: Config, size: int, seed: int) -> Dataset:
    return load(_drawn_at(config.data, size), config.eval_split, needs, seed).first(config.test_images)
