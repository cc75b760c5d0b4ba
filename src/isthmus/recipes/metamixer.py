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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Positive, Share
from isthmus.catalog import published
from isthmus.codec import UserError, create_timm
from isthmus.encoders.backbone import made_for
from isthmus.encoders.images.token_mixers import mixer_network
from isthmus.encoders.signals.metamixer_forecaster import MetaMixerForecaster
from isthmus.engine import Run, Training
from isthmus.engine.comparison import Comparison, check_arms, count_parameters
from isthmus.engine.timing import median_seconds
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks import classification, forecasting
from isthmus.tasks.applying import Answer, Item
from isthmus.tasks.classification import DEIT, ClassificationConfig

needs = classification.NEEDS


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about two minutes on one core."""

    data: str = "scenes:32?space=easy&count=1500"
    """Labelled images; any source will do."""
    encoder: str = ""
    """A timm name, such as metamixer_ffnet_1, to train that network alone; small networks are compared without it."""
    mixers: tuple[str, ...] = ("ffnified", "attention", "pooling", "depthwise", "identity")
    """Token mixers to compare; the network of the first is kept for use. There is also hybrid: attention in the last
    stage, FFNified attention before."""
    size: Count = 32
    """Pixels a side of what the networks see."""
    depths: tuple[Count, ...] = (1, 1, 2, 1)
    """Blocks of every stage."""
    dims: tuple[Count, ...] = (24, 48, 64, 96)
    """Width of every stage."""
    heads: Count = 4
    """Heads of self-attention."""
    mlp_ratio: Positive = 3.0
    """Hidden width of the channel mixers over that of the stage."""
    stem_stride: Count = 2
    """Pixels a side that one cell of the first stage covers."""
    drop_path: Share = 0.0
    """Stochastic depth of the last block."""
    training: Training = Training(epochs=12, batch_size=64, lr=2e-3, weight_decay=0.05, warmup_epochs=1, clip=1.0)
    """Training of every network."""
    latency_size: Count = 256
    """Pixels a side of the image whose forward pass is timed."""
    rounds: Natural = 3
    """Timings of every network, of which the median counts; 0 leaves them out."""
    series: str = ""
    """Windows of series, such as series:ETTh1.csv or series, to forecast with MetaMixer as well; none without it."""
    history: Count = 96
    """Values of a series that are read."""
    horizon: Count = 96
    """Values of a series that are forecast."""
    forecasting: Training = Training(steps=300, batch_size=64, lr=2e-3, warmup_steps=20)
    """Training of the forecaster."""
    test_images: Natural = 1000
    """Held-out images to measure on; 0 is all."""

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
            augmentation=replace(DEIT, mixup=0.2),
            smoothing=0.1,
            forecasting=Training(epochs=100, batch_size=512, lr=1e-4, optimizer="adam"),
            test_images=0,
            eval_split="val",
        )


def check(config: Config) -> None:
    """Refuse networks that cannot be built."""
    if not config.encoder and not config.mixers:
        raise UserError("no mixer to compare; name one in mixers, or a network in encoder.")
    check_arms({name: partial(make, 2) for name, make in _makers(config).items()})


def run(config: Config, run: Run) -> None:
    """Train a network with every mixer, compare them, merge and time them."""
    task = classification.open(config, run)
    probe = torch.randn(4, 3, config.size, config.size, generator=run.generator("probe")).to(run.fabric.device)
    errors: list[float] = []

    def measure(network: nn.Module) -> dict[str, float]:
        accuracy, merged = task.measure(network), _merged(network)
        errors.append(_difference(merged, network, probe))
        return {**accuracy, "parameters": count_parameters(merged)}

    makers = _makers(config)
    arms = task.compare(makers, published("metamixer"), measure)
    run.metric("merging_error", max(errors))
    sizes = arms.values("parameters")
    if len(sizes) > 1:
        run.metric("parameters_spread", max(sizes.values()) / min(sizes.values()) - 1)
        caption = "Held-out accuracy of networks that differ in the token mixer."
        arms.bars("accuracy", caption, grey="identity", name="mixers")
    arms.over("ffnified", "accuracy")
    if config.rounds:
        _time(run, config, arms)
    task.show(arms.first.model)
    how = "the network" if config.encoder else "the network with the mixer"
    task.keep(arms.first.model, f"{how} {arms.first.name}, not merged yet")
    if config.series:
        make = partial(MetaMixerForecaster, length=config.history, horizon=config.horizon, dropout=0.7)
        forecasting.forecast(run, config.series, config.history, config.horizon, config.forecasting, make)


def answer(kept: Saved, item: Item) -> Answer:
    """The class of a picture; what follows in a table of series (``.csv``)."""
    return (forecasting if kept.inputs.kind == "series" else classification).answer(kept, item)


def _makers(config: Config) -> dict[str, Callable[[int], nn.Module]]:
    """What is trained: name → a network for so many classes."""
    if config.encoder:
        drop = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        sized = made_for(config.encoder, config.size)  # transformers have positions for one size
        return {
            config.encoder: lambda num_classes: create_timm(config.encoder, num_classes=num_classes, **sized, **drop)
        }
    return {mixer: partial(_network, config, mixer) for mixer in config.mixers}


def _network(config: Config, mixer: str, num_classes: int) -> nn.Module:
    return mixer_network(
        mixer,
        config.depths,
        config.dims,
        config.heads,
        mlp_ratio=config.mlp_ratio,
        stem_stride=config.stem_stride,
        num_classes=num_classes,
        drop_path_rate=config.drop_path,
    )


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
def _time(run: Run, config: Config, arms: Comparison) -> None:
    """Milliseconds of every merged network for one image, on one thread of the CPU."""
    side = config.size if made_for(config.encoder, -1) else config.latency_size
    image = torch.randn(1, 3, side, side, generator=run.generator("image"))
    calls = {name: partial(_merged(arm.model).to("cpu"), image) for name, arm in arms.arms.items()}
    seconds = median_seconds(calls, config.rounds, warm_up=1)
    for name, value in seconds.items():
        run.metric(f"latency_{name}", 1000 * value, unit="ms")
    if {"ffnified", "attention"} <= seconds.keys():
        run.metric("latency_ratio_to_attention", seconds["ffnified"] / seconds["attention"])
    if len(seconds) > 1:
        caption = f"Milliseconds for one image of {side} pixels, merged, on one thread."
        run.figure("latency", figures.bars({name: 1000 * value for name, value in seconds.items()}, "ms"), caption)
