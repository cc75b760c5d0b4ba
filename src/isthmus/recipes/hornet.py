"""HorNet: interactions of high order between places, out of convolutions alone (Rao et al., arXiv 2207.14284).

The paper's claim: n gated products in a row give interactions of order n + 1 between places, which a convolution block
lacks and self-attention has; networks of such layers beat convolutions and attention of the same cost.

What is measured here: one g^n Conv of order 1, 2 and 3, and a block of a depthwise 7x7 convolution and an MLP of the
same size, learn a target whose parts a, ab, abc and abcd have a quarter of the variance each (``fields``). R² on fresh
fields says how high the order reaches; its share of every part says which ones were found. Then a small HorNet
classifies pictures, so that there is a network to use.

    isthmus run hornet --data folder:pictures --encoder hornet_tiny_7x7 --size 224 --orders
    isthmus apply RUN pictures/*.jpg

A target of one high degree alone is another matter (``--fields "fields?degrees=3"``): a product of factors that are all
small at the start has next to no gradient. In the same 400 steps order 2 reaches an R² of 0.03 on abc alone and order 3
none. The layers can express it; the optimiser finds it where lower degrees lead the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Share
from isthmus.catalog import published
from isthmus.codec import Loss, UserError, create_timm
from isthmus.data import load
from isthmus.encoders.backbone import made_for
from isthmus.encoders.images.hornet import HorNet
from isthmus.engine import Run, Training
from isthmus.engine.comparison import Comparison, Trained, check_arms, count_parameters
from isthmus.engine.fit import fit
from isthmus.layers.gnconv import GnConv
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.report import figures
from isthmus.tasks import classification
from isthmus.tasks.classification import DEIT, Augmentation, ClassificationConfig

needs = classification.NEEDS
answer = classification.answer

_COLUMNS = ("signal", "target", "terms", "mask")
_TERMS = ("a", "ab", "abc", "abcd")


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about a minute on two cores."""

    data: str = "digits"
    """Labelled images for the classifier; any source will do."""
    encoder: str = ""
    """Any timm name, such as hornet_tiny_7x7 or hornet_small_gf; a small HorNet without it."""
    fields: str = "fields"
    """The noise fields of the comparison of orders."""
    orders: tuple[Natural, ...] = (0, 1, 2, 3)
    """Orders to compare, 0 is the block without products; none leaves the comparison out."""
    width: Count = 64
    """Channels of the layers that are compared; it divides by 2^(order-1)."""
    comparison: Training = Training(
        steps=400, batch_size=16, optimizer="adam", lr=3e-3, final_lr_ratio=0.0, clip=5.0, evaluate_every=50
    )
    """Training of every layer that is compared."""
    size: Count = 8
    """Pixels a side of what the classifier sees."""
    depths: tuple[Count, ...] = (1, 1, 2, 1)
    """Blocks of the four stages of the small HorNet."""
    dims: tuple[Count, ...] = (16, 32, 64, 128)
    """Widths of its stages."""
    stem_stride: Count = 1
    """Pixels a side that one cell of its first stage covers; 4 is published."""
    global_filter: bool = False
    """Give it global filters in its last two stages, stored for images of this size."""
    layer_scale: float = 0.1
    """Weight of its blocks at the start; 1e-6 is published."""
    drop_path: Share = 0.0
    """Stochastic depth of the classifier."""
    training: Training = Training(epochs=20, batch_size=64, lr=4e-3, weight_decay=0.05, warmup_epochs=1, clip=1.0)
    """Training of the classifier."""
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(padding=1))
    """Changes of training images."""

    @classmethod
    def paper(cls) -> Config:
        """HorNet-T 7x7 on ImageNet-1k, without the comparison of orders.

        Global filters need a gradient clip of 1 in place of 100; S and B have stochastic depth 0.4 and 0.5, and 5.
        """
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            encoder="hornet_tiny_7x7",
            orders=(),
            size=224,
            drop_path=0.2,
            training=Training(
                epochs=300,
                batch_size=4096,
                lr=4e-3,
                weight_decay=0.05,
                warmup_epochs=20,
                final_lr_ratio=2.5e-4,
                clip=100.0,
                ema=0.9999,
                workers=8,
            ),
            augmentation=DEIT,
            smoothing=0.1,
            eval_split="val",
        )


def check(config: Config) -> None:
    """Refuse orders and networks that cannot be built."""
    if len(set(config.orders)) < len(config.orders):
        raise UserError(f"orders {config.orders}: different numbers from 0 on, where 0 is the block without products.")
    orders = {f"order {order}": partial(layer, order, config.width) for order in config.orders}
    check_arms({**orders, "network": partial(_fits, config)})


def run(config: Config, run: Run) -> None:
    """Compare orders on fields, then train and measure the classifier."""
    task = classification.open(config, run)
    config.training.length(len(task.source), "--training")  # what cannot be trained is told before the comparison
    if config.orders:
        _compare(config, run)
    arm = task.arm(partial(_network, config), "classifier")
    reported = published("hornet").get(f"accuracy_{config.encoder}") if "imagenet-1k" in config.data else None
    run.metric("accuracy", arm.metrics["accuracy"], published=reported)
    run.metric("parameters", count_parameters(arm.model), unit="parameters")
    task.show(arm.model)
    task.keep(arm.model, "the trained network; `isthmus apply` classifies pictures with it")


# -------------------------------------------------------------------------------------------------------- comparison


class _Regression(nn.Module):
    """The mean squared error of a layer between two 1x1 convolutions, at the places that are scored."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """``signal (B, C, H, W)`` against ``target (B, H, W)`` where ``mask`` is 1."""
        predicted, weight = self.model(batch["signal"])[:, 0], batch["mask"].to(batch["target"].dtype)
        return Loss(((predicted - batch["target"]).square() * weight).sum() / weight.sum())


def layer(order: int, width: int) -> nn.Module:
    """A g^n Conv of this order with scale 1; for order 0 a depthwise 7x7 and an MLP of about as many parameters."""
    if order:
        return GnConv(width, order=order, scale=1.0)
    hidden = round(width * 110 / 64)
    mlp = (nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1))
    return nn.Sequential(DepthwiseConv(width, 7), *mlp)


def explained(predicted: Tensor, batch: Mapping[str, Tensor]) -> tuple[float, list[float]]:
    """R² of a prediction ``(N, H, W)``, and the weight with which it holds every term: 1 is right, 0 is not there.

    Terms are uncorrelated, so the weight of one is its covariance with the prediction over its own variance.
    """
    inside = batch["mask"].bool()
    predicted, target = predicted[inside].double(), batch["target"][inside].double()
    rest = (predicted - target).square().sum() / (target - target.mean()).square().sum()
    terms = batch["terms"].movedim(1, -1)[inside].double()  # (places, degrees)
    shares = (terms * (predicted - predicted.mean())[:, None]).sum(0) / terms.square().sum(0)
    return 1 - float(rest), shares.tolist()


def _compare(config: Config, run: Run) -> None:
    """Train one layer an order on the same fields and measure them on the same fresh ones."""
    fields, fresh = (load(config.fields, split, _COLUMNS, run.seed) for split in ("train", "test"))
    batch = run.fabric.to_device(fresh.fetch(range(len(fresh))))
    shares: list[dict[str, float]] = []
    predictions: list[Tensor] = []

    def r2(objective: Any) -> dict[str, float]:
        return {"r2": explained(objective.model(batch["signal"])[:, 0], batch)[0]}

    def train(arm: str, model: nn.Module) -> Trained:
        result = fit(run, arm, _Regression(model), fields, config.comparison, evaluate=r2)
        trained: Any = result.objective if result.ema is None else result.ema
        return Trained(trained.model, result.curves)

    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        predictions.append(model(batch["signal"])[:, 0])
        score, weights = explained(predictions[-1], batch)
        shares.append(dict(zip(_TERMS, weights, strict=False)))
        return {"r2": score}

    channels = batch["signal"].shape[1]
    makers = {f"order_{order}": partial(_between, channels, order, config.width) for order in config.orders}
    arms = Comparison(run, makers, train, measure, start="layer")
    scores = arms.values("r2")
    for lower, higher in ((1, 2), (2, 3)):
        if {f"order_{lower}", f"order_{higher}"} <= scores.keys():
            run.metric(f"gain_of_order_{higher}", scores[f"order_{higher}"] - scores[f"order_{lower}"])

    names = [f"order {order}" if order else "no product" for order in config.orders]
    drawn = figures.grouped_bars(dict(zip(names, shares, strict=True)), "weight in the prediction", line=1)
    run.figure("terms", drawn, "The weight with which every layer holds each term of the target; 1 is right.")
    curves = dict(zip(names, arms.lines("evaluate/r2").values(), strict=False))
    run.figure("learning", figures.lines(curves, "step", "R²"), "R² on fresh fields over training.")
    rows, columns = batch["mask"][0].any(1), batch["mask"][0].any(0)
    fields_drawn = dict(zip(["target", *names], [batch["target"], *predictions], strict=True))
    maps = {name: field[0][rows][:, columns] for name, field in fields_drawn.items()}
    limit = float(maps["target"].abs().max())
    drawn = figures.maps(maps, signed=True, low=-limit, high=limit)
    run.figure("field", drawn, "The target on one fresh field, and what the layers predict.")


def _between(channels: int, order: int, width: int) -> nn.Module:
    """The layer between the 1x1 convolutions that read the field and write the prediction."""
    return nn.Sequential(nn.Conv2d(channels, width, 1), layer(order, width), nn.Conv2d(width, 1, 1))


# -------------------------------------------------------------------------------------------------------- classifier


def _network(config: Config, num_classes: int) -> nn.Module:
    if config.encoder:
        drop = {"drop_path_rate": config.drop_path} if config.drop_path else {}  # not every network has it
        sized = made_for(config.encoder, config.size)  # transformers have positions for one size
        return create_timm(config.encoder, num_classes=num_classes, **sized, **drop)
    sides = [config.size // (config.stem_stride * 2**i) for i in range(4)]
    filters = [None, None, *((side, side // 2 + 1) for side in sides[2:])] if config.global_filter else None
    return HorNet(
        config.depths,
        config.dims,
        filters=filters,
        num_classes=num_classes,
        stem_stride=config.stem_stride,
        layer_scale=config.layer_scale,
        drop_path_rate=config.drop_path,
    )


def _fits(config: Config) -> nn.Module:
    """The network, once pictures of this size are known to go through ours."""
    network = _network(config, 2).eval()
    if isinstance(network, HorNet):
        with torch.no_grad():
            network(torch.empty(1, network.in_chans, config.size, config.size))
    return network
