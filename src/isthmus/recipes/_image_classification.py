"""What recipes of image classification share: subsets, transforms, training, measuring, a file to keep, and ``apply``.

A recipe says which networks are compared and what it measures; everything between is here, in plain functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor, nn

from isthmus.codec import UserError, load_weights, save_weights
from isthmus.data import Dataset, Repeated, evaluation_batches, example_batch
from isthmus.data.dataset import Unreadable
from isthmus.data.inputs import usual_crop as usual_crop
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.splits import spaced
from isthmus.data.subsets import class_names as class_names
from isthmus.data.subsets import subset as subset
from isthmus.data.transforms import CenterCrop, Compose, Normalize, Resize, Transform
from isthmus.data.transforms.augmentation import DEIT as DEIT
from isthmus.data.transforms.augmentation import IMAGENET, Augmentation, training_transform
from isthmus.engine import Run, Training
from isthmus.engine.fit import FitResult, fit
from isthmus.objectives.classification import Classification
from isthmus.report import figures

NETWORK = "network.safetensors"
_BATCH = 256


def transforms(
    size: int,
    classes: int,
    augmentation: Augmentation | None = None,
    mean: Sequence[float] = IMAGENET[0],
    std: Sequence[float] = IMAGENET[1],
    smoothing: float = 0.0,
    crop_pct: float = 1.0,
) -> tuple[Transform, Transform]:
    """For training and for measuring: images of ``size`` x ``size`` pixels, normalised.

    Args:
        size: side of what the network sees.
        classes: number of labels, for mixing.
        augmentation: of training images.
        mean: of every channel, in [0, 1].
        std: likewise.
        smoothing: ε of soft labels where samples are mixed; elsewhere it belongs to the objective.
        crop_pct: share of the shorter side that is kept when measuring.

    Raises:
        UserError: a size below 1, a smoothing outside [0, 1), a deviation that is not above 0.
    """
    if size < 1:
        raise UserError(f"size {size}: a picture is at least 1 pixel a side.")
    if not 0 <= smoothing < 1:
        raise UserError(f"smoothing {smoothing} of labels lies between 0 and 1.")
    if not all(0 < value < math.inf for value in std):
        raise UserError(f"std {tuple(std)}: the standard deviation of every channel must be above 0.")
    side = round(size / crop_pct)
    train = training_transform((size, size), side, classes, augmentation or Augmentation(), mean, std, smoothing)
    return train, Compose([Resize(side), CenterCrop(size), Normalize(mean, std)])


def first(dataset: Dataset, number: int, what: str) -> Dataset:
    """The first so many samples, all of them where there are fewer or ``number`` is 0.

    Raises:
        UserError: a negative number; ``what`` is the name of the setting.
    """
    if number < 0:
        raise UserError(f"{what} must be 0 (all of them) or more, got {number}.")
    return dataset.first(number)


def all_labels(dataset: Dataset) -> np.ndarray:
    """The label of every sample, ``(N,)``."""
    return dataset.labels


def train(
    run: Run,
    phase: str,
    network: nn.Module,
    dataset: Dataset,
    training: Training,
    transform: Transform,
    smoothing: float = 0.0,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    repeats: int = 1,
) -> FitResult:
    """Train a whole classifier; the result's ``objective`` is a :class:`Classification` in evaluation mode.

    Args:
        run: folder, devices, seed.
        phase: a name, once a run.
        network: images to logits.
        dataset: to train on.
        training: how long, how fast, with which optimiser.
        transform: of training images.
        smoothing: ε of label smoothing, where labels are not mixed.
        evaluate: see :func:`isthmus.engine.fit.fit`.
        repeats: of :class:`Augmentation`.
    """
    dataset = Repeated(dataset, repeats) if repeats > 1 else dataset
    return fit(
        run, phase, Classification(network, smoothing=smoothing), dataset, training, transform, None, None, evaluate
    )


@torch.no_grad()
def confusion(run: Run, network: nn.Module, classes: int, dataset: Dataset, transform: Transform) -> Tensor:
    """``(K, K)`` counts: rows are the true classes, columns what was told."""
    network.to(run.fabric.device).eval()
    table = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in evaluation_batches(dataset, _BATCH, transform=transform):
        told = network(run.fabric.to_device(batch["image"])).argmax(1).cpu()
        table += torch.bincount(batch["label"] * classes + told, minlength=classes**2).view(classes, classes)
    return table


def accuracy(table: Tensor) -> float:
    """Share of right answers in a table of :func:`confusion`."""
    return float(table.diagonal().sum() / table.sum().clamp_min(1))


def curves(values: Mapping[str, Sequence[tuple[float, float]]], across: str, along: str, log: bool = False) -> Figure:
    """Lines through ``(x, y)`` points, named; those that begin alike up to a space share a colour."""
    return figures.lines(values, across, along, log_x=log)


def look(run: Run, network: nn.Module, classes: Sequence[str], dataset: Dataset, transform: Transform) -> None:
    """The confusion matrix, where it can be read, and held-out pictures with what the network says."""
    table = confusion(run, network, len(classes), dataset, transform)
    if len(classes) <= 16:
        run.figure("confusion", figures.confusion_matrix(table, classes), "How often each class is taken for which.")
    batch = example_batch(dataset, spaced(len(dataset), 16), transform)
    with torch.no_grad():
        told = network(run.fabric.to_device(batch["image"])).argmax(1).cpu()
    names = [classes[int(label)] for label in told]
    pictures = figures.captioned(batch["image"], names, (told == batch["label"]).tolist(), columns=8)
    run.figure("examples", pictures, "Held-out images, and what the network says; red is wrong.")


def answers(network: nn.Module, name: str, size: int) -> int:
    """How many classes a network tells apart.

    Raises:
        UserError: it cannot see pictures of ``size`` × ``size`` pixels.
    """
    mode = network.training
    like = next(network.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            return network.eval()(torch.zeros(1, 3, size, size, device=like.device)).shape[-1]
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name} does not take pictures of {size}×{size} pixels ({reason}); give --size.") from error
    finally:
        network.train(mode)


def pixels_of(network: nn.Module | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that pictures are normalised with for a timm model; ImageNet's for others."""
    told: Any = getattr(network, "pretrained_cfg", None) or {}
    return tuple(told.get("mean", IMAGENET[0])), tuple(told.get("std", IMAGENET[1]))


def keep(run: Run, network: nn.Module, classes: Sequence[str], text: str) -> None:
    """Save a trained network with the names of its classes, for :func:`classify` and for timm."""
    if run.is_first:
        save_weights(network, run.dir / NETWORK, {"classes": json.dumps(list(classes))})
    run.artifact("network", run.dir / NETWORK, text)


def classify(
    run_dir: Path, inputs: Sequence[Path], out: Path, make: Callable[[int], nn.Module], transform: Transform
) -> list[Path]:
    """Tell what is on pictures, with the network that a run kept.

    Args:
        run_dir: a finished run.
        inputs: image files; others are left out.
        out: gets ``classes.json`` (the five likeliest classes of every picture) and ``NAME-class.png``, the picture
            with its likeliest class above it.
        make: the network for so many classes, as it was trained.
        transform: as for measuring.

    Returns:
        The files written.

    Raises:
        UserError: the run kept no network, or no input is an image.
    """
    path = run_dir / NETWORK
    if not path.is_file():
        raise UserError(f"{run_dir} has no {NETWORK}; run the recipe to its end first.")
    with safe_open(path, "pt") as file:
        classes = json.loads((file.metadata() or {}).get("classes", "[]"))
    network = make(len(classes))
    load_weights(network, path)
    network.eval()
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    written = [out / "classes.json"]
    for source in inputs:
        try:
            image = decode_image(source)
        except Unreadable as error:
            found[str(source)] = {"skipped": str(error)}
            continue
        batch = transform({"image": image[None].float() / 255, "index": torch.tensor([0])}, torch.Generator())
        with torch.no_grad():
            probability = network(batch["image"])[0].softmax(0)
        best = probability.topk(min(5, len(classes)))
        told = {classes[int(i)]: round(float(p), 4) for p, i in zip(*best, strict=True)}
        target = out / f"{source.stem}-class.png"
        if target in written:  # another folder's picture of the same name
            target = out / f"{source.stem}-{len(written)}-class.png"
        annotated(image, f"{classes[int(best.indices[0])]} ({float(best.values[0]):.0%})").savefig(target)
        written.append(target)
        found[str(source)] = {"class": classes[int(best.indices[0])], "probability": told, "picture": target.name}
    if len(written) == 1:
        told = "; ".join(f"{name}: {entry['skipped']}" for name, entry in found.items())
        raise UserError(f"none of the inputs is an image ({told}); known are {', '.join(IMAGE_SUFFIXES)}.")
    written[0].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return written


def annotated(image: Tensor, caption: str) -> Figure:
    height, width = image.shape[-2:]
    scale = max(2.0, min(6.0, width / 100)) / width
    figure = Figure(figsize=(width * scale, height * scale + 0.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(caption, fontsize=11)
    axis.axis("off")
    return figure
