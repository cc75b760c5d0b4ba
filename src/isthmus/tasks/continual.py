"""Classes that come one task after another: the stream, what every learner still knows, and pictures of both.

::

    stream = continual.open(config, run, embedding, inputs)
    history = stream.one_by_one("probe", head, config.probe)    # (tasks, classes) accuracies
    continual.averages(history), continual.forgotten(history, stream.tasks)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.bounds import Count, Range
from isthmus.codec import UserError, create_timm
from isthmus.data import Dataset, Memory, evaluation_batches, load
from isthmus.data.inputs import Inputs
from isthmus.data.subsets import class_names
from isthmus.data.transforms import Transform
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.encoders.images.pixels import Pixels
from isthmus.encoders.trained import trained
from isthmus.encoders.words.embedding import Embedding
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.objectives.classification import Classification
from isthmus.report import figures

NEEDS = ("image", "label")
BATCH = 256  # pictures a batch where nothing is trained
_KEPT = 2**32  # bytes of embeddings that are computed once and kept


@dataclass(frozen=True)
class ContinualConfig:
    """Settings that every recipe of a stream of classes has."""

    data: str = "digits"
    """Labelled images; any source will do."""
    key_data: str | None = None
    """Images that are seen first, labels unused; those of the stream without it."""
    encoder: str = "pixels"
    """Frozen encoder: pixels for grey pixels as they are, or any timm name."""
    pretrained: bool = False
    """Fetch the timm model's published weights."""
    weights: str | None = None
    """File with weights of the timm model, under its names or published ones, in place of fetched ones."""
    size: Count | None = None
    """Pixels a side; those of the images for pixels, else what the network was made for."""
    reduction: Count | None = None
    """Level of the network that is read, in pixels a cell; the deepest without it."""
    pool: bool = True
    """Average all places of that level; else each is a token of its own."""
    split: Count = 2
    """Classes of a task."""
    smoothing: Annotated[float, Range(0, 1, most_open=True)] = 0.1
    """Label smoothing of all learners."""
    train_split: str = "train"
    """Part of the data that streams by."""
    eval_split: str = "val+test"
    """Part of the data to measure on."""


def frozen_embedding(config: ContinualConfig, natural: tuple[int, int]) -> tuple[Embedding, Inputs]:
    """The frozen encoder, and how pictures are prepared for it.

    Args:
        config: which one.
        natural: height and width of the pictures of the data.

    Raises:
        UserError: settings that do not go together, or weights that cannot be had.
    """
    if config.encoder == "pixels":
        if config.weights is not None or config.pretrained:
            raise UserError("pixels have no weights; name the network of --weights or --pretrained by --encoder.")
        size = config.size or min(natural)
        if size > 64:
            raise UserError(f"{size} pixels a side are too many to be an embedding; give --encoder, or --size 32.")
        inputs = Inputs(size=(size, size), mean=(0.0,) * 3, std=(1.0,) * 3)
        return Embedding(Pixels(), size * size, "flat", grey=True), inputs
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
    inputs = Inputs.of(network, None if config.size is None else (config.size, config.size))
    backbone = Backbone(network, None if config.reduction is None else (config.reduction,))
    return Embedding(backbone, backbone.feature_info[-1].channels, "mean" if config.pool else "none"), inputs


def open(config: ContinualConfig, run: Run) -> Stream:
    """Load the data, embed it once, and deal its classes out to tasks.

    Raises:
        UserError: no labels, a stream without a length, more than fits into memory, an impossible split.
    """
    return Stream(config, run)


class Stream:
    """The same tasks for every learner; made by :func:`open`.

    Attributes:
        classes: their names.
        tasks: the classes of every task.
        inputs: what the encoder is fed.
        embedding: the frozen encoder, on the device.
        images: what streams by and what is measured on, as pictures.
        embeddings: the same two as ``features (M, N, D)`` and ``label``.
        first: embeddings that are seen before the stream.
    """

    def __init__(self, config: ContinualConfig, run: Run) -> None:
        self.run, self.smoothing = run, config.smoothing
        train = load(config.data, config.train_split, NEEDS, run.seed)
        held_out = load(config.data, config.eval_split, NEEDS, run.seed)
        self.classes = class_names(train, held_out)
        if not 1 <= config.split <= len(self.classes):
            raise UserError(f"--split lies between 1 and the {len(self.classes)} classes, got {config.split}.")
        self.images = self._tried_out(train), self._tried_out(held_out)
        first = self.images[0]
        if config.key_data is not None:
            first = self._tried_out(load(config.key_data, "train", ("image",), run.seed))
        run.seed_everything("encoder")
        self.embedding, self.inputs = frozen_embedding(config, self.images[0].natural_size())
        self.embedding.to(run.fabric.device).eval()
        self.transform = self.inputs.transform()
        features: Any = embed(run, self.embedding, first, self.transform).data["features"]
        self.embedding.centre(features)
        self.embeddings = self._embedded(self.images[0]), self._embedded(self.images[1])
        memory = self.embeddings[0] if first is self.images[0] else self._embedded(first)
        self.first: Tensor = memory.data["features"]  # type: ignore[assignment]
        order = torch.randperm(len(self.classes), generator=run.generator("classes")).tolist()
        self.tasks = [order[i : i + config.split] for i in range(0, len(order), config.split)]
        run.log(
            f"{config.data}: {len(self.images[0])} images in {len(self.tasks)} tasks {self.tasks}, "
            f"{len(self.images[1])} held out."
        )

    def _tried_out(self, dataset: Dataset) -> Dataset:
        """All of it; a part where a long setting is only tried out."""
        capped = self.run.options.max_steps is not None and hasattr(dataset, "__len__")
        return dataset.first(256) if capped else dataset

    def _embedded(self, dataset: Dataset) -> Memory:
        return embed(self.run, self.embedding, dataset, self.transform)

    @property
    def num_features(self) -> int:
        """Numbers of an embedding, over all of its tokens."""
        features: Any = self.embeddings[0].data["features"]
        return features[0].numel()

    def one_by_one(self, name: str, learner: nn.Module, training: Training, whole: bool = False) -> Tensor:
        """Learn the tasks in turn.

        Args:
            name: of the phases.
            learner: reads ``[features]``; pictures where it is a ``whole`` network.
            training: for every task.
            whole: whether it is.

        Returns:
            ``(tasks, classes)``: accuracy on held-out samples of every class, after every task.
        """
        objective = self._objective(learner, whole)
        label = np.asarray(self.embeddings[0].data["label"])
        rows = []
        for number, task in enumerate(self.tasks):
            chosen = np.flatnonzero(np.isin(label, task))
            averaged = self._fit(f"{name}_{number + 1}", objective, chosen, training, whole)
            rows.append(self.measure(averaged, whole))
        return torch.stack(rows)

    def shuffled(self, name: str, learner: nn.Module, training: Training) -> Tensor:
        """Learn all classes at once, as many passes over each: ``(classes,)`` accuracies."""
        everything = np.arange(len(self.embeddings[0]))
        return self.measure(self._fit(name, self._objective(learner, False), everything, training, False), False)

    @torch.no_grad()
    def measure(self, objective: Classification, whole: bool) -> Tensor:
        """Accuracy of every class; NaN where nothing of it is held out."""
        objective.to(self.run.fabric.device).eval()
        dataset, key = (self.images[1], "image") if whole else (self.embeddings[1], "features")
        right, total = torch.zeros(len(self.classes)), torch.zeros(len(self.classes))
        for batch in evaluation_batches(dataset, BATCH, transform=self.transform if whole else None):
            predicted = objective.logits(self.run.fabric.to_device(batch[key])).argmax(1).cpu()
            total += torch.bincount(batch["label"], minlength=len(total))
            right += torch.bincount(batch["label"][predicted == batch["label"]], minlength=len(total))
        return right / total

    def _objective(self, learner: nn.Module, whole: bool) -> Classification:
        if whole:
            return Classification(learner, smoothing=self.smoothing)
        return Classification(_Pyramid(), learner, smoothing=self.smoothing, key="features")

    def _fit(
        self, phase: str, objective: nn.Module, chosen: np.ndarray, training: Training, whole: bool
    ) -> Classification:
        """Train on some samples; returns the moving average where the training asks for one."""
        if not len(chosen):
            raise UserError(f"{self.embeddings[0].name} has no image of the classes of {phase}; give all classes some.")
        training = dataclasses.replace(training, batch_size=min(training.batch_size, len(chosen)))
        source = (self.images if whole else self.embeddings)[0].select(chosen)
        result: Any = fit(self.run, phase, objective, source, training, self.transform if whole else None)
        return result.objective if result.ema is None else result.ema


class _Pyramid(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


@torch.no_grad()
def embed(run: Run, embedding: nn.Module, dataset: Dataset, transform: Transform) -> Memory:
    """``features`` ``(M, N, D)`` of pictures, and ``label`` where they have one.

    Raises:
        UserError: a stream without a length, nothing to read, or more than is kept in memory.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise UserError(f"{dataset.name} is a stream or holds no image; use folder:, parquet: or hub: here.")
    features, labels = [], []
    for batch in evaluation_batches(dataset, BATCH, transform=transform):
        (tokens,) = embedding(run.fabric.to_device(batch["image"]))
        if tokens[0].numel() * 4 * len(dataset) > _KEPT:
            raise UserError(
                f"embeddings of {len(dataset)} images with {tokens[0].numel()} numbers each do not fit into memory; "
                "keep --pool, read a coarser --reduction, or take fewer images (?limit=…)."
            )
        features.append(tokens.float().cpu())
        labels.append(batch.get("label"))
    columns = {"features": torch.cat(features)}
    if labels and labels[0] is not None:
        columns["label"] = torch.cat(labels)
    return Memory(dataset.name, columns, classes=dataset.classes)


class Passes:
    """Batches of embeddings in a new order every time they are gone through, ``limit`` in all."""

    def __init__(self, features: Tensor, size: int, generator: torch.Generator, limit: int, device: torch.device):
        self.features, self.size, self.generator = features, min(size, len(features)), generator
        self.left, self.device = limit, device

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.features), generator=self.generator)
        for chosen in order[: len(order) // self.size * self.size].split(self.size):
            if self.left <= 0:
                return
            self.left -= 1
            yield [self.features[chosen].to(self.device)]


# ------------------------------------------------------------------------------------------------ what was remembered


def averages(history: Tensor) -> list[float]:
    """Mean over the classes, after every task."""
    return history.nanmean(1).tolist()


def forgotten(history: Tensor, tasks: Sequence[Sequence[int]]) -> float:
    """What was lost of every class between the end of its own task and the end of the stream, on average."""
    lost = [history[i, list(task)] - history[-1, list(task)] for i, task in enumerate(tasks)]
    return float(torch.cat(lost).nanmean())


def draw_averages(histories: Mapping[str, Tensor], ceilings: Mapping[str, float]) -> Figure:
    """Accuracy on all classes after every task, a line a learner; ceilings as dotted lines."""
    lines = {name: [(float(i + 1), v) for i, v in enumerate(averages(h))] for name, h in histories.items()}
    figure = figures.lines(lines, "tasks seen", "accuracy on all classes")
    axis = figure.axes[0]
    for style, (name, value) in zip(("--", ":", "-."), ceilings.items(), strict=False):
        axis.axhline(value, color="grey", linestyle=style, linewidth=1, label=name)
    axis.set_xticks(range(1, len(next(iter(histories.values()))) + 1))
    axis.set_ylim(0, 1.02)
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_remembered(histories: Mapping[str, Tensor], tasks: Sequence[Sequence[int]]) -> Figure:
    """Accuracy on the classes of every task (rows), after every task (columns), a panel a learner."""
    figure = Figure(figsize=(2.6 * len(histories), 2.7), layout="constrained")
    axes = figure.subplots(1, len(histories), squeeze=False)[0]
    for axis, (name, history) in zip(axes, histories.items(), strict=True):
        table = torch.stack([history[:, list(task)].nanmean(1) for task in tasks])  # (classes of task, task learned)
        axis.imshow(table.numpy(), vmin=0, vmax=1, cmap="Blues")
        for row, column in np.ndindex(*table.shape):
            colour = "white" if table[row, column] > 0.5 else "black"
            if len(tasks) <= 10:
                text = f"{table[row, column]:.2f}"
                axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
        axis.set_xticks(range(len(tasks)), [str(i + 1) for i in range(len(tasks))])
        axis.set_yticks(range(len(tasks)), ["+".join(map(str, t)) if len(t) < 4 else "" for t in tasks], fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("after task", fontsize=8)
    axes[0].set_ylabel("classes", fontsize=8)
    return figure
