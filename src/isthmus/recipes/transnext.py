"""TransNeXt: a sharp neighbourhood and a coarse whole in one softmax, at any resolution (Shi, arXiv 2311.17132).

The paper's claim: attention that sees a small window and a pooled view of the map together, with queries scaled by the
logarithm of the number of keys they see, is a strong and robust backbone at many image sizes.

What is measured here, on scenes of 32 pixels with one of eight shapes: a small three-stage network, and the same with
window-only and with pooled-only attention, each of the same number of parameters. The network and its twin with the
scale of queries fixed at that of training are also tried, untouched, on the same scenes at 48, 64 and 96 pixels. Then,
on the trained network, which places of the map one attention layer hears of.

What was found over three seeds: what one layer hears of is as the paper says, the two gains are not there. At 32 pixels
pooled attention alone is already at 0.97, because one shape fills the picture and a coarse view of it is enough, so the
window has nothing left to add. At other sizes a scene is drawn larger, not only with more cells: at 96 pixels every
network is near chance (0.15 to 0.19 of 8 classes) whatever scales its queries, so the growing shape, not the growing
number of keys, is what hurts. Both would need scenes of many small things, which a map of 32 pixels has no room for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.codec import UserError, create_timm
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.data.transforms import Transform
from isthmus.encoders.images.aggregated_attention import AggregatedAttention, CosineAttention, Grid, unit
from isthmus.encoders.images.transnext import TransNeXt
from isthmus.engine import Run, Training, read_config
from isthmus.recipes import _image_classification as shared

needs = ("image", "label")


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about three minutes on two cores."""

    data: str = "scenes?space=easy"
    """Labelled images; scenes without a size of their own are drawn anew at every size, all others are resized."""
    encoder: str = ""
    """A published size, such as transnext_tiny; a small network of three stages without it."""
    pooling: tuple[int, ...] = (4, 2, 1)
    """Of the small network: cells of a map to one of its pooled view, stage by stage; 1 is plain attention."""
    size: int = 32
    """Pixels a side in training."""
    sizes: tuple[int, ...] = (48, 64, 96)
    """Further sides at which the trained network is tried."""
    images: int = 2000
    """Images to train on; 0 is all."""
    test_images: int = 1000
    """Images to measure on; 0 is all."""
    parts: bool = True
    """Train the window-only and pooled-only networks too."""
    fixed_scale: bool = True
    """Train the network whose queries are scaled for the number of keys in training, too."""
    drop_path: float = 0.0
    """Probability of leaving out the last block; it grows linearly from 0."""
    smoothing: float = 0.0
    """Label smoothing."""
    augmentation: shared.Augmentation = field(default_factory=shared.Augmentation)
    """How training images are changed."""
    training: Training = Training(epochs=12, batch_size=64, lr=2e-3, weight_decay=0.05, warmup_epochs=1, clip=1.0)
    """Training of every network."""
    train_split: str = "train"
    """Part of the data to train on."""
    eval_split: str = "test"
    """Part of the data to measure on."""

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
            augmentation=shared.DEIT,
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


class WindowAttention(AggregatedAttention):
    """The sharp half alone: nothing outside the window is seen."""

    def __init__(self, dim: int, heads: int, window: int = 3, attn_drop: float = 0.0) -> None:
        super().__init__(dim, heads, window, attn_drop)
        del self.sr, self.norm, self.cpb

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        unit_queries = unit(self.split(self.q(x)), 2)
        queries = self.scaled(unit_queries, self.query_embedding.transpose(1, 2), grid)
        keys, values = self.split(self.kv(x)).chunk(2, 1)
        attention = self.local_logits(queries, keys, grid).softmax(2)
        return self.join(self.local_sum(attention, unit_queries, values, grid), grid)

    def count(self, grid: Grid) -> Tensor | int:
        """The window's places inside the map."""
        return grid.visible.sum(0)


class PooledAttention(AggregatedAttention):
    """The coarse half alone."""

    def __init__(self, dim: int, heads: int, window: int = 3, attn_drop: float = 0.0) -> None:
        super().__init__(dim, heads, window, attn_drop)
        del self.local_bias, self.learnable_tokens, self.learnable_bias

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        queries = self.scaled(unit(self.split(self.q(x)), 2), self.query_embedding.transpose(1, 2), grid)
        keys, values = self.split(self.kv(self.pooled(x, grid.keys))).chunk(2, 1)
        return self.join(values @ self.coarse_logits(queries, keys, grid).softmax(2).to(values.dtype), grid)

    def count(self, grid: Grid) -> Tensor | int:
        """The pooled keys."""
        return grid.keys[0] * grid.keys[1]


def run(config: Config, run: Run) -> None:
    """Train the networks, try them at other sizes, look at one layer."""
    train_set = shared.first(_dataset(config, config.train_split, config.size, run.seed), config.images, "images")
    held_out = {
        size: shared.first(_dataset(config, config.eval_split, size, run.seed), config.test_images, "test_images")
        for size in _sizes(config)
    }
    classes = shared.class_names(train_set, held_out[config.size])
    augmented, _ = _transforms(config, config.size, len(classes))
    run.log(f"{config.data}: {len(train_set)} images to train on, {len(held_out[config.size])} held out.")

    networks: dict[str, TransNeXt] = {}
    for name, attention in _kinds(config).items():
        run.seed_everything("network")
        networks[name] = _network(config, len(classes), attention)
        if name == "fixed_scale":
            fix_scale(networks[name], config.size)
    found: dict[str, dict[int, float]] = {}
    for name, network in networks.items():
        shared.train(
            run,
            name,
            network,
            train_set,
            config.training,
            augmented,
            config.smoothing,
            repeats=config.augmentation.repeats,
        )
        found[name] = {}
        for size, dataset in held_out.items():
            table = shared.confusion(run, network, len(classes), dataset, _transforms(config, size)[1])
            found[name][size] = shared.accuracy(table)
            run.metric(f"accuracy_{size}" if name == "aggregated" else f"accuracy_{name}_{size}", found[name][size])
        run.metric(f"parameters_{name}", sum(p.numel() for p in network.parameters()), unit="parameters")

    ours, size = found["aggregated"], config.size
    if config.parts:
        run.metric("gain_over_parts", ours[size] - max(found["window"][size], found["pooled"][size]))
    if config.fixed_scale:
        fixed = found["fixed_scale"]
        for other in config.sizes:
            run.metric(f"loss_saved_{other}", (fixed[size] - fixed[other]) - (ours[size] - ours[other]))
    if config.sizes:
        lines = {name.replace("_", "-"): sorted(points.items()) for name, points in found.items()}
        run.figure(
            "sizes",
            shared.curves(lines, "pixels a side", "accuracy on held-out images"),
            f"Trained at {size} pixels, tried at others without any change.",
        )
    network = networks["aggregated"]
    _look_at_one_layer(run, network, config, held_out[size])
    shared.look(run, network, classes, held_out[size], _transforms(config, size)[1])
    shared.keep(run, network, classes, "the trained network; `isthmus apply` tells what is on pictures with it")


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Tell what is on pictures: ``classes.json`` and every picture with its likeliest class above it.

    Args:
        run_dir: a finished run.
        inputs: image files; others are left out.
        out: the folder to write to.

    Raises:
        UserError: the run is incomplete, or no input is an image.
    """
    saved = read_config(run_dir)["config"]
    saved = {**saved, "sizes": (), "training": Config().training, "augmentation": shared.Augmentation()}
    config = Config(**saved)
    make = functools.partial(_network, config)
    return shared.classify(run_dir, inputs, out, make, _transforms(config, config.size)[1])


def fix_scale(network: TransNeXt, size: int) -> None:
    """Scale queries for the number of keys that inner places see in images of ``size``, at every size."""
    for i, grid in enumerate(network.grids(size, size)):
        for module in network.stages[i].modules():
            if isinstance(module, CosineAttention):
                count = module.count(grid)
                module.fixed_count = int(count.max()) if isinstance(count, Tensor) else count


def heard(attention: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """What the centre of one attention layer hears of: |∂ Σ y[centre]² / ∂x|, summed over channels, mean of images.

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


def _look_at_one_layer(run: Run, network: TransNeXt, config: Config, dataset: Dataset) -> None:
    """Whole map, nine cells, sharp centre: of the first layer, on held-out images."""
    plain = _transforms(config, config.size)[1]
    image = run.fabric.to_device(next(evaluation_batches(dataset, min(32, len(dataset)), transform=plain))["image"])
    grid, stage = network.grids(image.shape[2], image.shape[3], image.device)[0], network.stages[0]
    with torch.no_grad():
        x = stage.blocks[0].norm1(stage.embed(image))
    whole = heard(stage.blocks[0].attn, x, grid)
    window = WindowAttention(x.shape[3], stage.blocks[0].attn.heads).to(x.device)
    window.load_state_dict(stage.blocks[0].attn.state_dict(), strict=False)
    sharp = heard(window, x, grid)
    strongest = whole.flatten().topk(max(1, whole.numel() // 100)).indices
    rows, columns = strongest // grid.size[1] - grid.size[0] // 2, strongest % grid.size[1] - grid.size[1] // 2
    run.metric("covered_share", float((whole > 0).double().mean()))
    run.metric("window_cells", int((sharp > 0).sum()))
    run.metric("sharpest_in_window", float(((rows.abs() <= 1) & (columns.abs() <= 1)).double().mean()))
    run.figure(
        "heard",
        _maps({"window and pooled view": whole, "window alone": sharp}),
        "What the centre of the first attention layer hears of (logarithm of the gradient; white is none).",
    )


def _maps(maps: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(3.4 * len(maps), 3.4), layout="constrained")
    for axis, (title, values) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items(), strict=True):
        shown = values.cpu().numpy()
        axis.imshow(np.log10(np.where(shown > 0, shown, np.nan)), cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    return figure


def _kinds(config: Config) -> dict[str, type[AggregatedAttention]]:
    kinds: dict[str, type[AggregatedAttention]] = {"aggregated": AggregatedAttention}
    if config.parts:
        kinds |= {"window": WindowAttention, "pooled": PooledAttention}
    return kinds | ({"fixed_scale": AggregatedAttention} if config.fixed_scale else {})


def _network(
    config: Config, classes: int, attention: Callable[[int, int, int, float], nn.Module] = AggregatedAttention
) -> TransNeXt:
    """The network; with another attention the gated units are widened to give the same number of parameters."""
    if config.encoder:
        if not config.encoder.startswith("transnext_"):
            raise UserError(f"encoder {config.encoder!r} is no TransNeXt; this recipe compares its kinds of attention.")
        make: Callable[..., Any] = functools.partial(create_timm, config.encoder)
    else:
        sizes = {
            "embed_dims": (24, 48, 96),
            "depths": (1, 1, 2),
            "num_heads": (1, 2, 4),
            "sr_ratios": tuple(config.pooling),
        }
        make = functools.partial(TransNeXt, **sizes, patch_size=2, pretrain_size=config.size)
    arguments = {"num_classes": classes, "drop_path_rate": config.drop_path}
    ratios = (8, 8, 4, 4) if config.encoder else (4, 4, 4)
    if attention is AggregatedAttention:
        return cast(TransNeXt, make(**arguments, mlp_ratios=ratios))
    with torch.device("meta"):
        wanted: Any = make(**arguments, mlp_ratios=ratios).stages
        without: Any = make(**arguments, mlp_ratios=ratios, attention=attention).stages
    ratios = [_widened(a, b, ratio) for a, b, ratio in zip(wanted, without, ratios, strict=True)]
    return cast(TransNeXt, make(**arguments, mlp_ratios=ratios, attention=attention))


def _widened(wanted: nn.Module, without: nn.Module, ratio: float) -> float:
    """The ratio of the gated units that makes up for the parameters that a stage lacks."""
    a, b = (sum(p.numel() for p in stage.parameters()) for stage in (wanted, without))
    units = [block.mlp for block in cast(Any, without).blocks]
    dim = units[0].fc2.out_features
    # A hidden channel has two rows of fc1, a column of fc2, a 3x3 kernel and three biases.
    hidden = units[0].fc2.in_features + round((a - b) / (len(units) * (3 * dim + 12)))
    return (-(-3 * hidden // 2) + 0.5) / dim if a != b else ratio


def _sizes(config: Config) -> Sequence[int]:
    return sorted({config.size, *config.sizes})


def _dataset(config: Config, split: str, size: int, seed: int) -> Dataset:
    drawn = {"size": size} if config.data.partition("?")[0] == "scenes" else {}
    return load(config.data, split, needs, seed, **drawn)


def _transforms(config: Config, size: int, classes: int = 1) -> tuple[Transform, Transform]:
    pct = shared.usual_crop(size)
    return shared.transforms(size, classes, config.augmentation, smoothing=config.smoothing, crop_pct=pct)
