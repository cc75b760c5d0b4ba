"""Reading numbers: data with digits, whole numbers right, how far a reading can be relied on, and use of a reader.

A recipe's config has ``data, encoder, size, resize, boxes, max_digits, accuracy``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus import saved
from isthmus.codec import Codec, UserError, create_timm
from isthmus.data import Dataset, evaluation_batches, example_batch, load, subset
from isthmus.data.builtin.street_numbers import NumberBox
from isthmus.data.inputs import Inputs
from isthmus.data.splits import spaced
from isthmus.data.transforms import CenterCrop, Compose, Normalize, RandomCrop, Transform
from isthmus.data.transforms.numbers import Digits, WholePicture
from isthmus.decoders.digit_sequence import (
    NumberScores,
    Reading,
    read,
    right,
    targets,
)
from isthmus.engine import Run
from isthmus.metrics.coverage import coverage, coverage_curve
from isthmus.objectives.number_reading import NumberReading
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks.applying import Answer, Item, annotated

#: Columns that a reader learns from: digits, numbers as words, or classes that are numbers.
NEEDS = ("image", "labels?", "caption?", "label?", "boxes?")


def dataset_of(config: Any, split: str, count: int, seed: int) -> Dataset:
    """A part of the data, or some of it.

    Raises:
        UserError: it says of no picture what number is on it.
    """
    dataset = load(config.data, split, NEEDS, seed)
    if not {"labels", "caption", "label"} & set(dataset.columns):
        raise UserError(
            f"{config.data} says of no picture what number is on it; it has no labels, caption or label. Numbers "
            "in the names of files are taken by folder:PATH?number=name; docs/data.md shows all ways."
        )
    return subset(dataset, count, 0) if count and count < len(dataset) else dataset


def inputs_of(config: Any) -> Inputs:
    """An encoder's own mean and deviation; the small networks see pictures in [0, 1]."""
    if not config.encoder:
        return Inputs(size=config.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    with torch.device("meta"):
        return Inputs.of(create_timm(config.encoder), config.size, crop_pct=1.0)


def transforms(config: Any, dataset: Dataset | None) -> tuple[Transform, Transform]:
    """For training and for measuring: the number's box, the size, the digits as numbers."""
    before = config.resize if config.resize[0] else config.size
    steps: list[Transform] = [NumberBox(before)] if config.boxes else [WholePicture(before)]
    if config.encoder:
        inputs = inputs_of(config)
        steps.append(Normalize(inputs.mean, inputs.std))
    steps.append(Digits(None if dataset is None else dataset.classes))
    return Compose([*steps, RandomCrop(config.size)]), Compose([*steps, CenterCrop(config.size)])


@torch.no_grad()
def scores_of(run: Run, config: Any, reader: NumberReading, dataset: Dataset) -> tuple[NumberScores, Tensor, Tensor]:
    """Logits, lengths and digits of a whole source, on the CPU."""
    reader.to(run.fabric.device).eval()
    rows: list[tuple[Tensor, ...]] = []
    for batch in evaluation_batches(dataset, 250, transform=transforms(config, dataset)[1]):
        scores = reader.decoder(reader.encoder(run.fabric.to_device(batch["image"])))
        rows.append((scores.length.cpu(), scores.digits.cpu(), *targets(batch["labels"], config.max_digits)))
    length_scores, digit_scores, length, digits = (torch.cat(column) for column in zip(*rows, strict=True))
    return NumberScores(length_scores, digit_scores), length, digits


def operating_point(
    run: Run,
    config: Any,
    reader: NumberReading,
    val: Dataset,
    confidence: Tensor,
    correct: Tensor,
    reported: Mapping[str, str],
) -> dict[str, Any]:
    """Coverage on the test images; the threshold and the calibration from the validation images."""
    from sklearn.isotonic import IsotonicRegression

    for asked in sorted({0.9, 0.95, config.accuracy}):
        found = coverage(confidence, correct, asked)
        metric = f"coverage_at_{100 * asked:g}"
        run.metric(metric, found.coverage, published=reported.get(metric))
    scores, length, digits = scores_of(run, config, reader, val)
    reading = read(scores)
    val_confidence, val_correct = reading.log_prob.exp(), right(reading, length, digits)
    chosen = coverage(val_confidence, val_correct, config.accuracy)
    kept = confidence >= chosen.threshold
    run.metric("covered_by_threshold", float(kept.float().mean()))
    if bool(kept.any()):
        run.metric("accuracy_of_covered", float(correct[kept].float().mean()))
    curve = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1)
    curve.fit(val_confidence.double().numpy(), val_correct.double().numpy())
    knots = [curve.X_thresholds_.tolist(), curve.y_thresholds_.tolist()]
    calibrated = torch.from_numpy(np.interp(confidence.double().numpy(), *knots))
    for name, value in (("", confidence.double()), ("_calibrated", calibrated)):
        run.metric(f"calibration_error{name}", _calibration_error(value, correct))
    # Written as a number that JSON knows; no confidence reaches 2.
    threshold = chosen.threshold if chosen.coverage else 2.0
    return {"accuracy": config.accuracy, "threshold": threshold, "calibration": knots}


def _calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """The expected calibration error: |mean confidence - accuracy| over equal bins, weighted by their samples."""
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(confidence.clamp(0, 1), correct.long(), n_bins=bins))


def draw(
    run: Run,
    config: Any,
    dataset: Dataset,
    reading: Reading,
    length: Tensor,
    digits: Tensor,
    confidence: Tensor,
    correct: Tensor,
) -> None:
    share, reached, _ = coverage_curve(confidence, correct)
    curve = {"right": list(zip(share.tolist(), reached.tolist(), strict=True))}
    figure = figures.lines(curve, "share of images answered, most confident first", "share of answers that are right")
    figure.axes[0].axhline(config.accuracy, color="tab:gray", linestyle="--", linewidth=1)
    run.figure("coverage", figure, f"Coverage on held-out images; the line is at {config.accuracy:.0%}.")
    plain = transforms(config, dataset)[1]
    chosen = spaced(len(dataset), 24)
    if len(correct) == len(dataset):
        batch = example_batch(dataset, chosen, plain)
    else:  # some could not be read, which moves the others' places
        batch = next(evaluation_batches(dataset, 24, transform=plain))
        chosen = np.arange(len(batch["image"]))
    numbers = reading.strings()
    captions = [f"{numbers[i] if numbers[i] is not None else '?'} ({float(confidence[i]):.2f})" for i in chosen]
    pictures = figures.captioned(batch["image"], captions, [bool(correct[i]) for i in chosen], columns=8)
    run.figure("examples", pictures, "Held-out images, what is read and how sure that is; red is wrong.")


def keep(run: Run, config: Any, reader: NumberReading, settings: Mapping[str, Any]) -> None:
    """The reader with what it is fed, its threshold and its calibration."""
    folder = run.dir / saved.KEPT / "reader"
    codec = Codec(reader.encoder, decoder=reader.decoder)
    resize = config.resize if config.resize[0] else config.size
    if run.is_first:
        saved.save(folder, codec, inputs_of(config), facts={**settings, "resize": list(resize)})
    run.artifact("reader", folder, "the trained reader; `isthmus apply` reads pictures with it")


def answer(kept: Saved, item: Item) -> Answer:
    """The number on a picture, cut roughly to it: ``None`` where it has too many digits.

    Beside it its probability, that probability calibrated on images that were not trained on, and whether it is
    confident enough to be relied on as often as the run was asked for (98 % by default).
    """
    facts, inputs = kept.facts, kept.inputs
    assert inputs.size is not None
    steps = [WholePicture(tuple(facts["resize"])), Normalize(inputs.mean, inputs.std), CenterCrop(inputs.size)]
    batch = Compose(steps)({"image": item.image[None].float() / 255}, torch.Generator())
    with torch.no_grad():
        prediction = kept.model(batch["image"].to(item.device)).prediction
    reading = read(NumberScores(*(scores.cpu() for scores in prediction)))
    confidence, number = float(reading.log_prob.exp()), reading.strings()[0]
    found = {
        "number": number,
        "probability": round(confidence, 4),
        "calibrated": round(float(np.interp(confidence, *facts["calibration"])), 4),
        "confident": number is not None and confidence >= facts["threshold"],
        "accuracy_asked_for": facts["accuracy"],
        "threshold": facts["threshold"],
    }
    return Answer(found, annotated(item.image, f"{'?' if number is None else number} ({confidence:.0%})"))
