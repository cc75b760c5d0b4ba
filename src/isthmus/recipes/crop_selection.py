"""Crop selection: stable answers from any classifier, without training (Shifman and Weiss, arXiv 2404.07153).

The paper's claim: a camera that moves by one pixel changes the answers of modern networks; classifying a crop that is
chosen by its own content instead of the centre crop makes them stable, for about one per cent of accuracy.

What is measured here, on textures whose every crop shows the class: a small patch-wise network is trained once, then
tried on every view and its neighbours, one pixel off, with the centre crop, with selected crops of two sizes and by
two scores, and with cyclic selection under cyclic shifts; beside it an anti-aliased twin with the same budget, and
averaging over nine shifts, which costs nine times as much. How often two views choose the same crop is compared with
theory. ``--encoder NAME --checkpoint FILE`` tries a network that a person has, on any ``--data``, without training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, one_of
from isthmus.codec import UserError, create_timm
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.data.inputs import Inputs
from isthmus.data.subsets import subset
from isthmus.data.transforms import Compose, RandomCrop
from isthmus.encoders.images.patch_net import PatchNet
from isthmus.encoders.trained import num_outputs, trained
from isthmus.engine import Run, Training
from isthmus.engine.comparison import Comparison, Trained
from isthmus.report import figures
from isthmus.robustness.crop_selection import SCORES, CropSelection, same_crop_probability
from isthmus.robustness.shifts import EIGHT, FOUR, Stability, agreement, stability, view
from isthmus.tasks import classification, selected_crops
from isthmus.tasks.classification import ClassificationConfig, ClassificationTask

needs = classification.NEEDS
answer = selected_crops.answer

Predict = Callable[[Tensor], Tensor]

#: Images that a try-out shifts.
_FEW = 32


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about a minute on two cores."""

    data: str = "textures"
    """Labelled images, larger than the view by a pixel on every side; others are resized to that."""
    encoder: str = ""
    """A timm classifier; a small patch-wise network without it."""
    checkpoint: str = ""
    """Its trained weights; then nothing is trained."""
    view: Count = 96
    """Pixels a side of what the camera sees."""
    crop: Count = 48
    """Pixels a side of the crop that is classified; with the default there are 49 positions an axis."""
    wide_crop: Count = 82
    """A larger crop to compare with (15 positions)."""
    middle_crop: Count = 66
    """A third size at which theory is checked (31 positions)."""
    size: Natural = 0
    """Resize crops to this side for the network; 0 leaves them."""
    score: Annotated[str, one_of(SCORES)] = "hash"
    """What chooses the crop: hash, mean or saliency."""
    diagonals: bool = False
    """Shift by one pixel in eight directions instead of four."""
    antialiased: bool = True
    """Train an anti-aliased twin of the small network too."""
    images: Natural = 0
    """Images to train on; 0 is all."""
    training: Training = Training(epochs=18, batch_size=50, lr=3e-3, weight_decay=0.01, warmup_epochs=1)
    """Training of the small network, or of the timm classifier where there is no checkpoint."""

    @classmethod
    def paper(cls) -> Config:
        """ImageNet's validation pictures at 256 pixels, crops of 224 (33 positions), a published ResNet-50."""
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            encoder="resnet50",
            view=256,
            crop=224,
            wide_crop=240,
            middle_crop=232,
            diagonals=True,
            antialiased=False,
            training=Training(
                epochs=90, batch_size=256, optimizer="sgd", lr=0.1, weight_decay=1e-4, warmup_epochs=5, workers=8
            ),
            eval_split="val",  # the labels of ImageNet's test pictures are not public
        )


def check(config: Config) -> None:
    """Refuse crops without room and networks that do not take them."""
    if config.checkpoint and not config.encoder:
        raise UserError("a checkpoint needs the name of its network: give --encoder too.")
    for name in ("crop", "middle_crop", "wide_crop"):
        if getattr(config, name) >= config.view:
            raise UserError(
                f"--{name.replace('_', '-')} must lie below --view {config.view}, got {getattr(config, name)}."
            )
    if config.view - 2 < config.crop:
        raise UserError(f"--view {config.view} leaves a crop of {config.crop} no room; it needs two pixels more.")
    if not config.checkpoint:
        with torch.device("meta"):
            num_outputs(_network(config, 2), config.encoder or "the network", config.size or config.crop)


def run(config: Config, run: Run) -> None:
    """Train once, or take a trained network, then shift every picture."""
    held_out = _dataset(config, config.eval_split, config.test_images, run.seed)
    if config.checkpoint:
        network = trained(config.encoder, config.checkpoint, log=run.log)
        task = ClassificationTask(config, run, held_out, held_out, _inputs(config, network))
        found = num_outputs(network, config.encoder, config.size or config.crop)
        if found != task.num_classes:
            raise UserError(
                f"{config.checkpoint} is for {found} classes, {config.data} has {task.num_classes}; give data with "
                "the classes of the network."
            )
        run.log(f"{config.encoder} from {config.checkpoint}; {len(held_out)} images to shift.")
        networks = {"plain": network}
    else:
        source = _dataset(config, config.train_split, config.images, run.seed)
        run.log(f"{config.data}: {len(source)} images to train on, {len(held_out)} held out.")
        with torch.device("meta"):
            inputs = _inputs(config, _network(config, 2))
        task = ClassificationTask(config, run, source, held_out, inputs)
        networks = _trained(config, task)
    for network in networks.values():
        network.to(run.fabric.device).eval()
    _measure(run, config, networks, held_out)
    _compare_with_theory(run, config, held_out)
    _show(run, config, networks["plain"], held_out)
    facts = {name: getattr(config, name) for name in ("view", "crop", "size", "score")}
    task.keep(networks["plain"], "the network; `isthmus apply` classifies pictures by selected crops", **facts)


# ---------------------------------------------------------------------------------------------------------- measuring


def _measure(run: Run, config: Config, networks: dict[str, nn.Module], held_out: Dataset) -> None:
    """Accuracy, flips and fooled images of every way to answer."""
    plain = networks["plain"]
    shifts = EIGHT if config.diagonals else FOUR

    def centred(network: nn.Module) -> Predict:
        return lambda views: network(selected_crops.prepared(network, view(views, config.crop), config.size))

    def averaged(views: Tensor) -> Tensor:
        crops = [view(views, config.crop, shift) for shift in ((0, 0), *EIGHT)]
        prepared = [selected_crops.prepared(plain, crop, config.size) for crop in crops]
        return sum(plain(crop).softmax(1) for crop in prepared)  # type: ignore[return-value]

    ways: dict[str, Predict] = {
        "centre": centred(plain),
        "selected": _selecting(config, plain, config.crop),
        "selected_wide": _selecting(config, plain, config.wide_crop),
        "selected_by_mean": _selecting(config, plain, config.crop, score="mean"),
        "averaged": averaged,
    }
    if "antialiased" in networks:
        ways["antialiased"] = centred(networks["antialiased"])
        ways["antialiased_selected"] = _selecting(config, networks["antialiased"], config.crop)
    found: dict[str, Stability] = {}
    for name, predict in ways.items():
        found[name] = result = stability(predict, _batches(run, config, held_out), config.view, shifts)
        run.metric(f"accuracy_{name}", result.accuracy)
        run.metric(f"flips_{name}", result.flips)
        run.metric(f"fooled_{name}", result.fooled)
    centre, selected = found["centre"], found["selected"]
    run.metric("accuracy_lost", centre.accuracy - selected.accuracy)
    run.metric("flips_saved", 1 - selected.flips / centre.flips if centre.flips else 0.0)
    run.metric("fooled_ratio", selected.fooled / centre.fooled if centre.fooled else 1.0)

    cyclic = ((1, 0), (0, 3), (5, 7))
    around = _selecting(config, plain, config.crop, cyclic=True)
    for name, predict in (("centre", ways["centre"]), ("selected", around)):
        result = stability(predict, _batches(run, config, held_out), config.view, cyclic, cyclic=True)
        run.metric(f"cyclic_flips_{name}", result.flips)
        if name == "selected":
            run.metric("cyclic_accuracy_selected", result.accuracy)

    points = {name.replace("_", " "): [(result.fooled, result.accuracy)] for name, result in found.items()}
    label = f"images whose class one of {len(shifts)} one-pixel shifts changes"
    drawn = figures.scatter(points, label, "accuracy")
    run.figure("pareto", drawn, "Upper left is better. Nothing was trained for the selected crops.")


def _compare_with_theory(run: Run, config: Config, held_out: Dataset) -> None:
    """How often a view and its neighbours choose the same pixels, for three sizes of the crop."""
    furthest, points = 0.0, {"measured": [], "theory": []}
    for crop in sorted({config.crop, config.middle_crop, config.wide_crop}):
        chooser = _selecting(config, nn.Identity(), crop)
        positions = config.view - crop + 1
        same, all_same = agreement(chooser.select, _batches(run, config, held_out), config.view)
        theory = same_crop_probability(positions, [FOUR[0]])
        run.metric(f"same_crop_{positions}_positions", same, published=round(theory, 4))
        all_four = round(same_crop_probability(positions, FOUR), 4)
        run.metric(f"same_crop_all_four_{positions}_positions", all_same, published=all_four)
        furthest = max(furthest, abs(same - theory))
        points["measured"].append((positions, same))
        points["theory"].append((positions, theory))
    run.metric("distance_from_theory", furthest)
    lines = {name: sorted(found) for name, found in points.items()}
    figure = figures.lines(lines, "positions of the crop an axis", "same crop after one pixel")
    run.figure("theory", figure, "How often two views, one pixel apart, select the very same pixels.")


def _show(run: Run, config: Config, network: nn.Module, held_out: Dataset) -> None:
    """Views of one picture, one pixel apart, with the crops they choose."""
    image = next(_batches(run, config, held_out.first(1)))["image"]
    chooser = _selecting(config, network, config.crop)
    figure = Figure(figsize=(9, 2.3), layout="constrained")
    for axis, shift in zip(figure.subplots(1, 5), ((0, 0), *FOUR), strict=True):
        shifted = view(image, config.view, shift)
        top, left = chooser.select(shifted).offset[0].tolist()
        axis.imshow(shifted[0].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), config.crop, config.crop, fill=False, color="tab:red", lw=2))
        axis.set_title(f"shifted by {shift}\ncrop at {top}, {left}", fontsize=9)
        axis.axis("off")
    run.figure("views", figure, "The crop moves against the shift, so that its content stays.")


# -------------------------------------------------------------------------------------------------------------- parts


def _network(config: Config, num_classes: int, antialiased: bool = False) -> nn.Module:
    if config.encoder:
        return create_timm(config.encoder, num_classes=num_classes)
    return PatchNet(num_classes, antialiased)


def _trained(config: Config, task: ClassificationTask) -> dict[str, nn.Module]:
    """The network, and its anti-aliased twin where there is one, trained on crops from anywhere in the picture."""
    transform = Compose([selected_crops.source(config.view), RandomCrop(config.crop), task.augmented])
    makers = {"plain": partial(_network, config, task.num_classes)}
    if config.antialiased and not config.encoder:
        makers["antialiased"] = partial(_network, config, task.num_classes, True)

    def train(name: str, network: nn.Module) -> Trained:
        return task.train(name, network, transform=transform)

    arms = Comparison(task.run, makers, train, lambda network: {})
    return {name: arm.model for name, arm in arms.arms.items()}


def _inputs(config: Config, network: nn.Module) -> Inputs:
    """What the network is fed: crops, all of each."""
    side = config.size or config.crop
    return Inputs.of(network, (side, side), crop_pct=1.0)


def _selecting(config: Config, network: nn.Module, crop: int, **changes: Any) -> CropSelection:
    return selected_crops.selecting(network, crop, config.size, **{"score": config.score, **changes})


def _batches(run: Run, config: Config, dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in evaluation_batches(
        dataset.first(_FEW) if run.few else dataset, 100, transform=selected_crops.source(config.view)
    ):
        yield {key: run.fabric.to_device(value) for key, value in batch.items() if key in ("image", "label")}


def _dataset(config: Config, split: str, count: int, seed: int) -> Dataset:
    dataset = load(config.data, split, needs, seed)
    return subset(dataset, count, 0) if count and count < len(dataset) else dataset
