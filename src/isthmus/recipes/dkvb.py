"""Discrete Key-Value Bottleneck: learn class after class and keep the old ones (Träuble et al., arXiv 2207.11240).

The paper's claim: on a frozen encoder, a bottleneck of frozen keys and learned values keeps most of its accuracy when
classes come one after another, without replay and without being told where a task ends; a linear probe or an MLP
trained in the same way forgets all but the last classes.

What is measured here: keys are placed on unlabelled embeddings; then classes come two at a time, and only those two.
After every task all classes of held-out images are asked for: by the bottleneck, a linear probe, an MLP, a network
fine-tuned as a whole, each with the same batches for as many steps; and, as the ceiling, by probe and bottleneck that
saw everything shuffled. The paper's picture of eight heaps in a square shows the same in two dimensions; its bar was
lowered from 0.5 to 0.3 after pilots, before the seeds were run, and what they gave, 0.75, is above both.

How much a linear probe forgets is a matter of its learning rate: it overwrites old classes at the rate of 0.1 that the
comparison is about. At a tenth of it, picked for this very stream, it changes so little within a task that it keeps
most; it is shown beside (``slow_probe``), and counts in ``gain_over_best``.

The built-in digits are their own embedding (64 grey pixels), for which the fine-tuned network is a small convnet. With
``--data parquet:cifar10 --encoder resnet50.tv2_in1k --pretrained`` embeddings are those of a timm model; ``--weights
FILE`` takes its weights from a file, under timm's names or published ones. Over a published ResNet-20, which knew all
ten classes before, it ends at 0.84, a linear probe at 0.28, the slow one at 0.72 (``benchmarks/dkvb_cifar10.py``).

    kept = isthmus.load("runs/dkvb-seed0")
    kept.labels[int(kept.model(images).prediction[0].argmax())]     # images as kept.inputs.transform() makes them

``isthmus apply`` classifies pictures, and goes on learning from those in a folder ``teach/CLASS/``, also of a class
that the run never saw.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isthmus import saved
from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.bottlenecks.splitters import Chunk, RandomProjection
from isthmus.bounds import Count, Share
from isthmus.codec import Codec, UserError
from isthmus.decoders.voting import FlatHead, Vote
from isthmus.engine import Run, Training
from isthmus.report import figures
from isthmus.tasks import classification, continual, heaps, teaching
from isthmus.tasks.continual import ContinualConfig, Passes, Stream

needs = continual.NEEDS
apply = teaching.apply
Learner = Literal["probe", "slow_probe", "mlp", "finetune"]
_NAMES = {"probe": "linear probe", "slow_probe": "slow linear probe", "mlp": "MLP", "finetune": "fine-tuning"}


def _sgd(lr: float, clip: float | None = None, **more: Any) -> Training:
    plain = {"optimizer": "momentum", "momentum": 0.0, "schedule": "constant", "lr": lr, "clip": clip}
    return Training(**{"epochs": 60, "batch_size": 64, **plain, **more})


@dataclass(frozen=True)
class Config(ContinualConfig):
    """Settings of a run; the defaults take about a minute on two cores."""

    splitter: Literal["random", "chunk"] = "random"
    """Random projections, or channels cut into blocks."""
    codebooks: Count = 64
    """Codebooks, each with a query of its own."""
    pairs: Count = 128
    """Key-value pairs of a codebook."""
    key_dim: Count = 8
    """Numbers of a key; given by the encoder where it is cut into blocks."""
    topk: Count = 1
    """Pairs that a query fetches."""
    key_epochs: Count = 10
    """Passes over the embeddings that place the keys."""
    key_batch: Count = 256
    """Embeddings a step of them."""
    key_start: Literal["normal", "queries", "kmeans"] = "queries"
    """Where keys start; normal is published, queries are quicker."""
    dead: Share = 0.1
    """Keys that win less than this share of the average are put elsewhere."""
    stream: Training = field(default_factory=lambda: _sgd(30.0, 1.0))
    """Training of the values, for every task; momentum and weight decay would move values that were not fetched."""
    probe: Training = field(default_factory=lambda: _sgd(0.1))
    """Training of the linear probe, for every task."""
    slow_probe: Training = field(default_factory=lambda: _sgd(0.01))
    """Training of a second one, at the rate that is best for it on the built-in stream."""
    mlp: Training = field(default_factory=lambda: _sgd(0.01))
    """Training of the MLP of 128 units; at its best rate too."""
    finetune: Training = field(default_factory=lambda: _sgd(0.05))
    """Training of the whole network, for every task."""
    baselines: tuple[Learner, ...] = ("probe", "slow_probe", "mlp", "finetune")
    """What is trained beside the bottleneck."""
    fewer_pairs: tuple[Count, ...] = (8, 32)
    """The bottleneck again with so many pairs, to see what their number does."""
    toy: bool = True
    """Draw the eight heaps."""

    @classmethod
    def paper(cls) -> Config:
        """Class-incremental CIFAR-10 on a ResNet-50, keys from CIFAR-100; 256 codebooks of 4,096 pairs."""
        small = {"epochs": 2000, "batch_size": 256}
        return cls(
            data="hub:uoft-cs/cifar10?image=img",
            key_data="hub:uoft-cs/cifar100?image=img&label=fine_label",
            encoder="resnet50.tv2_in1k",
            pretrained=True,
            codebooks=256,
            pairs=4096,
            key_dim=14,
            key_start="normal",
            stream=_sgd(0.3, 1.0, **small),
            probe=_sgd(1e-3, **small),
            mlp=_sgd(1e-3, **small),
            finetune=_sgd(1e-3, **small),
            baselines=("probe", "mlp"),
            fewer_pairs=(256, 1024),
            train_split="train+val",
            eval_split="test",
        )


def check(config: Config) -> None:
    """Tell of impossible settings before anything is computed."""
    if config.encoder == "pixels" and (config.weights is not None or config.pretrained):
        raise UserError("pixels have no weights; name the network of --weights or --pretrained by --encoder.")


def run(config: Config, run: Run) -> None:
    """Place keys, let the classes stream by every learner, ask for all of them, and draw."""
    if config.stream.optimizer != "momentum" or config.stream.momentum or config.stream.weight_decay:
        run.note("Values are not trained by plain SGD: those that a batch does not fetch move all the same.")
    stream = continual.open(config, run)
    classes = len(stream.classes)
    with torch.device("meta"):  # sizes alone, before the first is trained
        for pairs in (config.pairs, *config.fewer_pairs):
            _bottleneck(config, stream.first.shape[-1], pairs, 1)

    def placed(pairs: int) -> KeyValueBottleneck:
        run.seed_everything("bottleneck", pairs)
        bottleneck = _bottleneck(config, stream.first.shape[-1], pairs, classes).to(run.fabric.device)
        return _place(config, run, bottleneck, stream.first)

    def made(name: str) -> nn.Module:
        run.seed_everything("learner", name)
        if name == "finetune":
            return _whole(stream)
        return FlatHead(stream.num_features, classes, 128 if name == "mlp" else None)

    bottleneck = placed(config.pairs)
    histories = {"bottleneck": stream.one_by_one("dkvb", _Read(bottleneck, classes), config.stream)}
    _measure(run, "dkvb", histories["bottleneck"], stream)
    run.metric("used_share", bottleneck.used_share)
    for name in config.baselines:
        history = stream.one_by_one(name, made(name), getattr(config, name), whole=name == "finetune")
        histories[_NAMES[name]] = history
        _measure(run, name, history, stream)
    reached = {name: continual.averages(history)[-1] for name, history in histories.items()}
    if "linear probe" in reached:
        run.metric("gain_over_probe", reached["bottleneck"] - reached["linear probe"])
    if config.baselines:
        run.metric("gain_over_best", reached["bottleneck"] - max(v for k, v in reached.items() if k != "bottleneck"))

    fresh = copy.deepcopy(bottleneck)
    fresh.reset_values()
    at_once = float(stream.shuffled("dkvb_shuffled", _Read(fresh, classes), config.stream).nanmean())
    ceiling = float(stream.shuffled("probe_shuffled", made("probe"), config.probe).nanmean())
    run.metric("accuracy_dkvb_shuffled", at_once)
    run.metric("accuracy_probe_shuffled", ceiling)
    run.metric("gap_to_shuffled_probe", ceiling - reached["bottleneck"])
    ceilings = {"linear probe, shuffled": ceiling, "bottleneck, shuffled": at_once}
    caption = "Held-out accuracy on all classes while they come task by task; grey: all at once, shuffled."
    run.figure("stream", continual.draw_averages(histories, ceilings), caption)
    remembered = continual.draw_remembered(histories, stream.tasks)
    run.figure("kept", remembered, "What is still known of every task's classes.")

    by_pairs = [(float(config.pairs), reached["bottleneck"])]
    for pairs in config.fewer_pairs:
        history = stream.one_by_one(f"dkvb_{pairs}_pairs", _Read(placed(pairs), classes), config.stream)
        by_pairs.append((float(pairs), continual.averages(history)[-1]))
        run.metric(f"accuracy_dkvb_{pairs}_pairs", by_pairs[-1][1])
    if len(by_pairs) > 1:
        rising = [value for _, value in sorted(by_pairs)]
        run.metric("least_gain_of_more_pairs", min(b - a for a, b in itertools.pairwise(rising)))
        drawn = figures.lines({"bottleneck": sorted(by_pairs)}, "pairs of a codebook", "accuracy", log_x=True)
        run.figure("pairs", drawn, "Accuracy after the stream, by the number of pairs.")

    codec = Codec(stream.embedding, bottleneck, Vote(classes))
    classification.show(run, _Network(codec), stream.classes, stream.images[1], stream.transform)
    folder = run.dir / saved.KEPT / "classifier"
    if run.is_first:
        training = {"lr": config.stream.lr, "batch_size": config.stream.batch_size, "clip": config.stream.clip}
        facts = {"stream": training, "smoothing": config.smoothing}
        saved.save(folder, codec.cpu(), stream.inputs, stream.classes, facts)
    run.artifact("classifier", folder, "encoder, bottleneck and vote")
    if config.toy:
        _draw_heaps(run)


# -------------------------------------------------------------------------------------------------------------- parts


class _Read(nn.Module):
    """Bottleneck and vote, on ``[features]``."""

    def __init__(self, bottleneck: KeyValueBottleneck, classes: int) -> None:
        super().__init__()
        self.bottleneck, self.vote = bottleneck, Vote(classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.vote(self.bottleneck(features).features)


class _Level(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class _Network(nn.Module):
    """A codec's prediction, or an encoder's through a head, as a plain classifier of pictures."""

    def __init__(self, codec: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.codec, self.head = codec, head

    def forward(self, x: Tensor) -> Tensor:
        return self.codec(x).prediction if self.head is None else self.head(self.codec(x))


class _Convnet(nn.Module):
    """Two convolutions on grey pixels: what is fine-tuned where the encoder has no weights."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layers(x.mean(1, keepdim=True) - 0.5)]


def _bottleneck(config: Config, channels: int, pairs: int, classes: int) -> KeyValueBottleneck:
    if config.splitter == "chunk":
        splitter: nn.Module = Chunk(channels, config.codebooks)
    else:
        splitter = RandomProjection(channels, config.codebooks, config.key_dim)
    return KeyValueBottleneck(splitter, pairs, classes, config.topk, dead=config.dead)


def _place(config: Config, run: Run, bottleneck: KeyValueBottleneck, features: Tensor) -> KeyValueBottleneck:
    """Place and freeze the keys on embeddings ``(M, N, D)``."""
    batch = min(config.key_batch, len(features))
    steps = run.cap(config.key_epochs * (len(features) // batch))
    first, generator = batch * features.shape[1], run.generator("keys", bottleneck.num_codes)
    if config.key_start != "normal" and first < bottleneck.num_codes:
        pairs = bottleneck.num_codes
        run.note(f"{first} queries start {pairs} keys, so that some start alike; a larger --key-batch parts them.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ queries to start")  # the report says so
        passes = Passes(features, batch, generator, steps, run.fabric.device)
        return bottleneck.fit_keys(passes, config.key_epochs, config.key_start, generator).freeze_keys()


def _whole(stream: Stream) -> nn.Module:
    """All that fine-tuning trains: the encoder, or a small convnet where it has no weights, and a linear layer."""
    if any(True for _ in stream.embedding.parameters()):
        encoder: nn.Module = copy.deepcopy(stream.embedding).requires_grad_(True)
        return _Network(encoder, FlatHead(stream.num_features, len(stream.classes)))
    encoder = _Convnet()
    assert stream.inputs.size is not None
    with torch.no_grad():
        (found,) = encoder(torch.zeros(1, 3, *stream.inputs.size))
    return _Network(encoder, FlatHead(found.numel(), len(stream.classes)))


def _measure(run: Run, name: str, history: Tensor, stream: Stream) -> None:
    run.metric(f"accuracy_{name}", continual.averages(history)[-1])
    run.metric(f"forgotten_{name}", continual.forgotten(history, stream.tasks))


def _draw_heaps(run: Run) -> None:
    """The paper's picture: keys that are uniform points of the square, an MLP of 32 units and a linear layer."""
    generator = run.generator("toy")
    points, label = heaps.heaps(generator)
    bottleneck = KeyValueBottleneck(Chunk(2, 1), 400, heaps.CLASSES, value_std=1e-3)
    bottleneck.reset_values(generator)
    bottleneck.place_keys(torch.rand(1, 400, 2, generator=generator))
    models = {
        "bottleneck": nn.Sequential(_Level(), _Read(bottleneck, heaps.CLASSES)),
        "MLP": nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, heaps.CLASSES)),
        "linear": nn.Linear(2, heaps.CLASSES),
    }
    drawn = heaps.draw(models, points, label, run.cap(1000))
    for name, value in drawn.accuracy.items():
        run.metric(f"heaps_accuracy_{name.lower()}", value)
    others = max(value for name, value in drawn.accuracy.items() if name != "bottleneck")
    run.metric("heaps_gain", drawn.accuracy["bottleneck"] - others)
    caption = "Eight classes, two a task: what each learner predicts everywhere in the square, after every task."
    run.figure("heaps", drawn.figure, caption)
