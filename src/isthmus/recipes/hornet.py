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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.catalog import published
from isthmus.codec import Loss, UserError, create_timm
from isthmus.data import load
from isthmus.encoders.backbone import made_for
from isthmus.encoders.images.hornet import HorNet, convert_official
from isthmus.engine import Run, Training, read_config
from isthmus.engine.fit import fit
from isthmus.layers.gnconv import GnConv
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._image_classification import Augmentation

needs = ("image", "label")

_COLUMNS = ("signal", "target", "terms", "mask")
_TERMS = ("a", "ab", "abc", "abcd")


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about a minute on two cores."""

    data: str = "digits"
    """Labelled images for the classifier; any source will do."""
    encoder: str = ""
    """Any timm name, such as hornet_tiny_7x7 or hornet_small_gf; a small HorNet without it."""
    fields: str = "fields"
    """The noise fields of the comparison of orders."""
    orders: tuple[int, ...] = (0, 1, 2, 3)
    """Orders to compare, 0 is the block without products; none leaves the comparison out."""
    width: int = 64
    """Channels of the layers that are compared; it divides by 2^(order-1)."""
    comparison: Training = Training(
        steps=400, batch_size=16, optimizer="adam", lr=3e-3, final_lr_ratio=0.0, clip=5.0, evaluate_every=50
    )
    """Training of every layer that is compared."""
    size: int = 8
    """Pixels a side of what the classifier sees."""
    depths: tuple[int, ...] = (1, 1, 2, 1)
    """Blocks of the four stages of the small HorNet."""
    dims: tuple[int, ...] = (16, 32, 64, 128)
    """Widths of its stages."""
    stem_stride: int = 1
    """Pixels a side that one cell of its first stage covers; 4 is published."""
    global_filter: bool = False
    """Give it global filters in its last two stages, stored for images of this size."""
    layer_scale: float = 0.1
    """Weight of its blocks at the start; 1e-6 is published."""
    drop_path: float = 0.0
    """Stochastic depth of the classifier."""
    training: Training = Training(epochs=20, batch_size=64, lr=4e-3, weight_decay=0.05, warmup_epochs=1, clip=1.0)
    """Training of the classifier."""
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(padding=1))
    """Changes of training images."""
    smoothing: float = 0.0
    """Label smoothing."""
    train_split: str = "train"
    """Part of the images to train on."""
    eval_split: str = "test"
    """Part of the images to measure on."""

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
            augmentation=Augmentation(
                crop=0.08, flip=True, mixup=0.8, cutmix=1.0, randaugment="rand-m9-mstd0.5-inc1", erasing=0.25
            ),
            smoothing=0.1,
            eval_split="val",
        )


def run(config: Config, run: Run) -> None:
    """Compare orders on fields, then train and measure the classifier."""
    source = load(config.data, config.train_split, needs, run.seed)
    held_out = load(config.data, config.eval_split, needs, run.seed)
    classes = shared.class_names(source, held_out)
    _check(config, len(classes))
    if config.orders:
        _compare(config, run)

    run.log(f"{config.data}: {len(source)} images to train on, {len(held_out)} held out, {len(classes)} classes.")
    augmented, plain = _transforms(config, len(classes))
    run.seed_everything("network")
    network = _network(config, len(classes))
    result: Any = shared.train(
        run,
        "classifier",
        network,
        source,
        config.training,
        augmented,
        config.smoothing,
        repeats=config.augmentation.repeats,
    )
    trained = (result.objective if result.ema is None else result.ema).model
    table = shared.confusion(run, trained, len(classes), held_out, plain)
    reported = published("hornet").get(f"accuracy_{config.encoder}") if "imagenet-1k" in config.data else None
    run.metric("accuracy", shared.accuracy(table), published=reported)
    run.metric("parameters", sum(p.numel() for p in network.parameters()), unit="parameters")
    shared.look(run, trained, classes, held_out, plain)
    shared.keep(run, trained, classes, "the trained network; `isthmus apply` tells what is on pictures with it")


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
    names = ("encoder", "size", "stem_stride", "global_filter", "layer_scale")
    config = Config(**{name: saved[name] for name in names}, depths=tuple(saved["depths"]), dims=tuple(saved["dims"]))
    plain = _transforms(config, 1)[1]
    return shared.classify(run_dir, inputs, out, lambda classes: _network(config, classes), plain)


def convert(path: Path, out: Path) -> Path:
    """A published checkpoint of HorNet, classifier or backbone of a detector or segmenter, as safetensors for timm.

    Args:
        path: a PyTorch file of raoyongming/HorNet.
        out: the safetensors file; its metadata names the timm model and its arguments.

    Raises:
        UserError: no such checkpoint.
    """
    state = convert_official(shared.read_checkpoint(path, "HorNet"))
    head = state.get("head.fc.weight")
    arguments: dict[str, Any] = {"num_classes": 0 if head is None else len(head)}
    if "norms.0.weight" in state:
        arguments["norm_features"] = True
        last = state["norms.3.weight"]  # dense checkpoints have no norm of the head
        state = {"head.norm.weight": torch.ones_like(last), "head.norm.bias": torch.zeros_like(last), **state}
    sizes = ["tiny_7x7", "tiny_gf", "small_7x7", "small_gf", "base_7x7", "base_gf", "large_7x7", "large_gf"]
    names = [f"hornet_{size}" for size in (*sizes, "base_gf_img384", "large_gf_img384")]
    return shared.convert_for_timm(state, path, out, dict.fromkeys(names, arguments))


# -------------------------------------------------------------------------------------------------------- comparison


class _Regression(nn.Module):
    """The mean squared error of a layer between two 1x1 convolutions, at the places that are scored."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """``signal (B, C, H, W)`` against ``target (B, H, W)`` where ``mask`` is 1."""
        told, weight = self.model(batch["signal"])[:, 0], batch["mask"].to(batch["target"].dtype)
        return Loss(((told - batch["target"]).square() * weight).sum() / weight.sum())


def layer(order: int, width: int) -> nn.Module:
    """A g^n Conv of this order with scale 1; for order 0 a depthwise 7x7 and an MLP of about as many parameters."""
    if order:
        return GnConv(width, order=order, scale=1.0)
    hidden = round(width * 110 / 64)
    mlp = (nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1))
    return nn.Sequential(DepthwiseConv(width, 7), *mlp)


def explained(told: Tensor, batch: Mapping[str, Tensor]) -> tuple[float, list[float]]:
    """R² of a prediction ``(N, H, W)``, and the weight with which it holds every term: 1 is right, 0 is not there.

    Terms are uncorrelated, so the weight of one is its covariance with the prediction over its own variance.
    """
    inside = batch["mask"].bool()
    told, target = told[inside].double(), batch["target"][inside].double()
    rest = (told - target).square().sum() / (target - target.mean()).square().sum()
    terms = batch["terms"].movedim(1, -1)[inside].double()  # (places, degrees)
    shares = (terms * (told - told.mean())[:, None]).sum(0) / terms.square().sum(0)
    return 1 - float(rest), shares.tolist()


def _check(config: Config, classes: int) -> None:
    """Refuse, before anything is trained, what cannot be built."""
    if min(config.orders, default=0) < 0 or len(set(config.orders)) < len(config.orders):
        raise UserError(f"orders {config.orders}: different numbers from 0 on, where 0 is the block without products.")
    if min(config.size, config.width) < 1:
        raise UserError(f"size {config.size} and width {config.width}: at least 1 each.")
    with torch.device("meta"), torch.no_grad():
        for order in config.orders:
            layer(order, config.width)
        network = _network(config, classes).eval()
        if isinstance(network, HorNet):
            network(torch.empty(1, network.in_chans, config.size, config.size))


def _compare(config: Config, run: Run) -> None:
    """Train one layer an order on the same fields and measure them on the same fresh ones."""
    fields, fresh = (load(config.fields, split, _COLUMNS, run.seed) for split in ("train", "test"))
    batch = run.fabric.to_device(fresh.fetch(range(len(fresh))))
    shares: dict[str, list[float]] = {}
    scores: dict[int, float] = {}
    over: dict[str, list[tuple[float, float]]] = {}
    shown: dict[str, Tensor] = {"target": batch["target"][0]}
    for order in config.orders:
        name = f"order {order}" if order else "no product"
        run.seed_everything("layer")
        model = nn.Sequential(
            nn.Conv2d(batch["signal"].shape[1], config.width, 1),
            layer(order, config.width),
            nn.Conv2d(config.width, 1, 1),
        )
        result = fit(run, f"order_{order}", _Regression(model), fields, config.comparison, evaluate=_Score(batch))
        trained: Any = result.objective
        with torch.no_grad():
            told = trained.model(batch["signal"])[:, 0]
        scores[order], shares[name] = explained(told, batch)
        shown[name] = told[0]
        over[name] = list(result.curves.get("evaluate/r2", ()))
        run.metric(f"r2_order_{order}", scores[order])
        run.metric(f"parameters_order_{order}", sum(p.numel() for p in model.parameters()), unit="parameters")
    for lower, higher in ((1, 2), (2, 3)):
        if lower in scores and higher in scores:
            run.metric(f"gain_of_order_{higher}", scores[higher] - scores[lower])
    run.figure("terms", _bars(shares), "The weight with which every layer holds each term of the target; 1 is right.")
    run.figure("learning", shared.curves(over, "step", "R²"), "R² on fresh fields over training.")
    run.figure("field", _maps(shown, batch["mask"][0]), "The target on one fresh field, and what the layers say.")


class _Score:
    """What ``fit`` evaluates: R² on the fresh fields."""

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.batch = batch

    def __call__(self, objective: nn.Module) -> dict[str, float]:
        model: Any = objective.model
        return {"r2": explained(model(self.batch["signal"])[:, 0], self.batch)[0]}


def _bars(shares: Mapping[str, Sequence[float]]) -> Figure:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(shares)
    for i, (name, values) in enumerate(shares.items()):
        axis.bar([k + (i + 0.5) * width - 0.4 for k in range(len(values))], values, width * 0.9, label=name)
    axis.set_xticks(range(len(_TERMS)), _TERMS)
    axis.set_ylabel("weight in the prediction")
    axis.axhline(1, color="tab:gray", linewidth=0.8, linestyle=":")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def _maps(maps: Mapping[str, Tensor], mask: Tensor) -> Figure:
    figure = Figure(figsize=(1.9 * len(maps), 2.1), layout="constrained")
    rows, columns = mask.any(1), mask.any(0)
    limit = float(maps["target"][rows][:, columns].abs().max())
    for axis, (name, values) in zip(figure.subplots(1, len(maps), squeeze=False).flat, maps.items(), strict=True):
        axis.imshow(values[rows][:, columns].cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    return figure


# -------------------------------------------------------------------------------------------------------- classifier


def _network(config: Config, classes: int) -> nn.Module:
    if config.encoder:
        drop = {"drop_path_rate": config.drop_path} if config.drop_path else {}  # not every network has it
        sized = made_for(config.encoder, config.size)  # transformers have positions for one size
        return create_timm(config.encoder, num_classes=classes, **sized, **drop)
    sides = [config.size // (config.stem_stride * 2**i) for i in range(4)]
    filters = [None, None, *((side, side // 2 + 1) for side in sides[2:])] if config.global_filter else None
    return HorNet(
        config.depths,
        config.dims,
        filters=filters,
        num_classes=classes,
        stem_stride=config.stem_stride,
        layer_scale=config.layer_scale,
        drop_path_rate=config.drop_path,
    )


def _transforms(config: Config, classes: int) -> tuple[Any, Any]:
    pct = 0.875 if config.size >= 224 else 1.0
    return shared.transforms(config.size, classes, config.augmentation, smoothing=config.smoothing, crop_pct=pct)
