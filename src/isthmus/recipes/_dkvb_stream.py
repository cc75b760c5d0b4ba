"""A stream of classes: learners that see one task after another, what they still know, and pictures of it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.bottlenecks.key_value import KeyValueBottleneck, Start
from isthmus.codec import UserError
from isthmus.data import Dataset, Memory, evaluation_batches
from isthmus.data.transforms import Transform
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.objectives.classification import Classification
from isthmus.report import figures

BATCH = 256  # pictures a batch where nothing is trained
_KEPT = 2**32  # bytes of embeddings that are computed once and kept


@dataclass
class Stream:
    """The same tasks for every learner.

    Attributes:
        run: whose devices and seed.
        tasks: the classes of every task.
        classes: number of classes.
        embeddings: ``features`` and ``label`` of what streams by and of what is measured on.
        images: the same two as pictures, for learners that train an encoder.
        plain: makes pictures ready for it.
        smoothing: of labels.
    """

    run: Run
    tasks: Sequence[Sequence[int]]
    classes: int
    embeddings: tuple[Memory, Memory]
    images: tuple[Dataset, Dataset]
    plain: Transform
    smoothing: float

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
        label = self.embeddings[0].data["label"]
        rows = []
        for number, task in enumerate(self.tasks):
            chosen = np.flatnonzero(np.isin(np.asarray(label), task))
            self._fit(f"{name}_{number + 1}", objective, chosen, training, whole)
            rows.append(self.measure(objective, whole))
        return torch.stack(rows)

    def shuffled(self, name: str, learner: nn.Module, training: Training) -> Tensor:
        """Learn all classes at once, as many passes over each: ``(classes,)`` accuracies."""
        objective = self._objective(learner, False)
        self._fit(name, objective, np.arange(len(self.embeddings[0])), training, False)
        return self.measure(objective, False)

    @torch.no_grad()
    def measure(self, objective: Classification, whole: bool) -> Tensor:
        """Accuracy of every class; NaN where nothing of it is held out."""
        objective.to(self.run.fabric.device).eval()
        dataset, key = (self.images[1], "image") if whole else (self.embeddings[1], "features")
        right, total = torch.zeros(self.classes), torch.zeros(self.classes)
        for batch in evaluation_batches(dataset, BATCH, transform=self.plain if whole else None):
            told = objective.logits(self.run.fabric.to_device(batch[key])).argmax(1).cpu()
            total += torch.bincount(batch["label"], minlength=self.classes)
            right += torch.bincount(batch["label"][told == batch["label"]], minlength=self.classes)
        return right / total

    def _objective(self, learner: nn.Module, whole: bool) -> Classification:
        if whole:
            return Classification(learner, smoothing=self.smoothing)
        return Classification(_Pyramid(), learner, smoothing=self.smoothing, key="features")

    def _fit(self, phase: str, objective: nn.Module, chosen: np.ndarray, training: Training, whole: bool) -> None:
        if not len(chosen):
            raise UserError(f"{self.embeddings[0].name} has no image of the classes of {phase}; give all classes some.")
        training = dataclasses.replace(training, batch_size=min(training.batch_size, len(chosen)))
        source = (self.images if whole else self.embeddings)[0].select(chosen)
        fit(self.run, phase, objective, source, training, self.plain if whole else None)


class _Pyramid(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


@torch.no_grad()
def embed(run: Run, embedding: nn.Module, dataset: Dataset, plain: Transform) -> Memory:
    """``features`` ``(M, N, D)`` of pictures, and ``label`` where they have one.

    Raises:
        UserError: a stream without a length, nothing to read, or more than is kept in memory.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise UserError(f"{dataset.name} is a stream or holds no image; use folder:, parquet: or hub: here.")
    features, labels = [], []
    for batch in evaluation_batches(dataset, BATCH, transform=plain):
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


def place(
    run: Run,
    bottleneck: KeyValueBottleneck,
    features: Tensor,
    epochs: int,
    batch: int,
    start: Start,
    generator: torch.Generator,
) -> KeyValueBottleneck:
    """Place and freeze the keys on embeddings ``(M, N, D)``, gone through ``epochs`` times in batches of ``batch``."""
    batch = min(batch, len(features))
    steps = run.cap(epochs * (len(features) // batch))
    first = batch * features.shape[1]
    if start != "normal" and first < bottleneck.num_codes:
        pairs = bottleneck.num_codes
        run.note(f"{first} queries start {pairs} keys, so that some start alike; a larger --key-batch parts them.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ queries to start")  # told in the report
        passes = Passes(features, batch, generator, steps, run.fabric.device)
        return bottleneck.fit_keys(passes, epochs, start, generator).freeze_keys()


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


# ----------------------------------------------------------------------------------------------------------- pictures


def over_the_stream(histories: Mapping[str, Tensor], ceilings: Mapping[str, float]) -> Figure:
    """Accuracy on all classes after every task, a line a learner; ceilings as dotted lines."""
    curves = {
        name.replace(" ", "\N{NO-BREAK SPACE}"): [(float(i + 1), v) for i, v in enumerate(averages(history))]
        for name, history in histories.items()
    }
    figure = figures.lines(curves, "tasks seen", "accuracy on all classes", across=ceilings)
    axis = figure.axes[0]
    axis.set_xticks(range(1, len(next(iter(histories.values()))) + 1))
    axis.set_ylim(0, 1.02)
    return figure


def kept(histories: Mapping[str, Tensor], tasks: Sequence[Sequence[int]]) -> Figure:
    """Accuracy on the classes of every task (rows), after every task (columns), a panel a learner."""
    figure = Figure(figsize=(2.6 * len(histories), 2.7), layout="constrained")
    axes = figure.subplots(1, len(histories), squeeze=False)[0]
    for axis, (name, history) in zip(axes, histories.items(), strict=True):
        table = torch.stack([history[:, list(task)].nanmean(1) for task in tasks])  # (task asked, task learned)
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
    axes[0].set_ylabel("classes asked", fontsize=8)
    return figure


def averages(history: Tensor) -> list[float]:
    """Mean over the classes, after every task."""
    return history.nanmean(1).tolist()


def forgotten(history: Tensor, tasks: Sequence[Sequence[int]]) -> float:
    """What was lost of every class between the end of its own task and the end of the stream, on average."""
    lost = [history[i, list(task)] - history[-1, list(task)] for i, task in enumerate(tasks)]
    return float(torch.cat(lost).nanmean())
