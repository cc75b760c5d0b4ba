"""InceptionNeXt: four branches in place of a large depthwise kernel (Yu et al., CVPR 2024, arXiv 2303.16900).

The paper's claim: splitting the depthwise 7x7 convolution of ConvNeXt into an identity, a small square and two bands
keeps its accuracy and takes away most of its cost.

What is measured here: the time of the mixer alone, forward and backward, beside a depthwise 7x7 at its fastest; and
the accuracy of small networks that differ in their mixer only: Inception, 7x7, 3x3, and none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus.codec import UserError
from isthmus.data import load
from isthmus.encoders.images.inceptionnext import InceptionDWConv2d
from isthmus.encoders.images.metanext import MetaNeXt
from isthmus.engine import Run, Training, read_config
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._image_classification import Augmentation
from isthmus.report import figures

needs = ("image", "label")

MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "inception": lambda dim, stage: InceptionDWConv2d(dim),
    "7x7": lambda dim, stage: DepthwiseConv(dim, 7),
    "3x3": lambda dim, stage: DepthwiseConv(dim, 3),
    "identity": lambda dim, stage: nn.Identity(),
}


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about three minutes on two cores."""

    data: str = "scenes:32?space=easy&count=1800"
    """Labelled images; any source will do."""
    mixers: tuple[str, ...] = ("inception", "7x7", "3x3", "identity")
    """Networks to train, by their mixer; the first is kept for use."""
    size: int = 32
    """Pixels a side of what the networks see."""
    depths: tuple[int, ...] = (1, 1, 2, 1)
    """Blocks of every stage."""
    dims: tuple[int, ...] = (24, 48, 64, 96)
    """Width of every stage."""
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 3)
    """Hidden width of the MLPs over that of the stage."""
    stem_stride: int = 2
    """Pixels a side that one cell of the first stage covers; 4 is published."""
    layer_scale: float = 0.1
    """Weight of every block at the start; 1e-6 is published."""
    drop_path: float = 0.0
    """Stochastic depth."""
    training: Training = Training(epochs=20, batch_size=64, lr=4e-3, weight_decay=0.05, warmup_epochs=1)
    """Training of every network."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Changes of training images."""
    smoothing: float = 0.0
    """Label smoothing."""
    rounds: int = 12
    """Timings of the mixer, of which the median counts; 0 leaves them out."""
    test_images: int = 1000
    """Held-out images to measure on; 0 is all."""
    train_split: str = "train"
    """Part of the data to train on."""
    eval_split: str = "test"
    """Part of the data to measure on."""

    @classmethod
    def paper(cls) -> Config:
        """InceptionNeXt-T on ImageNet-1k, and the same network with depthwise 7x7."""
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            mixers=("inception", "7x7"),
            size=224,
            depths=(3, 3, 9, 3),
            dims=(96, 192, 384, 768),
            stem_stride=4,
            layer_scale=1e-6,
            drop_path=0.1,
            training=Training(
                epochs=300,
                batch_size=4096,
                lr=4e-3,
                weight_decay=0.05,
                warmup_epochs=20,
                final_lr_ratio=2.5e-3,
                workers=8,
            ),
            augmentation=shared.DEIT,
            smoothing=0.1,
            test_images=0,
            eval_split="val",
        )


def run(config: Config, run: Run) -> None:
    """Time the mixer, train a network with every mixer, compare."""
    unknown = [name for name in config.mixers if name not in MIXERS]
    if unknown or not config.mixers:
        raise UserError(f"mixers {', '.join(unknown) or '()'}: choose from {', '.join(MIXERS)}.")
    if config.rounds < 0:
        raise UserError(f"rounds counts timings of the mixer; it must be 0 (none) or more, got {config.rounds}.")
    source = load(config.data, config.train_split, needs, run.seed)
    held_out = shared.first(load(config.data, config.eval_split, needs, run.seed), config.test_images, "test_images")
    classes = shared.class_names(source, held_out)
    augmented, plain = _transforms(config, len(classes))
    run.log(f"{config.data}: {len(source)} images to train on, {len(held_out)} held out, {len(classes)} classes.")

    if config.rounds:
        _costs(run, config.rounds)
    accuracies: dict[str, float] = {}
    kept: Any = None
    for name in config.mixers:
        run.seed_everything("network")
        network = _network(config, name, len(classes))
        result: Any = shared.train(
            run,
            name,
            network,
            source,
            config.training,
            augmented,
            config.smoothing,
            repeats=config.augmentation.repeats,
        )
        trained = result.objective.model
        kept = trained if kept is None else kept
        table = shared.confusion(run, trained, len(classes), held_out, plain)
        accuracies[name] = shared.accuracy(table)
        run.metric(f"accuracy_{name}", accuracies[name])
        run.metric(f"parameters_{name}", sum(p.numel() for p in network.parameters()))
    for name in config.mixers:
        if "inception" in accuracies and name != "inception":
            run.metric(f"accuracy_over_{name}", accuracies["inception"] - accuracies[name])
    run.figure(
        "mixers", figures.bars(accuracies, grey="identity"), "Held-out accuracy of networks that differ in the mixer."
    )
    shared.look(run, kept, classes, held_out, plain)
    shared.keep(run, kept, classes, f"the network with the mixer {config.mixers[0]}")


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Classify pictures with the first of the trained networks: ``classes.json``, and every picture with its class."""
    saved = read_config(run_dir)["config"]
    names = ("mixers", "depths", "dims", "mlp_ratios")
    config = Config(
        **{key: tuple(saved[key]) for key in names},
        **{key: saved[key] for key in ("size", "stem_stride", "layer_scale")},
    )
    plain = _transforms(config, 1)[1]
    return shared.classify(run_dir, inputs, out, lambda classes: _network(config, config.mixers[0], classes), plain)


def convert(path: Path, out: Path) -> Path:
    """A published checkpoint of InceptionNeXt, or of the paper's ConvNeXt-T with other kernels, for timm.

    Raises:
        UserError: no such checkpoint.
    """
    from timm.models.convnext import checkpoint_filter_fn

    from isthmus.codec import create_timm

    state = shared.read_checkpoint(path, "InceptionNeXt")
    head = next((state[key] for key in ("head.fc2.weight", "head.weight", "head.fc.weight") if key in state), None)
    arguments = {"num_classes": 0 if head is None else len(head)}
    if "downsample_layers.0.0.weight" in state:
        with torch.device("meta"):
            like = create_timm("convnext_tiny", **arguments)
        state = checkpoint_filter_fn(state, like)
        names = ["convnext_tiny", "convnext_tiny_k5", "convnext_tiny_k3"]
        names += [f"convnext_tiny_k3_par{share}" for share in ("1_2", "3_8", "1_4", "1_8", "1_16")]
    else:
        names = [f"inception_next_{size}" for size in ("atto", "tiny", "small", "base")]
    return shared.convert_for_timm(state, path, out, dict.fromkeys(names, arguments))


# -------------------------------------------------------------------------------------------------------------- parts


def _network(config: Config, mixer: str, classes: int) -> MetaNeXt:
    return MetaNeXt(
        config.depths,
        config.dims,
        MIXERS[mixer],
        mlp_ratios=config.mlp_ratios,
        num_classes=classes,
        stem_stride=config.stem_stride,
        layer_scale=config.layer_scale,
        drop_path_rate=config.drop_path,
    )


def _transforms(config: Config, classes: int) -> tuple[Any, Any]:
    pct = shared.usual_crop(config.size)
    return shared.transforms(config.size, classes, config.augmentation, smoothing=config.smoothing, crop_pct=pct)


def _costs(run: Run, rounds: int) -> None:
    """Forward and backward of the mixer over that of a depthwise 7x7, the fastest we have, on one thread."""
    for channels, side in ((96, 28), (192, 14)):
        seconds = _seconds(
            {
                "inception": InceptionDWConv2d(channels),
                "7x7": DepthwiseConv(channels, 7),
                "plain": nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
                "3x3": DepthwiseConv(channels, 3),
            },
            torch.randn(8, channels, side, side, generator=run.generator("cost", channels)),
            run.fabric.device,
            rounds,
        )
        run.metric(f"cost_ratio_{channels}_channels", seconds["inception"] / seconds["7x7"])
        run.metric(f"cost_ratio_to_plain_conv2d_{channels}_channels", seconds["inception"] / seconds["plain"])
        run.metric(f"cost_ratio_to_3x3_{channels}_channels", seconds["inception"] / seconds["3x3"])


def _seconds(parts: dict[str, nn.Module], x: torch.Tensor, device: torch.device, rounds: int) -> dict[str, float]:
    """Median time of forward and backward, in turn, after a warm-up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = x.to(device).requires_grad_()
        times: dict[str, list[float]] = {name: [] for name in parts}
        for part in parts.values():
            part.to(device)
        for turn in range(rounds + 2):
            for name, part in parts.items():
                if device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                part(x).sum().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn > 1:
                    times[name].append(time.perf_counter() - began)
        return {name: statistics.median(values) for name, values in times.items()}
    finally:
        torch.set_num_threads(threads)
