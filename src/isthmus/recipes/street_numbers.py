"""Street numbers: a whole number read by one network, with a confidence to rely on (Goodfellow et al. 2013).

The paper's claim (arXiv 1312.6082): length and digits, learnt together by their exact likelihood, need no segmentation
and no sliding window; depth matters; and the probability of the answer is good enough to answer only where 98 % are
right.

What is measured here, on digits composed to numbers on photographs: a network of three convolutions against one of a
single convolution with more parameters, whole numbers right; joint reading against taking the likeliest length first,
and against the port with eleven classes and no length; coverage, with its threshold chosen on other images than it is
used on. Over three seeds one claim fails by a hair: the joint reading is the likeliest number, but it differs from the
length-first one on one or two of 1,500 images, and there the network happened to be wrong about which is likelier, so
that it came out 0.0002 behind instead of level.

Any timm encoder (``--encoder``) and any source with ``labels``, with numbers as ``caption``, or with folders
named by numbers (``--data``) will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.catalog import published
from isthmus.codec import Codec, UserError, write_atomically
from isthmus.data import Dataset, evaluation_batches, example_batch, load
from isthmus.data.builtin.street_numbers import NumberBox
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.splits import spaced
from isthmus.data.transforms import CenterCrop, Compose, RandomCrop, Resize, Transform
from isthmus.decoders.digit_sequence import (
    AbsentDigits,
    DigitSequence,
    NumberScores,
    Reading,
    negative_log_likelihood,
    read,
    read_length_first,
    right,
    targets,
)
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.encoders.images.maxout_cnn import MaxoutCNN
from isthmus.engine import Run, Training, read_config
from isthmus.engine.fit import fit
from isthmus.metrics.coverage import coverage, coverage_curve
from isthmus.objectives.number_reading import NumberReading
from isthmus.recipes import _image_classification as shared
from isthmus.report import figures

needs = ("image", "labels?", "caption?", "label?", "boxes?")

_READER = "reader"
_SETTINGS = "reading.json"


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on two cores."""

    data: str = "street-numbers:16x32?most=3&warp=0"
    """Pictures of numbers."""
    encoder: str = ""
    """A timm name; small convnets without it."""
    size: tuple[int, int] = (16, 32)
    """Height and width of what the network sees."""
    resize: tuple[int, int] = (0, 0)
    """Height and width that pictures are brought to before a window of ``size`` is cut out, at random in training."""
    boxes: bool = False
    """Cut pictures to 1.3 times the smallest box around their digits first, where the data have boxes."""
    max_digits: int = 3
    """Longest number that is read; longer ones are refused."""
    widths: tuple[int, ...] = (24, 48, 64)
    """Units of the convolutions of the small network."""
    strides: tuple[int, ...] = (2, 2, 0)
    """Of their pools; 0 does not pool."""
    kernel: int = 3
    """Side of their kernels."""
    pieces: int = 1
    """Linear filters a maxout unit of the first layer; 1 is a ReLU."""
    local: int = 0
    """Units of a locally connected layer; 0 has none."""
    dense: tuple[int, ...] = (160,)
    """Widths of the dense layers."""
    border: str = ""
    """Subtract the mean around every place, with this border: valid or zero; empty subtracts nothing."""
    batch_norm: bool = True
    """In the convolutions of the small networks."""
    dropout: float = 0.0
    """On hidden layers."""
    shallow: bool = True
    """Train the network of one convolution too."""
    eleven: bool = True
    """Train the port with eleven classes and no length too."""
    accuracy: float = 0.98
    """Share of answers that has to be right."""
    images: int = 0
    """Images to train on; 0 is all."""
    test_images: int = 0
    """Images to measure on; 0 is all."""
    training: Training = Training(
        epochs=8, batch_size=100, optimizer="adam", lr=4e-3, warmup_epochs=2.4, warmup_from=0.04
    )
    """Training of every network."""

    @classmethod
    def paper(cls) -> Config:
        """The best network for public SVHN; learning rate and schedule were never told, so these are a modern run's.

        ``--data parquet:PATH`` of full numbers with ``image``, ``labels`` and ``boxes`` of the digits. The hub's extra
        202,353 numbers, which the paper trains on as well, are not read; join them to the training part in such a file.
        """
        return cls(
            data="hub:ufldl-stanford/svhn?config=full_numbers&boxes=digits.bbox&labels=digits.label&boxes_format=xywh",
            size=(54, 54),
            resize=(64, 64),
            boxes=True,
            max_digits=5,
            widths=(48, 64, 128, 160, 192, 192, 192, 192),
            strides=(2, 1, 2, 1, 2, 1, 2, 1),
            kernel=5,
            pieces=3,
            local=192,
            dense=(3072, 3072),
            border="valid",
            batch_norm=False,
            dropout=0.5,
            shallow=False,
            eleven=False,
            training=Training(epochs=30, batch_size=256, lr=1e-3, weight_decay=0.01, warmup_epochs=3, workers=8),
        )


def run(config: Config, run: Run) -> None:
    """Train the readers, compare them, choose the threshold, draw the curve."""
    if not 0 < config.accuracy <= 1:
        raise UserError(f"--accuracy must lie in (0, 1], got {config.accuracy}.")
    if any(config.resize) and not all(a >= b for a, b in zip(config.resize, config.size, strict=True)):
        raise UserError(f"--resize {config.resize} is smaller than the window --size {config.size} cut out of it.")
    parts = {
        split: _dataset(config, split, count, run.seed)
        for split, count in (("train", config.images), ("val", config.test_images), ("test", config.test_images))
    }
    run.log(f"{config.data}: {len(parts['train'])} images to train on, {len(parts['test'])} held out.")
    kinds = ["deep"] + (["shallow"] if config.shallow and not config.encoder else []) + ["eleven"] * config.eleven
    readers: dict[str, NumberReading] = {}
    for kind in kinds:
        run.seed_everything("network")
        objective = _objective(config, kind)
        transform = _transforms(config, parts["train"])[0]
        readers[kind] = fit(run, kind, objective, parts["train"], config.training, transform).objective  # type: ignore[assignment]
        run.metric(f"parameters_{kind}", sum(p.numel() for p in objective.parameters()), unit="parameters")

    scores, length, digits = _scores(run, config, readers["deep"], parts["test"])
    joint, first = read(scores), read_length_first(scores)
    correct = right(joint, length, digits)
    accuracy = float(correct.float().mean())
    reported = _reported(config)
    run.metric("accuracy", accuracy, published=reported.get("accuracy"))
    run.metric("length_accuracy", float((joint.length == length).float().mean()))
    exists = digits >= 0
    run.metric("digit_accuracy", float((scores.digits.argmax(-1) == digits)[exists].float().mean()))
    run.metric("gain_of_joint_reading", accuracy - float(right(first, length, digits).float().mean()))
    confidence = joint.log_prob.exp()
    best = confidence.topk(len(confidence) // 2 or 1).indices
    run.metric("confident_half_gain", float(correct[best].float().mean()) - accuracy)
    for kind in kinds[1:]:
        other, other_length, other_digits = _scores(run, config, readers[kind], parts["test"])
        found = float(right(readers[kind].read(other), other_length, other_digits).float().mean())
        run.metric(f"accuracy_{kind}", found)
        run.metric(f"gain_over_{kind}", accuracy - found)
        if kind == "shallow":
            sizes = [sum(p.numel() for p in readers[k].parameters()) for k in ("deep", "shallow")]
            run.metric("parameters_over_shallow", sizes[0] / sizes[1])
    settings = _operating_point(run, config, readers["deep"], parts["val"], confidence, correct)
    _draw(run, config, parts["test"], joint, length, digits, confidence, correct)
    if run.is_first:
        Codec(readers["deep"].encoder, decoder=readers["deep"].decoder).save_pretrained(run.dir / _READER)
        write_atomically(run.dir / _READER / _SETTINGS, json.dumps(settings, indent=1).encode())
    run.artifact("reader", run.dir / _READER, "the trained reader; `isthmus apply` reads pictures with it")


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Read the numbers on pictures: ``numbers.json``.

    For every picture: the number as text (``null`` where it has too many digits), its probability, that probability
    calibrated on images that were not trained on, and whether it is confident enough to be relied on as often as the
    run was told (98 % by default).

    Args:
        run_dir: a finished run.
        inputs: image files of any size, each cut roughly to one number.
        out: the folder to write to.

    Raises:
        UserError: the run is incomplete, or no input is an image.
    """
    folder = run_dir / _READER
    if not (folder / _SETTINGS).is_file():
        raise UserError(f"{run_dir} has no {_READER}; run the recipe to its end first.")
    saved = read_config(run_dir)["config"]
    config = Config(**{**saved, "training": Config().training, "boxes": False})
    config = Config(**{**vars(config), "size": tuple(saved["size"]), "resize": tuple(saved["resize"])})
    settings = json.loads((folder / _SETTINGS).read_text())
    codec = Codec.from_pretrained(folder)
    plain = _transforms(config, None)[1]
    found: dict[str, Any] = {}
    for source in inputs:
        try:
            image = decode_image(source)
        except Unreadable as error:
            found[str(source)] = {"skipped": str(error)}
            continue
        batch = plain({"image": image[None].float() / 255}, torch.Generator())
        with torch.no_grad():
            reading = read(codec(batch["image"]).prediction)
        confidence = float(reading.log_prob.exp())
        found[str(source)] = {
            "number": reading.strings()[0],
            "probability": round(confidence, 4),
            "calibrated": round(float(np.interp(confidence, *settings["calibration"])), 4),
            "confident": reading.strings()[0] is not None and confidence >= settings["threshold"],
        }
    if not any("number" in entry for entry in found.values()):
        told = "; ".join(f"{name}: {entry['skipped']}" for name, entry in found.items())
        raise UserError(f"none of the inputs is an image ({told}); known are {', '.join(IMAGE_SUFFIXES)}.")
    out.mkdir(parents=True, exist_ok=True)
    document = {"accuracy_asked_for": settings["accuracy"], "threshold": settings["threshold"], "pictures": found}
    write_atomically(out / "numbers.json", (json.dumps(document, indent=1) + "\n").encode())
    return [out / "numbers.json"]


# ---------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def _scores(run: Run, config: Config, reader: NumberReading, dataset: Dataset) -> tuple[NumberScores, Tensor, Tensor]:
    """Logits, lengths and digits of a whole source, on the CPU."""
    reader.to(run.fabric.device).eval()
    rows: list[tuple[Tensor, ...]] = []
    for batch in evaluation_batches(dataset, 250, transform=_transforms(config, dataset)[1]):
        scores = reader.decoder(reader.encoder(run.fabric.to_device(batch["image"])))
        rows.append((scores.length.cpu(), scores.digits.cpu(), *targets(batch["labels"], config.max_digits)))
    length_scores, digit_scores, length, digits = (torch.cat(column) for column in zip(*rows, strict=True))
    return NumberScores(length_scores, digit_scores), length, digits


def _reported(config: Config) -> Mapping[str, str]:
    """The paper's figures, which are about pictures of 54 pixels."""
    return published("street-numbers") if config.size == (54, 54) else {}


def _operating_point(
    run: Run, config: Config, reader: NumberReading, val: Dataset, confidence: Tensor, correct: Tensor
) -> dict[str, Any]:
    """Coverage on the test images; the threshold and the calibration from the validation images."""
    from sklearn.isotonic import IsotonicRegression

    reported = _reported(config)
    for asked in sorted({0.9, 0.95, config.accuracy}):
        found = coverage(confidence, correct, asked)
        metric = f"coverage_at_{100 * asked:g}"
        run.metric(metric, found.coverage, published=reported.get(metric))
    scores, length, digits = _scores(run, config, reader, val)
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


def _draw(
    run: Run,
    config: Config,
    dataset: Dataset,
    reading: Reading,
    length: Tensor,
    digits: Tensor,
    confidence: Tensor,
    correct: Tensor,
) -> None:
    share, reached, _ = coverage_curve(confidence, correct)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(share, reached)
    axis.axhline(config.accuracy, color="tab:gray", linestyle="--", linewidth=1)
    axis.set_xlabel("share of images answered, most confident first")
    axis.set_ylabel("share of answers that are right")
    axis.spines[["top", "right"]].set_visible(False)
    run.figure("coverage", figure, f"Coverage on held-out images; the line is at {config.accuracy:.0%}.")
    plain = _transforms(config, dataset)[1]
    chosen = spaced(len(dataset), 24)
    if len(correct) == len(dataset):
        batch = example_batch(dataset, chosen, plain)
    else:  # some could not be read, which moves the others' places
        batch = next(evaluation_batches(dataset, 24, transform=plain))
        chosen = np.arange(len(batch["image"]))
    told = reading.strings()
    captions = [f"{told[i] if told[i] is not None else '?'} ({float(confidence[i]):.2f})" for i in chosen]
    pictures = figures.captioned(batch["image"], captions, [bool(correct[i]) for i in chosen], columns=8)
    run.figure("examples", pictures, "Held-out images, what is read and how sure that is; red is wrong.")


# -------------------------------------------------------------------------------------------------------------- parts


def _objective(config: Config, kind: str) -> NumberReading:
    """``deep``, ``shallow``, or ``eleven``: deep with eleven classes and no length."""
    encoder = _encoder(config, kind == "shallow")
    channels = encoder.feature_info[-1].channels
    grid = 4 if config.encoder else 1
    hidden = config.dense if config.encoder else ()
    decoder: nn.Module = DigitSequence(channels, config.max_digits, grid=grid, hidden=hidden, dropout=config.dropout)

    def aims(labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return targets(labels, config.max_digits)

    likelihood: Callable[..., Tensor] = negative_log_likelihood
    reading: Callable[[NumberScores], Reading] = read
    if kind == "eleven":
        decoder = AbsentDigits(decoder)
        likelihood, reading = AbsentDigits.loss, AbsentDigits.read
    return NumberReading(encoder, decoder, aims, likelihood, reading, right)


def _encoder(config: Config, shallow: bool) -> Any:
    if config.encoder:
        return Backbone(config.encoder, **({"img_size": config.size} if made_for(config.encoder, -1) else {}))
    border: Any = config.border or None
    options: dict[str, Any] = {"kernel": config.kernel, "pieces": config.pieces, "dense": config.dense}
    options |= {"dropout": config.dropout, "border": border, "batch_norm": config.batch_norm, "local": config.local}
    if shallow:
        return MaxoutCNN(config.size, config.widths[:1], strides=config.strides[:1], **{**options, "local": 0})
    return MaxoutCNN(config.size, config.widths, strides=config.strides, **options)


def _transforms(config: Config, dataset: Dataset | None) -> tuple[Transform, Transform]:
    """For training and for measuring: the number's box, the size, the digits as numbers."""
    before = config.resize if config.resize[0] else config.size
    steps: list[Transform] = [NumberBox(before)] if config.boxes else [_Whole(before)]
    if config.encoder:
        steps.append(shared.Normalize())
    steps.append(_Digits(None if dataset is None else dataset.classes))
    return Compose([*steps, RandomCrop(config.size)]), Compose([*steps, CenterCrop(config.size)])


class _Whole(Resize):
    """The whole picture at a fixed size; boxes are of no use then."""

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        kept = {key: value for key, value in batch.items() if key not in ("boxes", "labels")}
        return {**super().__call__(kept, generator), **({"labels": batch["labels"]} if "labels" in batch else {})}


class _Digits(Transform):
    """``labels`` from captions that are numbers, or from classes that are, where the source has no digits itself."""

    def __init__(self, classes: Sequence[str] | None) -> None:
        self.classes = classes

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = dict(batch)
        if "labels" not in batch and ("caption" in batch or "label" in batch):
            texts = batch["caption"] if "caption" in batch else [self._name(int(label)) for label in batch["label"]]
            batch["labels"] = [_number(text) for text in texts]
        return batch

    def _name(self, label: int) -> str:
        return str(label) if self.classes is None else self.classes[label]


def _number(text: str) -> Tensor:
    if not text.isascii() or not (text.isdigit() or text == ""):
        raise UserError(f"{text!r} is no number; captions and folder names have to be digits, such as 1984.")
    return torch.tensor([int(digit) for digit in text], dtype=torch.int64)


def _dataset(config: Config, split: str, count: int, seed: int) -> Dataset:
    dataset = load(config.data, split, needs, seed)
    if not {"labels", "caption", "label"} & set(dataset.columns):
        raise UserError(
            f"{config.data} says of no picture what number is on it; it has no labels, caption or label. Numbers "
            "in the names of files are taken by folder:PATH?number=name; docs/data.md shows all ways."
        )
    return shared.subset(dataset, count, 0) if count and count < len(dataset) else dataset
