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

    from isthmus.recipes import dkvb
    codec, pictures = dkvb.load("runs/dkvb-seed0")
    pictures.classes[int(codec(images).prediction[0].argmax())]     # images as pictures.transform() makes them

``isthmus apply`` classifies pictures, and goes on learning from those in a folder ``teach/CLASS/``, also of a class
that the run never saw.
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isthmus.bottlenecks.key_value import KeyValueBottleneck, from_official
from isthmus.bottlenecks.splitters import Chunk, RandomProjection
from isthmus.codec import Codec, UserError, create_timm, save_weights, spec_of
from isthmus.codec.checkpoints import read_checkpoint
from isthmus.data import Dataset
from isthmus.data import load as load_data
from isthmus.decoders.voting import FlatHead, Vote
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.encoders.images.pixels import Pixels
from isthmus.encoders.trained import trained
from isthmus.encoders.words.embedding import Embedding
from isthmus.engine import Run, Training
from isthmus.recipes import _dkvb_stream as streams
from isthmus.recipes import _dkvb_toy as toy
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._dkvb_use import Pictures, classify, keep, load, teach

__all__ = ["Config", "apply", "convert", "load", "needs", "run"]

needs = ("image", "label")
Learner = Literal["probe", "slow_probe", "mlp", "finetune"]
_NAMES = {"probe": "linear probe", "slow_probe": "slow linear probe", "mlp": "MLP", "finetune": "fine-tuning"}


def _sgd(lr: float, clip: float | None = None, **more: Any) -> Training:
    plain = {"optimizer": "momentum", "momentum": 0.0, "schedule": "constant", "lr": lr, "clip": clip}
    return Training(**{"epochs": 60, "batch_size": 64, **plain, **more})


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about a minute on two cores."""

    data: str = "digits"
    """Labelled images; any source will do."""
    key_data: str | None = None
    """Images that keys are placed with, labels unused; those of the stream without it."""
    encoder: str = "pixels"
    """Frozen encoder: pixels for grey pixels as they are, or any timm name."""
    pretrained: bool = False
    """Fetch the timm model's published weights."""
    weights: str | None = None
    """File with weights of the timm model, under its names or published ones, in place of fetched ones."""
    size: int | None = None
    """Pixels a side; those of the images for pixels, else what the network was made for."""
    reduction: int | None = None
    """Level of the network that is read, in pixels a cell; the deepest without it."""
    pool: bool = True
    """Average all places of that level; else each is a token of its own."""
    splitter: Literal["random", "chunk"] = "random"
    """Random projections, or channels cut into blocks."""
    codebooks: int = 64
    """Codebooks, each with a query of its own."""
    pairs: int = 128
    """Key-value pairs of a codebook."""
    key_dim: int = 8
    """Numbers of a key; given by the encoder where it is cut into blocks."""
    topk: int = 1
    """Pairs that a query fetches."""
    key_epochs: int = 10
    """Passes over the embeddings that place the keys."""
    key_batch: int = 256
    """Embeddings a step of them."""
    key_start: Literal["normal", "queries", "kmeans"] = "queries"
    """Where keys start; normal is published, queries are quicker."""
    dead: float = 0.1
    """Keys that win less than this share of the average are put elsewhere."""
    split: int = 2
    """Classes of a task."""
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
    smoothing: float = 0.1
    """Label smoothing of all of them."""
    fewer_pairs: tuple[int, ...] = (8, 32)
    """The bottleneck again with so many pairs, to see what their number does."""
    toy: bool = True
    """Draw the eight heaps."""
    train_split: str = "train"
    """Part of the data that streams by."""
    eval_split: str = "val+test"
    """Part of the data to measure on."""

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


def run(config: Config, run: Run) -> None:
    """Place keys, let the classes stream by every learner, ask for all of them, and draw."""
    if config.stream.optimizer != "momentum" or config.stream.momentum or config.stream.weight_decay:
        run.note("Values are not trained by plain SGD: those that a batch does not fetch move all the same.")
    train = load_data(config.data, config.train_split, needs, run.seed)
    held_out = load_data(config.data, config.eval_split, needs, run.seed)
    classes = shared.class_names(train, held_out)
    if not 1 <= config.split <= len(classes):
        raise UserError(f"split must lie between 1 and the {len(classes)} classes, got {config.split}.")
    train, held_out = _few(run, train), _few(run, held_out)
    key_data = (
        train if config.key_data is None else _few(run, load_data(config.key_data, "train", ("image",), run.seed))
    )

    run.seed_everything("encoder")
    embedding, pictures = _encoder(config, train, classes)
    _check(config, embedding.channels)
    embedding.to(run.fabric.device).eval()
    plain = pictures.transform()
    embedding.centre(streams.embed(run, embedding, key_data, plain).data["features"])  # type: ignore[arg-type]
    memories = streams.embed(run, embedding, train, plain), streams.embed(run, embedding, held_out, plain)
    keys = memories[0] if key_data is train else streams.embed(run, embedding, key_data, plain)

    order = torch.randperm(len(classes), generator=run.generator("classes")).tolist()
    tasks = [order[i : i + config.split] for i in range(0, len(order), config.split)]
    run.log(f"{config.data}: {len(train)} images in {len(tasks)} tasks {tasks}, {len(held_out)} held out.")
    stream = streams.Stream(run, tasks, len(classes), memories, (train, held_out), plain, config.smoothing)
    features: Any = memories[0].data["features"]

    def placed(pairs: int) -> KeyValueBottleneck:
        run.seed_everything("bottleneck", pairs)
        bottleneck = _bottleneck(config, features.shape[-1], pairs, len(classes)).to(run.fabric.device)
        settings = config.key_epochs, config.key_batch, config.key_start
        return streams.place(run, bottleneck, keys.data["features"], *settings, run.generator("keys", pairs))  # type: ignore[arg-type]

    def made(name: str) -> nn.Module:
        run.seed_everything("learner", name)
        if name == "finetune":
            return _whole(embedding, pictures, features[0].numel(), len(classes))
        return FlatHead(features[0].numel(), len(classes), 128 if name == "mlp" else None)

    bottleneck = placed(config.pairs)
    histories = {"bottleneck": stream.one_by_one("dkvb", _Read(bottleneck, len(classes)), config.stream)}
    _measure(run, "dkvb", histories["bottleneck"], tasks)
    run.metric("used_share", bottleneck.used_share)
    for name in config.baselines:
        history = stream.one_by_one(name, made(name), getattr(config, name), whole=name == "finetune")
        histories[_NAMES[name]] = history
        _measure(run, name, history, tasks)
    reached = {name: streams.averages(history)[-1] for name, history in histories.items()}
    if "linear probe" in reached:
        run.metric("gain_over_probe", reached["bottleneck"] - reached["linear probe"])
    if config.baselines:
        run.metric("gain_over_best", reached["bottleneck"] - max(v for k, v in reached.items() if k != "bottleneck"))

    fresh = copy.deepcopy(bottleneck)
    fresh.reset_values()
    at_once = float(stream.shuffled("dkvb_shuffled", _Read(fresh, len(classes)), config.stream).nanmean())
    ceiling = float(stream.shuffled("probe_shuffled", made("probe"), config.probe).nanmean())
    run.metric("accuracy_dkvb_shuffled", at_once)
    run.metric("accuracy_probe_shuffled", ceiling)
    run.metric("gap_to_shuffled_probe", ceiling - reached["bottleneck"])
    ceilings = {"linear probe, shuffled": ceiling, "bottleneck, shuffled": at_once}
    caption = "Held-out accuracy on all classes while they come task by task; grey: all at once, shuffled."
    run.figure("stream", streams.over_the_stream(histories, ceilings), caption)
    run.figure("kept", streams.kept(histories, tasks), "What is still known of every task's classes.")

    by_pairs = [(float(config.pairs), reached["bottleneck"])]
    for pairs in config.fewer_pairs:
        history = stream.one_by_one(f"dkvb_{pairs}_pairs", _Read(placed(pairs), len(classes)), config.stream)
        by_pairs.append((float(pairs), streams.averages(history)[-1]))
        run.metric(f"accuracy_dkvb_{pairs}_pairs", by_pairs[-1][1])
    if len(by_pairs) > 1:
        rising = [value for _, value in sorted(by_pairs)]
        run.metric("least_gain_of_more_pairs", min(b - a for a, b in itertools.pairwise(rising)))
        drawn = shared.curves({"bottleneck": sorted(by_pairs)}, "pairs of a codebook", "accuracy", log=True)
        run.figure("pairs", drawn, "Accuracy after the stream, by the number of pairs.")

    codec = Codec(embedding, bottleneck, Vote(len(classes)))
    shared.look(run, _Network(codec), classes, held_out, plain)
    keep(run, codec, pictures)
    if config.toy:
        _toy(run)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Classify pictures; those in a folder ``teach/CLASS/`` are learned first.

    Args:
        run_dir: a finished run.
        inputs: image files. Those in ``…/teach/CLASS/`` teach that class, a new one too; the rest is classified.
        out: gets ``classes.json``, every picture with its class above it, and, where something was taught,
            ``classifier``, which :func:`load` reads.

    Raises:
        UserError: no input is an image, or the run is incomplete.
    """
    codec, pictures = load(run_dir)
    lessons = [path for path in inputs if path.parent.parent.name == "teach"]
    written: list[Path] = []
    if lessons:
        codec, pictures, written = teach(run_dir, codec, pictures, lessons, out)
    rest = [path for path in inputs if path not in set(lessons)]
    return written + classify(codec, pictures, rest, out) if rest or not lessons else written


def convert(path: Path, out: Path, topk: int = 1) -> Path:
    """A published bottleneck as safetensors, whose metadata says how ``isthmus.codec.build`` makes the part.

    Args:
        path: the authors' ``{"bottleneck", "splitter"}``, or a state of discrete-key-value-bottleneck-pytorch.
        out: the safetensors file.
        topk: pairs that a query fetches, which the file does not tell.

    Raises:
        UserError: no such checkpoint.
    """
    found = read_checkpoint(path)
    try:
        made = from_official(found.state, topk=topk)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no checkpoint of a key-value bottleneck: {error}") from error
    save_weights(made, out, {"part": json.dumps(spec_of(made))})
    return out


# -------------------------------------------------------------------------------------------------------------- parts


class _Read(nn.Module):
    """Bottleneck and vote, on ``[features]``."""

    def __init__(self, bottleneck: KeyValueBottleneck, classes: int) -> None:
        super().__init__()
        self.bottleneck, self.vote = bottleneck, Vote(classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.vote(self.bottleneck(features).features)


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


def _encoder(config: Config, images: Dataset, classes: list[str]) -> tuple[Embedding, Pictures]:
    """The frozen encoder, and how pictures are made ready for it."""
    if config.size is not None and config.size < 1:
        raise UserError(f"size must be 1 or more, got {config.size}.")
    if config.encoder == "pixels" and (config.weights is not None or config.pretrained):
        raise UserError("pixels have no weights; give the network that --weights or --pretrained is for: --encoder.")
    own = images.image_size or tuple(images[0]["image"].shape[-2:])
    if config.encoder == "pixels":
        size = config.size or min(own)
        if size > 64:
            raise UserError(f"{size} pixels a side are too many to be an embedding; give --encoder, or --size 32.")
        return Embedding(Pixels(), size * size, "flat", grey=True), Pictures(classes, size, (0.0,) * 3, (1.0,) * 3)
    network: Any
    sized = made_for(config.encoder, config.size)
    if config.weights is not None:
        network = trained(config.encoder, config.weights, **sized)
    else:
        try:
            network = create_timm(config.encoder, pretrained=config.pretrained, **sized)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"weights of {config.encoder} cannot be had ({reason}); give them with --weights, or --no-pretrained."
            ) from error
    known: Any = network.pretrained_cfg
    size = config.size or int(known["input_size"][-1])
    backbone = Backbone(network, None if config.reduction is None else (config.reduction,))
    embedding = Embedding(backbone, backbone.feature_info[-1].channels, "mean" if config.pool else "none")
    return embedding, Pictures(classes, size, tuple(known["mean"]), tuple(known["std"]))


def _check(config: Config, channels: int) -> None:
    """Tell of impossible settings before anything is computed."""
    if min(config.key_epochs, config.key_batch) < 1:
        raise UserError(f"key_epochs and key_batch must be 1 or more, got {config.key_epochs} and {config.key_batch}.")
    if not 0 <= config.smoothing < 1:
        raise UserError(f"smoothing must lie in [0, 1), got {config.smoothing}.")
    with torch.device("meta"):  # sizes alone
        for pairs in (config.pairs, *config.fewer_pairs):
            _bottleneck(config, channels, pairs, 1)


def _bottleneck(config: Config, channels: int, pairs: int, classes: int) -> KeyValueBottleneck:
    if config.splitter == "chunk":
        splitter: nn.Module = Chunk(channels, config.codebooks)
    else:
        splitter = RandomProjection(channels, config.codebooks, config.key_dim)
    return KeyValueBottleneck(splitter, pairs, classes, config.topk, dead=config.dead)


def _whole(embedding: Embedding, pictures: Pictures, values: int, classes: int) -> nn.Module:
    """All that fine-tuning trains: the encoder, or a small convnet where it has no weights, and a linear layer."""
    if any(True for _ in embedding.parameters()):
        return _Network(copy.deepcopy(embedding).requires_grad_(True), FlatHead(values, classes))
    convnet = _Convnet()
    with torch.no_grad():
        (found,) = convnet(torch.zeros(1, 3, pictures.size, pictures.size))
    return _Network(convnet, FlatHead(found.numel(), classes))


def _few(run: Run, dataset: Dataset) -> Dataset:
    """All of it; a part where a long setting is only tried out."""
    tried_out = run.options.max_steps is not None and hasattr(dataset, "__len__") and len(dataset) > 256
    return dataset.select(range(256)) if tried_out else dataset


def _measure(run: Run, name: str, history: Tensor, tasks: list[list[int]]) -> None:
    run.metric(f"accuracy_{name}", streams.averages(history)[-1])
    run.metric(f"forgotten_{name}", streams.forgotten(history, tasks))


def _toy(run: Run) -> None:
    heaps = toy.draw(run.generator("toy"), run.cap(1000))
    for name, value in heaps.accuracy.items():
        run.metric(f"heaps_accuracy_{name.lower()}", value)
    others = max(value for name, value in heaps.accuracy.items() if name != "bottleneck")
    run.metric("heaps_gain", heaps.accuracy["bottleneck"] - others)
    caption = "Eight classes, two a task: what each learner says everywhere in the square, after every task."
    run.figure("heaps", heaps.figure, caption)
