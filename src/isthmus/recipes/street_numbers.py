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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Range, one_of
from isthmus.catalog import published
from isthmus.codec import UserError
from isthmus.data.builtin.street_numbers import NumberBox
from isthmus.data.inputs import Inputs
from isthmus.data.transforms import CenterCrop, Compose, Normalize, RandomCrop, Transform
from isthmus.data.transforms.numbers import Digits, WholePicture
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
from isthmus.engine import Run, Training
from isthmus.engine.comparison import Comparison, Trained, check_arms, count_parameters
from isthmus.engine.fit import fit
from isthmus.metrics.coverage import coverage
from isthmus.objectives.number_reading import NumberReading
from isthmus.tasks import numbers
from isthmus.tasks.numbers import Measured, OperatingPoint

needs = numbers.NEEDS
answer = numbers.answer


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on two cores."""

    data: str = "street-numbers:16x32?most=3&warp=0"
    """Pictures of numbers."""
    encoder: str = ""
    """A timm name; small convnets without it."""
    size: tuple[Count, Count] = (16, 32)
    """Height and width of what the network sees."""
    resize: tuple[Natural, Natural] = (0, 0)
    """Height and width that pictures are brought to before a window of ``size`` is cut out, at random in training."""
    boxes: bool = False
    """Cut pictures to 1.3 times the smallest box around their digits first, where the data have boxes."""
    max_digits: Count = 3
    """Longest number that is read; longer ones are refused."""
    widths: tuple[Count, ...] = (24, 48, 64)
    """Units of the convolutions of the small network."""
    strides: tuple[Natural, ...] = (2, 2, 0)
    """Of their pools; 0 does not pool."""
    kernel: Count = 3
    """Side of their kernels."""
    pieces: Count = 1
    """Linear filters a maxout unit of the first layer; 1 is a ReLU."""
    local: Natural = 0
    """Units of a locally connected layer; 0 has none."""
    dense: tuple[Count, ...] = (160,)
    """Widths of the dense layers."""
    border: Annotated[str, one_of(("", "valid", "zero"))] = ""
    """Subtract the mean around every place, with this border: valid or zero; empty subtracts nothing."""
    batch_norm: bool = True
    """In the convolutions of the small networks."""
    dropout: Annotated[float, Range(0, 1, most_open=True)] = 0.0
    """On hidden layers."""
    shallow: bool = True
    """Train the network of one convolution too."""
    eleven: bool = True
    """Train the port with eleven classes and no length too."""
    accuracy: Annotated[float, Range(0, 1, least_open=True)] = 0.98
    """Share of answers that has to be right."""
    images: Natural = 0
    """Images to train on; 0 is all."""
    test_images: Natural = 0
    """Images to measure on; 0 is all."""
    training: Training = Training(
        epochs=8, batch_size=100, optimizer="adam", lr=4e-3, warmup_epochs=2.4, warmup_from=0.04
    )
    """Training of every network."""

    @classmethod
    def paper(cls) -> Config:
        """The best network for public SVHN; its learning rate was never published: these are a modern run's.

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


def check(config: Config) -> None:
    """Refuse windows that do not fit and readers that cannot be built."""
    if any(config.resize) and not all(a >= b for a, b in zip(config.resize, config.size, strict=True)):
        raise UserError(f"--resize {config.resize} is smaller than the window --size {config.size} cut out of it.")
    check_arms(_makers(config))


def run(config: Config, run: Run) -> None:
    """Train the readers, compare them, choose the threshold, draw the curve."""
    counts = {"train": config.images, "val": config.test_images, "test": config.test_images}
    parts = {split: numbers.dataset_of(run, config.data, split, count) for split, count in counts.items()}
    run.log(f"{config.data}: {len(parts['train'])} images to train on, {len(parts['test'])} held out.")
    inputs = _inputs(config)
    transforms = {split: _transform(config, inputs, dataset.classes) for split, dataset in parts.items()}

    def validation_loss(reader: Any) -> Mapping[str, float]:
        measured = numbers.measure(run, reader, parts["val"], transforms["val"])
        return {"loss": float(reader.likelihood(measured.scores, measured.length, measured.digits).mean())}

    def train(kind: str, reader: nn.Module) -> Trained:
        cropped = _transform(config, inputs, parts["train"].classes, RandomCrop(config.size))
        watched = None if config.training.patience is None else validation_loss
        result = fit(run, kind, reader, parts["train"], config.training, cropped, evaluate=watched)
        return Trained(result.objective if result.ema is None else result.ema)

    arms = Comparison(run, _makers(config), train, lambda reader: {})
    readers: dict[str, Any] = {kind: arm.model for kind, arm in arms.arms.items()}
    measured = {
        kind: numbers.measure(run, reader, parts["test"], transforms["test"]) for kind, reader in readers.items()
    }
    _compare(config, run, readers, measured)
    validated = numbers.measure(run, readers["deep"], parts["val"], transforms["val"])
    point = OperatingPoint.choose(validated, config.accuracy)
    _rely(config, run, point, measured["deep"])
    numbers.show(run, parts["test"], transforms["test"], measured["deep"], config.accuracy)
    numbers.keep(run, readers["deep"], inputs, point)


# ---------------------------------------------------------------------------------------------------------- measuring


def _compare(config: Config, run: Run, readers: Mapping[str, Any], measured: Mapping[str, Measured]) -> None:
    """The deep reader's accuracy, by joint reading and length first, and how far the others stay behind."""
    deep = measured["deep"]
    joint = read(deep.scores)
    accuracy, exists = deep.accuracy(joint), deep.digits >= 0
    run.metric("accuracy", accuracy, published=_reported(config).get("accuracy"))
    run.metric("length_accuracy", float((joint.length == deep.length).float().mean()))
    run.metric("digit_accuracy", float((deep.scores.digits.argmax(-1) == deep.digits)[exists].float().mean()))
    run.metric("gain_of_joint_reading", accuracy - deep.accuracy(read_length_first(deep.scores)))
    most_confident = joint.log_prob.exp().topk(len(joint.log_prob) // 2 or 1).indices
    run.metric("confident_half_gain", float(deep.correct(joint)[most_confident].float().mean()) - accuracy)
    for kind in [kind for kind in readers if kind != "deep"]:
        found = measured[kind].accuracy(readers[kind].read(measured[kind].scores))
        run.metric(f"accuracy_{kind}", found)
        run.metric(f"gain_over_{kind}", accuracy - found)
    if "shallow" in readers:
        sizes = [count_parameters(readers[kind]) for kind in ("deep", "shallow")]
        run.metric("parameters_over_shallow", sizes[0] / sizes[1])


def _reported(config: Config) -> Mapping[str, str]:
    """The paper's figures, which are about pictures of 54 pixels."""
    return published("street-numbers") if config.size == (54, 54) else {}


def _rely(config: Config, run: Run, point: OperatingPoint, measured: Measured) -> None:
    """Coverage on the test images, and what the threshold of the validation images does there."""
    reading, reported = read(measured.scores), _reported(config)
    confidence, correct = reading.log_prob.exp(), measured.correct(reading)
    for asked in sorted({0.9, 0.95, config.accuracy}):
        metric = f"coverage_at_{100 * asked:g}"
        run.metric(metric, coverage(confidence, correct, asked).coverage, published=reported.get(metric))
    relied_on = confidence >= point.threshold
    run.metric("covered_by_threshold", float(relied_on.float().mean()))
    if bool(relied_on.any()):
        run.metric("accuracy_of_covered", float(correct[relied_on].float().mean()))
    run.metric("calibration_error", numbers.calibration_error(confidence.double(), correct))
    calibrated = point.calibrated(confidence)
    run.metric("calibration_error_calibrated", numbers.calibration_error(calibrated, correct))


# -------------------------------------------------------------------------------------------------------------- parts


def _makers(config: Config) -> dict[str, Callable[[], NumberReading]]:
    """The readers that were asked for."""
    kinds = ["deep"] + (["shallow"] if config.shallow and not config.encoder else []) + ["eleven"] * config.eleven
    return {kind: partial(_reader, config, kind) for kind in kinds}


def _reader(config: Config, kind: str) -> NumberReading:
    """``deep``, ``shallow``, or ``eleven``: deep with eleven classes and no length."""
    encoder = _encoder(config, kind == "shallow")
    channels = encoder.feature_info[-1].channels
    grid = 4 if config.encoder else 1
    hidden = config.dense if config.encoder else ()
    decoder: nn.Module = DigitSequence(channels, config.max_digits, grid=grid, hidden=hidden, dropout=config.dropout)
    likelihood: Callable[..., Tensor] = negative_log_likelihood
    reading: Callable[[NumberScores], Reading] = read
    if kind == "eleven":
        decoder = AbsentDigits(decoder)
        likelihood, reading = AbsentDigits.loss, AbsentDigits.read
    return NumberReading(encoder, decoder, partial(targets, max_digits=config.max_digits), likelihood, reading, right)


def _encoder(config: Config, shallow: bool) -> Any:
    if config.encoder:
        return Backbone(config.encoder, **({"img_size": config.size} if made_for(config.encoder, -1) else {}))
    border: Any = config.border or None
    options: dict[str, Any] = {"kernel": config.kernel, "pieces": config.pieces, "dense": config.dense}
    options |= {"dropout": config.dropout, "border": border, "batch_norm": config.batch_norm, "local": config.local}
    if shallow:
        return MaxoutCNN(config.size, config.widths[:1], strides=config.strides[:1], **{**options, "local": 0})
    return MaxoutCNN(config.size, config.widths, strides=config.strides, **options)


def _inputs(config: Config) -> Inputs:
    """What readers are fed: pictures as they are for the small networks, normalised as a timm encoder is used to."""
    before = config.resize if config.resize[0] else config.size
    shape: dict[str, Any] = {"crop_pct": 1.0, "interpolation": "bicubic", "stretched": before}
    if not config.encoder:
        return Inputs(size=config.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **shape)
    with torch.device("meta"):
        return Inputs.of(_encoder(config, False).model, config.size, **shape)


def _transform(
    config: Config, inputs: Inputs, classes: Sequence[str] | None, crop: Transform | None = None
) -> Transform:
    """The number's box, the size, the digits as numbers, and the window, which is the middle without a crop."""
    assert inputs.stretched is not None
    box = NumberBox(inputs.stretched) if config.boxes else WholePicture(inputs.stretched)
    steps = [box, Normalize(inputs.mean, inputs.std), Digits(classes)]
    return Compose([*steps, CenterCrop(config.size) if crop is None else crop])
