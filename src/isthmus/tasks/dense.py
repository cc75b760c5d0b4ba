"""Dense prediction: a class for every pixel, learnt from masks, measured by intersection over union.

::

    task = dense.open(config, run)
    segmenter = task.train("segmenter", encoder, decoder)
    found = task.measure(segmenter)             # miou, pixel_accuracy, and the IoU of every class
    task.show(segmenter, found)
    task.keep(segmenter, "the segmenter")
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from isthmus import saved
from isthmus.bounds import Count, Natural, Range, at_least
from isthmus.codec import Codec, UserError
from isthmus.data import Dataset, example_batch, load
from isthmus.data.inputs import Inputs
from isthmus.data.transforms import Compose, Flip, Normalize, RandomResizedCrop, Resize, Transform
from isthmus.engine import Run, Training
from isthmus.engine.evaluate import evaluate
from isthmus.engine.fit import fit
from isthmus.objectives.segmentation import Segmentation
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks.applying import Answer, Item

#: Columns that a segmenter learns from.
NEEDS = ("image", "mask")
_BATCH = 16
#: Bars that can be read.
_DRAWN = 24


@dataclass(frozen=True)
class DenseConfig:
    """Settings that every recipe of dense prediction has."""

    data: str = "scenes:64"
    """Pictures with masks."""
    size: tuple[Count, Count] = (64, 64)
    """Height and width of pictures in training and measuring."""
    smallest: Annotated[float, Range(0, 1, least_open=True)] = 0.4
    """Smallest share of a picture that a training crop covers."""
    classes: Natural = 0
    """Classes of the masks; counted in the data where it is 0; 1 learns one binary mask of the values 0 and 1."""
    ignore: Annotated[int, at_least(-1)] = -1
    """A class that is neither learnt nor measured, often 255; -1 is none."""
    images: Natural = 800
    """Pictures to train on; 0 is all."""
    test_images: Natural = 200
    """Pictures to measure on; 0 is all."""
    training: Training = Training(steps=240, batch_size=16, lr=3e-3, weight_decay=0.01, warmup_steps=20, clip=1.0)
    """Training of the segmenter."""


@dataclass(frozen=True)
class Overlap:
    """How well masks are predicted.

    Attributes:
        each: intersection over union of every class; NaN where no held-out mask holds it.
        miou: the mean over the classes that occur.
        pixel_accuracy: share of pixels that are right.
    """

    each: list[float]
    miou: float
    pixel_accuracy: float


def open(config: DenseConfig, run: Run, model: nn.Module | None = None) -> DenseTask:
    """Load pictures and masks, and find out what the masks hold.

    Args:
        config: the recipe's settings.
        run: its seed draws the samples.
        model: a timm model, whose own mean and deviation pictures are normalised with.
    """
    train = load(config.data, "train", NEEDS, run.seed).first(config.images)
    held_out = load(config.data, "test", NEEDS, run.seed).first(config.test_images)
    names = class_names(config, run, train, held_out)
    run.log(f"{config.data}: {len(train)} pictures to train on, {len(held_out)} held out, {len(names)} classes.")
    return DenseTask(config, run, train, held_out, names, Inputs.of(model, config.size, crop_pct=1.0))


def class_names(config: DenseConfig, run: Run, train: Dataset, held_out: Dataset) -> list[str]:
    """Names of what masks hold; numbers where the source does not name them.

    Every mask is looked at, because a class that only a few hold would end the training when it turns up.
    """
    if config.classes:
        return [str(number) for number in range(max(2, config.classes))]
    named = list(train.mask_classes or ())
    if hasattr(load(config.data, "train", ("mask",), run.seed), "object_classes"):  # drawn: there are no others
        return named
    largest = 0
    for dataset in (train, held_out):
        alone = dataset.select_columns(("mask",))
        for start in range(0, len(alone), 64):
            for sample in alone.samples(range(start, min(start + 64, len(alone)))):
                known = sample["mask"][sample["mask"] != config.ignore]
                largest = max(largest, int(known.max()) if known.numel() else 0)
    if largest == 255:
        run.log("The masks hold 255, which often means that nothing is known there; --ignore 255 leaves it out.")
    return named + [str(number) for number in range(len(named), largest + 1)]


class DenseTask:
    """Data, training and measuring of one run; made by :func:`open`.

    Attributes:
        train_set: pictures and masks to train on.
        held_out: pictures and masks that are only measured on.
        names: of the classes.
        inputs: what the networks are fed.
        outputs: logits a pixel: one a class, a single one for a binary mask.
        ignore: the class that is left out, or ``None``.
    """

    def __init__(
        self, config: DenseConfig, run: Run, train: Dataset, held_out: Dataset, names: list[str], inputs: Inputs
    ) -> None:
        self.config, self.run, self.train_set, self.held_out, self.names = config, run, train, held_out, names
        self.inputs, self.normalize = inputs, Normalize(inputs.mean, inputs.std)
        self.outputs = 1 if config.classes == 1 else len(names)
        self.ignore = None if config.ignore < 0 else config.ignore

    def train(
        self,
        phase: str,
        encoder: nn.Module,
        decoder: nn.Module,
        dataset: Dataset | None = None,
        training: Training | None = None,
        transform: Transform | None = None,
    ) -> Segmentation:
        """Train a segmenter; what is returned is its moving average, where the training has one.

        Args:
            phase: a name, once a run.
            encoder: pictures to a pyramid.
            decoder: the pyramid to logits ``(B, outputs, h, w)``.
            dataset: to train on; the task's own without it.
            training: how long and how fast; the config's without it.
            transform: of pictures and masks; random crops and mirroring without it.
        """
        crop = RandomResizedCrop(self.config.size, scale=(self.config.smallest, 1.0))
        dataset = self.train_set if dataset is None else dataset
        objective = Segmentation(encoder, decoder, self.ignore)
        steps = transform or Compose([crop, Flip(), self.normalize])
        result = fit(self.run, phase, objective, dataset, training or self.config.training, steps)
        return cast(Segmentation, result.ema or result.objective)

    def measure(
        self,
        segmenter: Segmentation,
        dataset: Dataset | None = None,
        classes: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Overlap:
        """Intersection over union on held-out pictures, of ``size`` or that of the config, and right pixels."""
        from torchmetrics.classification import MulticlassConfusionMatrix

        table = MulticlassConfusionMatrix(classes or len(self.names), ignore_index=self.ignore)
        steps = Compose([Resize(size or self.config.size), self.normalize])
        dataset = self.held_out if dataset is None else dataset
        found = evaluate(
            self.run,
            segmenter,
            dataset,
            {"table": table},
            steps,
            target="mask",
            batch_size=_BATCH,
            predict=_predicted,
        )
        return overlap(found["table"].cpu())

    def show(self, segmenter: Segmentation, found: Overlap) -> None:
        """Draw the overlap of every class, and held-out pictures with their masks and the predicted ones."""
        shown = {name: value for name, value in zip(self.names, found.each, strict=True) if value == value}
        if len(shown) <= _DRAWN:
            bars = figures.bars(shown, "intersection over union")
            self.run.figure("classes", bars, "Intersection over union of every class on held-out pictures.")
        self.draw(segmenter, self.held_out, self.names, self.config.size)

    def draw(
        self,
        segmenter: Segmentation,
        dataset: Dataset,
        names: Sequence[str],
        size: tuple[int, int],
        name: str = "examples",
    ) -> None:
        """Pictures, their masks and the predicted masks, as a figure of the run."""
        batch = example_batch(dataset, range(min(6, len(dataset))), Resize(size))
        normal = self.normalize(batch, torch.Generator())["image"]
        segmenter.to(self.run.fabric.device).eval()
        with torch.no_grad():
            predicted = segmenter.logits(self.run.fabric.to_device(normal)).argmax(1).cpu()
        figure = figures.masks(batch["image"], {"mask": batch["mask"], "predicted": predicted}, names)
        self.run.figure(name, figure, "Held-out pictures, their masks, and the predicted masks.")

    def keep(self, segmenter: Segmentation, text: str, name: str = "segmenter") -> None:
        """Save a trained segmenter with all that it needs to be used: ``isthmus.load(run)``, ``isthmus apply``."""
        codec = Codec(segmenter.encoder, decoder=segmenter.decoder)
        folder = self.run.dir / saved.KEPT / name
        inputs = self.inputs if of_one_size(segmenter.encoder) else self.inputs.natural()
        if self.run.is_first:
            saved.save(folder, codec, inputs, self.names)
        self.run.artifact(name, folder, text)


def _predicted(segmenter: Any, batch: Mapping[str, Any]) -> Tensor:
    return segmenter.logits(batch["image"], tuple(batch["mask"].shape[1:])).argmax(1)


def overlap(table: Tensor) -> Overlap:
    """Overlap from counts of pixels ``(K, K)``, true class by predicted class."""
    hits = table.diagonal()
    union = table.sum(0) + table.sum(1) - hits
    each = [
        float(hit.float() / either.float()) if total else float("nan")
        for hit, either, total in zip(hits, union, table.sum(1), strict=True)
    ]
    present = [value for value in each if value == value]
    miou = float(np.mean(present)) if present else float("nan")
    return Overlap(each, miou, int(hits.sum()) / max(1, int(table.sum())))


def of_one_size(encoder: Any) -> bool:
    """Whether an encoder sees no pictures but those of the size that it was made for (windows, fixed positions)."""
    model = getattr(encoder, "model", None)
    fixed = bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    return fixed and not getattr(getattr(model, "patch_embed", None), "dynamic_img_pad", False)


def answer(kept: Saved, item: Item) -> Answer:
    """A mask of a picture of any size: class numbers in colour, the picture under them, and the share of each class.

    Raises:
        UserError: more classes than a mask has colours.
    """
    names, codec = kept.labels or [], cast(Codec, kept.model)
    if len(names) > 256:
        raise UserError(f"{len(names)} classes do not fit into the 256 colours of a mask.")
    normalize = Normalize(kept.inputs.mean, kept.inputs.std)
    x = normalize({"image": item.image[None].float() / 255}, torch.Generator())["image"].to(item.device)
    shown = x
    if kept.inputs.size is not None:
        shown = F.interpolate(x, kept.inputs.size, mode="bilinear", antialias=True)
    segmenter = Segmentation(codec.encoder, cast(nn.Module, codec.decoder)).eval()
    with torch.no_grad():
        mask = segmenter.logits(shown, (x.shape[2], x.shape[3])).argmax(1)[0].cpu()
    share = torch.bincount(mask.flatten(), minlength=len(names)) / mask.numel()
    facts = {
        "share": {name: round(float(part), 4) for name, part in zip(names, share, strict=True) if part > 0},
        "classes": list(names),
        "palette": figures.palette(len(names)),
    }
    drawn = {
        "-mask.png": figures.coloured(mask, len(names)),
        "-overlay.png": figures.overlaid(item.image, mask, len(names)),
    }
    return Answer(facts, files={suffix: _png(picture) for suffix, picture in drawn.items()})


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
