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
from typing import Any, cast

from torch import Tensor, nn

from isthmus.catalog import published
from isthmus.codec import UserError
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
from isthmus.engine.fit import fit
from isthmus.objectives.number_reading import NumberReading
from isthmus.tasks import numbers

needs = numbers.NEEDS
answer = numbers.answer


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
    """Refuse what no run can do, before any of it is done."""
    if not 0 < config.accuracy <= 1:
        raise UserError(f"--accuracy must lie in (0, 1], got {config.accuracy}.")
    if min(config.size) < 1 or min(config.resize) < 0:
        raise UserError(f"--size {config.size} is at least 1 pixel a side, --resize {config.resize} at least 0.")
    if any(config.resize) and not all(a >= b for a, b in zip(config.resize, config.size, strict=True)):
        raise UserError(f"--resize {config.resize} is smaller than the window --size {config.size} cut out of it.")
    if config.images < 0 or config.test_images < 0 or config.max_digits < 1:
        raise UserError("--images and --test-images are at least 0, --max-digits at least 1.")


def run(config: Config, run: Run) -> None:
    """Train the readers, compare them, choose the threshold, draw the curve."""
    parts = {
        split: numbers.dataset_of(config, split, count, run.seed)
        for split, count in (("train", config.images), ("val", config.test_images), ("test", config.test_images))
    }
    run.log(f"{config.data}: {len(parts['train'])} images to train on, {len(parts['test'])} held out.")
    kinds = ["deep"] + (["shallow"] if config.shallow and not config.encoder else []) + ["eleven"] * config.eleven
    readers: dict[str, NumberReading] = {}
    for kind in kinds:
        run.seed_everything("network")
        objective = _objective(config, kind)
        transform = numbers.transforms(config, parts["train"])[0]
        result = fit(run, kind, objective, parts["train"], config.training, transform)
        readers[kind] = cast(NumberReading, result.ema or result.objective)
        run.metric(f"parameters_{kind}", sum(p.numel() for p in objective.parameters()), unit="parameters")

    scores, length, digits = numbers.scores_of(run, config, readers["deep"], parts["test"])
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
        other, other_length, other_digits = numbers.scores_of(run, config, readers[kind], parts["test"])
        found = float(right(readers[kind].read(other), other_length, other_digits).float().mean())
        run.metric(f"accuracy_{kind}", found)
        run.metric(f"gain_over_{kind}", accuracy - found)
        if kind == "shallow":
            sizes = [sum(p.numel() for p in readers[k].parameters()) for k in ("deep", "shallow")]
            run.metric("parameters_over_shallow", sizes[0] / sizes[1])
    settings = numbers.operating_point(run, config, readers["deep"], parts["val"], confidence, correct, reported)
    numbers.draw(run, config, parts["test"], joint, length, digits, confidence, correct)
    numbers.keep(run, config, readers["deep"], settings)


def _reported(config: Config) -> Mapping[str, str]:
    """The paper's figures, which are about pictures of 54 pixels."""
    return published("street-numbers") if config.size == (54, 54) else {}


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
