"""MetaMixer: the query-key-value frame matters, not what fills it (Yun, Lee, Ro, arXiv 2406.02021).

The paper's claim: what makes attention work is the frame, a query that meets keys, an activation, coefficients that
weigh values; with depthwise convolutions and GELU in it (FFNified attention) networks are as good and much faster.

What is measured here, on scenes of 32 pixels with one of eight shapes: small networks of four stages that differ in the
token mixer only, with the same number of parameters: FFNified attention, self-attention, average pooling, a depthwise
7x7 convolution without the frame, and nothing that mixes places. Then the time of every merged network for one image of
256 pixels, and what merging changes in the outputs. With ``--series``, how well the network for time series forecasts.

What was found over three seeds: FFNified attention is at 0.99 and self-attention between 0.82 and 0.88, little above a
network that mixes no places in its blocks (0.83). 1,500 pictures favour operators that know what near means; there is
no position embedding here but the zero padding of the channel mixers' 3x3 convolutions, which all networks share.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.catalog import published
from isthmus.codec import UserError, create_timm
from isthmus.data import load
from isthmus.encoders.backbone import made_for
from isthmus.encoders.images.metamixer import MixerNet
from isthmus.engine import Run, Training, read_config
from isthmus.layers.metamixer import ConvNorm, ffnified_attention, reparam_depthwise, self_attention
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._metamixer_forecast import forecast, train_forecaster
from isthmus.report import figures

needs = ("image", "label")


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on one core."""

    data: str = "scenes:32?space=easy&count=1500"
    """Labelled images; any source will do."""
    encoder: str = ""
    """A timm name, such as metamixer_ffnet_1, to train that network alone; small networks are compared without it."""
    mixers: tuple[str, ...] = ("ffnified", "attention", "pooling", "depthwise", "identity")
    """Token mixers to compare; the network of the first is kept for use. There is also hybrid: attention in the last
    stage, FFNified attention before."""
    size: int = 32
    """Pixels a side of what the networks see."""
    depths: tuple[int, ...] = (1, 1, 2, 1)
    """Blocks of every stage."""
    dims: tuple[int, ...] = (24, 48, 64, 96)
    """Width of every stage."""
    heads: int = 4
    """Heads of self-attention."""
    mlp_ratio: float = 3.0
    """Hidden width of the channel mixers over that of the stage."""
    stem_stride: int = 2
    """Pixels a side that one cell of the first stage covers."""
    drop_path: float = 0.0
    """Stochastic depth of the last block."""
    training: Training = Training(epochs=12, batch_size=64, lr=2e-3, weight_decay=0.05, warmup_epochs=1, clip=1.0)
    """Training of every network."""
    augmentation: shared.Augmentation = field(default_factory=shared.Augmentation)
    """Changes of training images."""
    smoothing: float = 0.0
    """Label smoothing."""
    latency_size: int = 256
    """Pixels a side of the image whose forward pass is timed."""
    rounds: int = 3
    """Timings of every network, of which the median counts; 0 leaves them out."""
    series: str = ""
    """Windows of series, such as series:ETTh1.csv or series, to forecast with MetaMixer as well; none without it."""
    history: int = 96
    """Values of a series that are read."""
    horizon: int = 96
    """Values of a series that are told."""
    forecasting: Training = Training(steps=300, batch_size=64, lr=2e-3, warmup_steps=20)
    """Training of the forecaster."""
    test_images: int = 1000
    """Held-out images to measure on; 0 is all."""
    train_split: str = "train"
    """Part of the data to train on."""
    eval_split: str = "test"
    """Part of the data to measure on."""

    @classmethod
    def paper(cls) -> Config:
        """FFNet-2 on ImageNet-1k at 256 pixels without distillation; forecasting as on ETTh1, where series are given.

        The 20 epochs at the lowest rate that end the published recipe are left out.
        """
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            encoder="metamixer_ffnet_2",
            mixers=(),
            size=256,
            drop_path=0.15,
            training=Training(
                epochs=300,
                batch_size=1024,
                lr=1e-3,
                weight_decay=0.05,
                warmup_epochs=5,
                warmup_from=1e-3,
                final_lr_ratio=1e-2,
                ema=0.9995,
                workers=8,
            ),
            augmentation=replace(shared.DEIT, mixup=0.2),
            smoothing=0.1,
            forecasting=Training(epochs=100, batch_size=512, lr=1e-4, optimizer="adam"),
            test_images=0,
            eval_split="val",
        )


def run(config: Config, run: Run) -> None:
    """Train a network with every mixer, compare them, merge and time them."""
    if min(config.size, config.latency_size, config.heads) < 1 or min(config.rounds, config.test_images) < 0:
        raise UserError(
            f"size {config.size}, latency_size {config.latency_size} and heads {config.heads} are at least 1, rounds "
            f"{config.rounds} and test_images {config.test_images} at least 0."
        )
    makers = _makers(config)
    with torch.device("meta"):
        for make in makers.values():  # what cannot be built is told before the first is trained
            make(2)
    source = load(config.data, config.train_split, needs, run.seed)
    held_out = load(config.data, config.eval_split, needs, run.seed)
    if config.test_images:
        held_out = held_out.select(range(min(config.test_images, len(held_out))))  # type: ignore[arg-type]
    classes = shared.class_names(source, held_out)
    augmented, plain = _transforms(config, len(classes))
    run.log(f"{config.data}: {len(source)} images to train on, {len(held_out)} held out, {len(classes)} classes.")

    accuracies: dict[str, float] = {}
    sizes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    merging = 0.0
    kept: Any = None
    for name, make in makers.items():
        run.seed_everything("network")
        network = make(len(classes))
        result: Any = shared.train(run, name, network, source, config.training, augmented, config.smoothing)
        trained = result.objective.model if result.ema is None else result.ema.model
        kept = trained if kept is None else kept
        accuracies[name] = shared.accuracy(shared.confusion(run, trained, len(classes), held_out, plain))
        metric = f"accuracy_{name}"
        run.metric(metric, accuracies[name], published=published("metamixer").get(metric))
        merged = _merged(trained)
        sizes[name] = sum(p.numel() for p in merged.parameters())
        run.metric(f"parameters_{name}", sizes[name])
        probe = torch.randn(4, 3, config.size, config.size, generator=run.generator("probe")).to(run.fabric.device)
        merging = max(merging, _difference(merged, trained, probe))
        if config.rounds:
            side = config.size if made_for(config.encoder, -1) else config.latency_size
            image = torch.randn(1, 3, side, side, generator=run.generator("image"))
            seconds[name] = _latency(merged.to("cpu"), image, config.rounds)
            run.metric(f"latency_{name}", 1000 * seconds[name], unit="ms")
    run.metric("merging_error", merging)
    _compare(run, config, accuracies, sizes, seconds)
    shared.look(run, kept, classes, held_out, plain)
    first = next(iter(makers))
    how = f"timm.create_model({first!r}, num_classes={len(classes)})" if config.encoder else f"the mixer {first}"
    shared.keep(run, kept, classes, f"the network of {how}, not merged yet")
    if config.series:
        train_forecaster(run, config.series, config.history, config.horizon, config.forecasting)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Pictures to ``classes.json`` and every picture with its class; tables of series (``.csv``) to what follows."""
    tables = [path for path in inputs if path.suffix.lower() == ".csv"]
    told = [written for table in tables for written in forecast(run_dir, table, out)]
    pictures = [path for path in inputs if path not in tables]
    if not pictures:
        return told
    saved = read_config(run_dir)["config"]
    tuples = {key: tuple(saved[key]) for key in ("mixers", "depths", "dims")}
    single = {key: saved[key] for key in ("encoder", "size", "heads", "mlp_ratio", "stem_stride")}
    config = Config(**tuples, **single)
    make = next(iter(_makers(config).values()))
    return told + shared.classify(run_dir, pictures, out, make, _transforms(config, 1)[1])


# ------------------------------------------------------------------------------------------------------------- mixers


def mixer(name: str, heads: int, stages: int) -> Callable[[int, int], nn.Module]:
    """``mixer(dim, stage)`` for :class:`MixerNet`; merged, all have the same parameters.

    FFNified attention has C² + 101·C of them. The others get the inner width that comes nearest: of queries, keys and
    values in self-attention, and between two 1x1 convolutions elsewhere, so that mixers without kernels of their own
    mix channels instead.

    Raises:
        UserError: an unknown name.
    """

    def budget(dim: int) -> int:
        return dim**2 + 101 * dim

    def attention(dim: int, stage: int) -> nn.Module:  # 4·C·E + 3·E + C
        width = (budget(dim) - dim) / (4 * dim + 3)
        return self_attention(dim, heads, max(1, round(width / heads)) * heads)

    def between(places: Callable[[int], nn.Module], kernel: int) -> Callable[[int, int], nn.Module]:
        def make(dim: int, stage: int) -> nn.Module:  # 2·C·E + E + C, and k² + 1 for every channel of E
            width = round((budget(dim) - dim) / (2 * dim + 1 + (kernel**2 + 1 if kernel else 0)))
            return nn.Sequential(ConvNorm(dim, width), places(width), nn.Conv2d(width, dim, 1))

        return make

    def ffnified(dim: int, stage: int) -> nn.Module:
        return ffnified_attention(dim, 7)

    known: dict[str, Callable[[int, int], nn.Module]] = {
        "ffnified": ffnified,
        "attention": attention,
        "hybrid": lambda dim, stage: (attention if stage == stages - 1 else ffnified)(dim, stage),
        "pooling": between(lambda width: nn.AvgPool2d(3, 1, 1, count_include_pad=False), 0),
        "depthwise": between(lambda width: reparam_depthwise(width, 7), 7),
        "identity": between(lambda width: nn.Identity(), 0),
    }
    if name not in known:
        raise UserError(f"no mixer {name!r}; choose from {', '.join(known)}.")
    return known[name]


def _makers(config: Config) -> dict[str, Callable[[int], nn.Module]]:
    """What is trained: name → a network for so many classes."""
    if config.encoder:
        drop = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        sized = made_for(config.encoder, config.size)  # transformers have positions for one size
        return {config.encoder: lambda classes: create_timm(config.encoder, num_classes=classes, **sized, **drop)}
    if not config.mixers:
        raise UserError("no mixer to compare; name one in mixers, or a network in encoder.")

    def maker(name: str) -> Callable[[int], nn.Module]:
        made = mixer(name, config.heads, len(config.dims))
        return lambda classes: MixerNet(
            made,
            config.depths,
            config.dims,
            mlp_ratio=config.mlp_ratio,
            stem_stride=config.stem_stride,
            num_classes=classes,
            drop_path_rate=config.drop_path,
        )

    return {name: maker(name) for name in config.mixers}


def _transforms(config: Config, classes: int) -> tuple[Any, Any]:
    pct = 0.9 if config.size >= 224 else 1.0
    return shared.transforms(config.size, classes, config.augmentation, smoothing=config.smoothing, crop_pct=pct)


# ---------------------------------------------------------------------------------------------------------- measuring


def _merged(network: nn.Module) -> Any:
    """A merged copy, where the network can be merged."""
    merged: Any = copy.deepcopy(network).eval()
    if hasattr(merged, "reparameterize"):
        merged.reparameterize()
    return merged


@torch.no_grad()
def _difference(merged: nn.Module, network: nn.Module, x: Tensor) -> float:
    """Largest difference of the logits over the largest logit."""
    wanted = network.eval()(x)
    return float((merged(x) - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def _latency(network: nn.Module, image: Tensor, rounds: int) -> float:
    """Median seconds of a forward pass on one thread of the CPU, after one that does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            network(image)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])
    finally:
        torch.set_num_threads(threads)


def _compare(
    run: Run, config: Config, accuracies: Mapping[str, float], sizes: Mapping[str, int], seconds: Mapping[str, float]
) -> None:
    """Differences to FFNified attention, the spread of parameters, and two pictures."""
    if len(accuracies) < 2:
        return
    run.metric("parameters_spread", max(sizes.values()) / min(sizes.values()) - 1)
    caption = "Held-out accuracy of networks that differ in the token mixer."
    run.figure("mixers", figures.bars(accuracies, grey="identity"), caption)
    if "ffnified" in accuracies:
        for name in accuracies:
            if name != "ffnified":
                run.metric(f"accuracy_over_{name}", accuracies["ffnified"] - accuracies[name])
    if not seconds:
        return
    if {"ffnified", "attention"} <= seconds.keys():
        run.metric("latency_ratio_to_attention", seconds["ffnified"] / seconds["attention"])
    milliseconds = {name: 1000 * value for name, value in seconds.items()}
    caption = f"Milliseconds for one image of {config.latency_size} pixels, merged, on one thread."
    run.figure("latency", figures.bars(milliseconds, "ms"), caption)
