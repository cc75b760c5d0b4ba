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

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors import safe_open
from timm.layers import BlurPool2d
from torch import Tensor, nn

from isthmus.codec import UserError, create_timm, load_weights
from isthmus.data import Dataset, Memory, evaluation_batches, load
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.transforms import CenterCrop, Compose, RandomCrop, Resize
from isthmus.encoders.trained import trained
from isthmus.engine import Run, Training, read_config
from isthmus.recipes import _image_classification as shared
from isthmus.robustness.crop_selection import SCORES, CropSelection, same_crop_probability
from isthmus.robustness.shifts import EIGHT, FOUR, Stability, stability, view

needs = ("image", "label")

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about a minute on two cores."""

    data: str = "textures"
    """Labelled images, larger than the view by a pixel on every side; others are resized to that."""
    encoder: str = ""
    """A timm classifier; a small patch-wise network without it."""
    checkpoint: str = ""
    """Its trained weights; then nothing is trained."""
    view: int = 96
    """Pixels a side of what the camera sees."""
    crop: int = 48
    """Pixels a side of the crop that is classified; with the default there are 49 positions an axis."""
    wide_crop: int = 82
    """A larger crop to compare with (15 positions)."""
    middle_crop: int = 66
    """A third size at which theory is checked (31 positions)."""
    size: int = 0
    """Resize crops to this side for the network; 0 leaves them."""
    score: str = "hash"
    """What chooses the crop: hash, mean or saliency."""
    diagonals: bool = False
    """Shift by one pixel in eight directions instead of four."""
    antialiased: bool = True
    """Train an anti-aliased twin of the small network too."""
    images: int = 0
    """Images to train on; 0 is all."""
    test_images: int = 0
    """Images to measure on; 0 is all."""
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
        )


class PatchNet(nn.Module):
    """Patches of 8×8 pixels, two more convolutions, the mean over places: aliases as badly as any of its kind.

    Args:
        classes: outputs.
        antialiased: take patches at every fourth pixel and reach the same stride through a blur (Zhang 2019, arXiv
            1904.11486): as many parameters, about twice the work.
    """

    def __init__(self, classes: int, antialiased: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, stride=4 if antialiased else 8, padding=2 if antialiased else 0)
        self.blur = nn.Sequential(nn.ReLU(), *([BlurPool2d(48)] if antialiased else []))
        self.body = nn.Sequential(nn.Conv2d(48, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` → ``(B, classes)``."""
        return self.head(self.body(self.blur(self.patches(x))).mean((2, 3)))


def run(config: Config, run: Run) -> None:
    """Train once, or take a trained network, then shift every picture."""
    _check(config)
    held_out = _dataset(config, "test", config.test_images, run.seed)
    classes = shared.class_names(held_out)
    networks: dict[str, nn.Module] = {}
    if config.checkpoint:
        networks["plain"] = trained(config.encoder, config.checkpoint, log=run.log)
        told = shared.answers(networks["plain"], config.encoder, config.size or config.crop)
        if told != len(classes):
            raise UserError(f"{config.checkpoint} tells {told} classes apart, {config.data} has {len(classes)}.")
        run.log(f"{config.encoder} from {config.checkpoint}; {len(held_out)} images to shift.")
    else:
        train_set = _dataset(config, "train", config.images, run.seed)
        run.log(f"{config.data}: {len(train_set)} images to train on, {len(held_out)} held out.")
        kinds = ("plain", "antialiased") if config.antialiased and not config.encoder else ("plain",)
        for kind in kinds:
            run.seed_everything("network")
            network = _network(config, len(classes), kind == "antialiased")
            shared.answers(network, config.encoder or kind, config.size or config.crop)
            crop = Compose([*_source(config).transforms, RandomCrop(config.crop), *_sized(config), _normalise(network)])
            shared.train(run, kind, network, train_set, config.training, crop)
            networks[kind] = network
    for network in networks.values():
        network.to(run.fabric.device).eval()
    _measure(run, config, networks, held_out)
    _compare_with_theory(run, config, held_out)
    _show(run, config, networks["plain"], held_out)
    shared.keep(run, networks["plain"], classes, "the network; `isthmus apply` classifies pictures by selected crops")


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Classify pictures by the crop that their content selects, and try whether one pixel would change the answer.

    Args:
        run_dir: a finished run.
        inputs: image files of any size from the crop's upwards; they are resized and cut as in the run.
        out: gets ``classes.json`` (class, probability, where the crop is in pixels of the picture, answers of the
            neighbouring views one pixel off, as the run sees them) and ``NAME-crop.png``, the picture with its crop.

    Raises:
        UserError: the run is incomplete, or no input is an image that is large enough.
    """
    saved = read_config(run_dir)["config"]
    config = Config(**{**saved, "training": Config().training})
    path = run_dir / shared.NETWORK
    if not path.is_file():
        raise UserError(f"{run_dir} has no {shared.NETWORK}; run the recipe to its end first.")
    with safe_open(path, "pt") as file:
        classes = json.loads((file.metadata() or {}).get("classes", "[]"))
    network = _network(config, len(classes))
    load_weights(network, path)
    robust = _selecting(config, network.eval(), config.crop)
    found: dict[str, Any] = {}
    drawn: list[tuple[Path, Figure]] = []
    for source in inputs:
        try:
            image = decode_image(source)[None]
        except Unreadable as error:
            found[str(source)] = {"skipped": str(error)}
            continue
        if min(image.shape[2:]) < config.crop + 2:
            found[str(source)] = {"skipped": f"smaller than the crop of {config.crop} pixels and a pixel around it"}
            continue
        prepared = next(evaluation_batches(Memory("picture", {"image": image}), 1, transform=_source(config)))["image"]
        views = torch.cat([view(prepared, config.view, shift) for shift in ((0, 0), *EIGHT)])
        with torch.no_grad():
            offset = robust.select(views[:1]).offset[0]
            logits = robust(views)
        probability, told = logits[0].softmax(0), logits.argmax(1).tolist()
        place = _in_picture(config, image.shape[2:], offset)
        best = int(probability.argmax())
        target = out / f"{source.stem}-crop.png"
        if any(target == other for other, _ in drawn):
            target = out / f"{source.stem}-{len(drawn)}-crop.png"
        found[str(source)] = {
            "class": classes[best],
            "probability": round(float(probability[best]), 4),
            "crop": dict(zip(("top", "left", "size"), map(round, place), strict=True)),
            "answers_one_pixel_off": sorted({classes[number] for number in told}),
            "stable": len(set(told)) == 1,
            "picture": target.name,
        }
        drawn.append((target, _boxed(image[0], place, classes[best])))
    if not drawn:
        told_all = "; ".join(f"{name}: {entry['skipped']}" for name, entry in found.items())
        raise UserError(f"none of the inputs can be used ({told_all}); known are {', '.join(IMAGE_SUFFIXES)}.")
    out.mkdir(parents=True, exist_ok=True)
    for target, figure in drawn:
        figure.savefig(target)
    (out / "classes.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return [out / "classes.json", *(target for target, _ in drawn)]


# ---------------------------------------------------------------------------------------------------------- measuring


def _measure(run: Run, config: Config, networks: dict[str, nn.Module], held_out: Dataset) -> None:
    """Accuracy, flips and fooled images of every way to answer."""
    plain = networks["plain"]
    normalise = _normalise(plain)
    shifts = EIGHT if config.diagonals else FOUR

    def centred(network: nn.Module) -> Predict:
        return lambda views: network(_prepared(config, normalise, view(views, config.crop)))

    def averaged(views: Tensor) -> Tensor:
        return sum(
            plain(_prepared(config, normalise, view(views, config.crop, shift))).softmax(1)
            for shift in ((0, 0), *EIGHT)
        )  # type: ignore[return-value]

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

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, result in found.items():
        axis.scatter(result.fooled, result.accuracy, s=36)
        axis.annotate(name.replace("_", " "), (result.fooled, result.accuracy), (5, 4), textcoords="offset points")
    axis.set_xlabel(f"images whose answer one of {len(shifts)} one-pixel shifts changes")
    axis.set_ylabel("accuracy")
    axis.margins(0.18)
    axis.spines[["top", "right"]].set_visible(False)
    run.figure("pareto", figure, "Upper left is better. Nothing was trained for the selected crops.")


def _compare_with_theory(run: Run, config: Config, held_out: Dataset) -> None:
    """How often a view and its neighbours choose the same pixels, for three sizes of the crop."""
    furthest, points = 0.0, {"measured": [], "theory": []}
    for crop in sorted({config.crop, config.middle_crop, config.wide_crop}):
        chooser = _selecting(config, nn.Identity(), crop)
        positions = config.view - crop + 1
        same = all_same = total = 0
        for batch in _batches(run, config, held_out):
            still = chooser.select(view(batch["image"], config.view)).offset
            agreeing = torch.ones(len(still), dtype=torch.bool, device=still.device)
            for shift in FOUR:
                moved = chooser.select(view(batch["image"], config.view, shift)).offset
                equal = (moved + torch.tensor(shift, device=moved.device) == still).all(1)
                same, agreeing = same + int(equal.sum()), agreeing & equal
            total, all_same = total + len(still), all_same + int(agreeing.sum())
        theory = same_crop_probability(positions, [FOUR[0]])
        run.metric(f"same_crop_{positions}_positions", same / (4 * total), published=round(theory, 4))
        run.metric(
            f"same_crop_all_four_{positions}_positions",
            all_same / total,
            published=round(same_crop_probability(positions, FOUR), 4),
        )
        furthest = max(furthest, abs(same / (4 * total) - theory))
        points["measured"].append((positions, same / (4 * total)))
        points["theory"].append((positions, theory))
    run.metric("distance_from_theory", furthest)
    lines = {name: sorted(found) for name, found in points.items()}
    figure = shared.curves(lines, "positions of the crop an axis", "same crop after one pixel")
    run.figure("theory", figure, "How often two views, one pixel apart, select the very same pixels.")


def _show(run: Run, config: Config, network: nn.Module, held_out: Dataset) -> None:
    """Views of one picture, one pixel apart, with the crops they choose."""
    image = next(_batches(run, config, held_out.select(np.arange(1))))["image"]
    chooser = _selecting(config, network, config.crop)
    figure = Figure(figsize=(9, 2.3), layout="constrained")
    for axis, shift in zip(figure.subplots(1, 5), ((0, 0), *FOUR), strict=True):
        seen = view(image, config.view, shift)
        top, left = chooser.select(seen).offset[0].tolist()
        axis.imshow(seen[0].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), config.crop, config.crop, fill=False, color="tab:red", lw=2))
        axis.set_title(f"shifted by {shift}\ncrop at {top}, {left}", fontsize=9)
        axis.axis("off")
    run.figure("views", figure, "The crop moves against the shift, so that its content stays.")


# -------------------------------------------------------------------------------------------------------------- parts


def _check(config: Config) -> None:
    if config.checkpoint and not config.encoder:
        raise UserError("a checkpoint needs the name of its network: give --encoder too.")
    for name in ("crop", "middle_crop", "wide_crop"):
        if not 1 <= getattr(config, name) < config.view:
            raise UserError(
                f"--{name.replace('_', '-')} must lie below --view {config.view}, got {getattr(config, name)}."
            )
    if config.size < 0 or config.images < 0 or config.test_images < 0:
        raise UserError("--size, --images and --test-images must be 0 or more.")
    if config.score not in SCORES:
        raise UserError(f"--score is {', '.join(SCORES)}; got {config.score!r}.")
    if config.view - 2 < config.crop:
        raise UserError(f"--view {config.view} leaves a crop of {config.crop} no room; it needs two pixels more.")


def _network(config: Config, classes: int, antialiased: bool = False) -> nn.Module:
    if config.encoder:
        return create_timm(config.encoder, num_classes=classes)
    return PatchNet(classes, antialiased)


def _selecting(config: Config, network: nn.Module, crop: int, **changes: Any) -> CropSelection:
    mean, std = shared.pixels_of(network)
    options = {"size": config.size or None, "score": config.score, **changes}
    chooser = CropSelection(network, crop, mean=mean, std=std, **options)
    like = next(network.parameters(), torch.empty(0))
    return chooser.to(like.device).eval()


def _normalise(network: nn.Module) -> shared.Normalize:
    return shared.Normalize(*shared.pixels_of(network))


def _source(config: Config) -> Compose:
    """Pictures that reach a pixel further than the view on every side."""
    return Compose([Resize(config.view + 2), CenterCrop(config.view + 2)])


def _sized(config: Config) -> list[Any]:
    return [Resize(config.size)] if config.size else []


def _prepared(config: Config, normalise: Any, crops: Tensor) -> Tensor:
    if config.size:
        crops = nn.functional.interpolate(crops, (config.size, config.size), mode="bilinear", antialias=True)
    return normalise({"image": crops}, torch.Generator())["image"]


def _batches(run: Run, config: Config, dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in evaluation_batches(dataset, 100, transform=_source(config)):
        yield {key: run.fabric.to_device(value) for key, value in batch.items() if key in ("image", "label")}


def _dataset(config: Config, split: str, count: int, seed: int) -> Dataset:
    dataset = load(config.data, split, needs, seed)
    return shared.subset(dataset, count, 0) if count and count < len(dataset) else dataset


def _in_picture(config: Config, size: Sequence[int], offset: Tensor) -> tuple[float, float, float]:
    """Top, left and side of a crop of the view, in pixels of a picture of this size that was resized and cut for it."""
    scale = min(size) / (config.view + 2)
    top, left = ((side / scale - config.view - 2) / 2 + 1 + float(at) for side, at in zip(size, offset, strict=True))
    return top * scale, left * scale, config.crop * scale


def _boxed(image: Tensor, place: tuple[float, float, float], told: str) -> Figure:
    height, width = image.shape[1:]
    figure = Figure(figsize=(4 * width / max(height, width) + 0.2, 4 * height / max(height, width) + 0.5), dpi=100)
    axis = figure.subplots()
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    top, left, side = place
    axis.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, color="tab:red", lw=2))
    axis.set_title(told, fontsize=11)
    axis.axis("off")
    return figure
