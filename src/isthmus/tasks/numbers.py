"""Reading numbers on pictures: scores of a source, the confidence from which a reading is relied on, and its use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus import saved
from isthmus.codec import Codec, UserError
from isthmus.data import Dataset, evaluation_batches, example_batch, load
from isthmus.data.inputs import Inputs
from isthmus.data.splits import spaced
from isthmus.data.subsets import subset
from isthmus.data.transforms import Transform
from isthmus.decoders.digit_sequence import NumberScores, Reading, read, right
from isthmus.engine import Run
from isthmus.engine.evaluate import FEW
from isthmus.metrics.coverage import coverage, coverage_curve
from isthmus.objectives.number_reading import NumberReading
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks.applying import Answer, Item, annotated

#: Columns that readers learn from, one of the three that say numbers.
NEEDS = ("image", "labels?", "caption?", "label?", "boxes?")
_BATCH = 250
#: No confidence reaches it: the threshold where no reading is confident enough, as a number that JSON knows.
_NEVER = 2.0


def dataset_of(run: Run, data: str, split: str, number: int) -> Dataset:
    """So many pictures of numbers of a shuffled source; 0 is all of them.

    Raises:
        UserError: the source does not say what number is on a picture.
    """
    dataset = load(data, split, NEEDS, run.seed)
    if not {"labels", "caption", "label"} & set(dataset.columns):
        raise UserError(
            f"{data} says of no picture what number is on it; it has no labels, caption or label. Numbers "
            "in the names of files are taken by folder:PATH?number=name; docs/data.md shows all ways."
        )
    return subset(dataset, number, 0) if 0 < number < len(dataset) else dataset


@dataclass
class Measured:
    """What a reader makes of a source, on the CPU.

    Attributes:
        scores: logits of every picture.
        length: true lengths, int64 ``(N,)``.
        digits: true digits, int64 ``(N, max_digits)``, -1 behind the end.
    """

    scores: NumberScores
    length: Tensor
    digits: Tensor

    def correct(self, reading: Reading) -> Tensor:
        """Which numbers are right in every digit, bool ``(N,)``."""
        return right(reading, self.length, self.digits)

    def accuracy(self, reading: Reading) -> float:
        """Share of numbers that are right in every digit."""
        return float(self.correct(reading).float().mean())


@torch.no_grad()
def measure(run: Run, reader: NumberReading, dataset: Dataset, transform: Transform) -> Measured:
    """Score all pictures of a source; a few in a try-out."""
    run.uses(dataset)
    reader.to(run.fabric.device).eval()
    rows: list[tuple[Tensor, ...]] = []
    for batch in evaluation_batches(dataset.first(FEW) if run.few else dataset, _BATCH, transform=transform):
        with run.fabric.autocast():
            scores = reader.decoder(reader.encoder(run.fabric.to_device(batch["image"])))
        rows.append((scores.length.float().cpu(), scores.digits.float().cpu(), *reader.targets(batch["labels"])))
    length_scores, digit_scores, length, digits = (torch.cat(column) for column in zip(*rows, strict=True))
    return Measured(NumberScores(length_scores, digit_scores), length, digits)


@dataclass
class OperatingPoint:
    """From which confidence on a reader is relied on, chosen on pictures that it was not trained on.

    Attributes:
        accuracy: share of readings that has to be right.
        threshold: lowest confidence that reaches it, above 1 where none does.
        calibration: confidences, and the share that is right at each; between them it is interpolated.
    """

    accuracy: float
    threshold: float
    calibration: tuple[list[float], list[float]]

    @classmethod
    def choose(cls, measured: Measured, accuracy: float) -> OperatingPoint:
        """The threshold by coverage, the calibration by isotonic regression."""
        from sklearn.isotonic import IsotonicRegression

        reading = read(measured.scores)
        confidence, correct = reading.log_prob.exp(), measured.correct(reading)
        chosen = coverage(confidence, correct, accuracy)
        curve = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1)
        curve.fit(confidence.double().numpy(), correct.double().numpy())
        knots = curve.X_thresholds_.tolist(), curve.y_thresholds_.tolist()
        return cls(accuracy, chosen.threshold if chosen.coverage else _NEVER, knots)

    def calibrated(self, confidence: Tensor) -> Tensor:
        """How often readings of such confidence are right, float64."""
        return torch.from_numpy(np.atleast_1d(np.interp(confidence.double().numpy(), *self.calibration)))


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """The expected calibration error: |mean confidence - accuracy| over equal bins, weighted by their samples."""
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(confidence.clamp(0, 1), correct.long(), n_bins=bins))


def show(run: Run, dataset: Dataset, transform: Transform, measured: Measured, accuracy: float) -> None:
    """The curve of coverage, and held-out pictures with what is read and how sure that is."""
    reading = read(measured.scores)
    confidence, correct, texts = reading.log_prob.exp(), measured.correct(reading), reading.strings()
    share, reached, _ = coverage_curve(confidence, correct)
    points = list(zip(share.tolist(), reached.tolist(), strict=True))
    axes = "share of images answered, most confident first", "share of answers that are right"
    drawn = figures.lines({"reader": points}, *axes, across={f"{accuracy:.0%}": accuracy})
    run.figure("coverage", drawn, f"Coverage on held-out images; the line is at {accuracy:.0%}.")
    if len(correct) == len(dataset):
        chosen = spaced(len(dataset), 24)
        batch = example_batch(dataset, chosen, transform)
    else:  # a try-out, or some could not be read, which moves the others' places
        batch = next(evaluation_batches(dataset, min(24, len(correct)), transform=transform))
        chosen = np.arange(len(batch["image"]))
    captions = [f"{texts[i] if texts[i] is not None else '?'} ({float(confidence[i]):.2f})" for i in chosen]
    pictures = figures.captioned(batch["image"], captions, [bool(correct[i]) for i in chosen], columns=8)
    run.figure("examples", pictures, "Held-out images, what is read and how sure that is; red is wrong.")


def keep(run: Run, reader: NumberReading, inputs: Inputs, point: OperatingPoint) -> None:
    """Save a reader with its operating point: ``isthmus.load(run)``, ``isthmus apply``."""
    folder = run.dir / saved.KEPT / "reader"
    if run.is_first:
        saved.save(folder, Codec(reader.encoder, decoder=reader.decoder), inputs, facts=vars(point))
    run.artifact("reader", folder, "the trained reader; `isthmus apply` reads pictures with it")


def answer(kept: Saved, item: Item) -> Answer:
    """The number on a picture as text (``null`` where it has too many digits), and how sure that is.

    ``probability`` is the reader's own, ``calibrated`` how often it is right where it is as sure as that, and
    ``confident`` says whether that is often enough.
    """
    point = OperatingPoint(**kept.facts)
    with torch.no_grad():
        scores: Any = kept.model(item.input).prediction
    reading = read(NumberScores(*(each.float().cpu() for each in scores)))
    (text,) = reading.strings()
    confidence = reading.log_prob.exp()
    facts = {
        "number": text,
        "probability": round(float(confidence), 4),
        "calibrated": round(float(point.calibrated(confidence)), 4),
        "confident": text is not None and float(confidence) >= point.threshold,
        "threshold": point.threshold,
        "accuracy_asked_for": point.accuracy,
    }
    return Answer(facts, annotated(item.image, f"{'?' if text is None else text} ({float(confidence):.0%})"))
