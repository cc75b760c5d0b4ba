"""InceptionNeXt: four branches in place of a large depthwise kernel (Yu et al., CVPR 2024, arXiv 2303.16900).

The paper's claim: splitting the depthwise 7x7 convolution of ConvNeXt into an identity, a small square and two bands
keeps its accuracy and takes away most of its cost.

What is measured here: the time of the mixer alone, forward and backward, beside a depthwise 7x7 at its fastest; and
the accuracy of small networks that differ in their mixer only: Inception, 7x7, 3x3, and none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import nn

from isthmus.bounds import Count, Natural, Positive, Share, at_least, one_of
from isthmus.codec import UserError
from isthmus.encoders.images.inceptionnext import MIXERS, InceptionDWConv2d, mixer_network
from isthmus.engine import Run, Training
from isthmus.engine.timing import median_seconds
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.tasks import classification
from isthmus.tasks.classification import DEIT, ClassificationConfig

needs = classification.NEEDS
answer = classification.answer


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about three minutes on two cores."""

    data: str = "scenes:32?space=easy&count=1800"
    """Labelled images; any source will do."""
    mixers: tuple[Annotated[str, one_of(MIXERS)], ...] = ("inception", "7x7", "3x3", "identity")
    """Networks to train, by their mixer; the first is kept for use."""
    depths: tuple[Count, ...] = (1, 1, 2, 1)
    """Blocks of every stage."""
    dims: tuple[Count, ...] = (24, 48, 64, 96)
    """Width of every stage."""
    mlp_ratios: tuple[Positive, ...] = (4, 4, 4, 3)
    """Hidden width of the MLPs over that of the stage."""
    stem_stride: Count = 2
    """Pixels a side that one cell of the first stage covers; 4 is published."""
    layer_scale: Annotated[float, at_least(0)] = 0.1
    """Weight of every block at the start; 1e-6 is published."""
    drop_path: Share = 0.0
    """Stochastic depth."""
    rounds: Natural = 12
    """Timings of the mixer, of which the median counts; 0 leaves them out."""
    test_images: int = 1000
    """Held-out images to measure on; 0 is all."""

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
            augmentation=DEIT,
            smoothing=0.1,
            test_images=0,
            eval_split="val",
        )


def check(config: Config) -> None:
    """Refuse to compare nothing."""
    if not config.mixers:
        raise UserError(f"--mixers names no network; choose from {', '.join(MIXERS)}.")


def run(config: Config, run: Run) -> None:
    """Time the mixer, train a network with every mixer, compare."""
    task = classification.open(config, run)
    if config.rounds:
        _costs(run, config.rounds)
    arms = task.compare({mixer: partial(_network, config, mixer) for mixer in config.mixers})
    arms.over("inception", "accuracy")
    arms.bars("accuracy", "Held-out accuracy of networks that differ in the mixer.", grey="identity", name="mixers")
    task.show(arms.first.model)
    task.keep(arms.first.model, f"the network with the mixer {config.mixers[0]}")


def _network(config: Config, mixer: str, num_classes: int) -> nn.Module:
    return mixer_network(
        mixer,
        config.depths,
        config.dims,
        mlp_ratios=config.mlp_ratios,
        num_classes=num_classes,
        stem_stride=config.stem_stride,
        layer_scale=config.layer_scale,
        drop_path_rate=config.drop_path,
    )


def _costs(run: Run, rounds: int) -> None:
    """Forward and backward of the mixer over that of a depthwise 7x7, the fastest we have, on one thread."""
    device = run.fabric.device
    for channels, side in ((96, 28), (192, 14)):
        x = torch.randn(8, channels, side, side, generator=run.generator("cost", channels)).to(device).requires_grad_()
        mixers = {
            "inception": InceptionDWConv2d(channels),
            "7x7": DepthwiseConv(channels, 7),
            "plain": nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            "3x3": DepthwiseConv(channels, 3),
        }
        calls = {name: partial(_forward_backward, mixer.to(device), x) for name, mixer in mixers.items()}
        seconds = median_seconds(calls, rounds, device=device)
        run.metric(f"cost_ratio_{channels}_channels", seconds["inception"] / seconds["7x7"])
        run.metric(f"cost_ratio_to_plain_conv2d_{channels}_channels", seconds["inception"] / seconds["plain"])
        run.metric(f"cost_ratio_to_3x3_{channels}_channels", seconds["inception"] / seconds["3x3"])


def _forward_backward(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).sum().backward()
