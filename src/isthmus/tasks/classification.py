"""Image classification: what every recipe whose answer is a class has in common.

A recipe inherits :class:`ClassificationConfig`, opens the task and says which networks it trains::

    task = classification.open(config, run)
    arms = task.compare({"ours": make_ours, "twin": make_twin})
    arms.over("ours", "accuracy")
    task.show(arms.first.model)
    task.keep(arms.first.model, "our network")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import saved
from isthmus.bounds import Count, Natural, Range
from isthmus.codec import UserError, create_timm
from isthmus.data import Dataset, Repeated, example_batch, load
from isthmus.data.hashing import permutation
from isthmus.data.inputs import Inputs
from isthmus.data.splits import spaced
from isthmus.data.subsets import class_names
from isthmus.data.transforms import Transform
from isthmus.data.transforms.augmentation import DEIT as DEIT
from isthmus.data.transforms.augmentation import Augmentation, training_transform
from isthmus.encoders.backbone import made_for
from isthmus.engine import Run, Training
from isthmus.engine.comparison import Arm, Comparison, Trained, check_arms
from isthmus.engine.evaluate import accuracy, confusion_matrix, evaluate
from isthmus.engine.fit import fit
from isthmus.objectives.classification import Classification
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks.applying import Answer, Item, annotated

#: Columns that a classifier learns from.
NEEDS = ("image", "label")


@dataclass(frozen=True)
class ClassificationConfig:
    """Settings that every recipe of image classification has."""

    data: str = "digits"
    """Labelled images; any source will do."""
    size: Count = 32
    """Pixels a side of what the networks see."""
    training: Training = Training(epochs=20, batch_size=64, lr=4e-3, weight_decay=0.05, warmup_epochs=1)
    """Training of every network."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Changes of training images."""
    smoothing: Annotated[float, Range(0, 1, most_open=True)] = 0.0
    """Label smoothing."""
    test_images: Natural = 0
    """Held-out images to measure on; 0 is all."""
    train_split: str = "train"
    """Part of the data to train on."""
    eval_split: str = "test"
    """Part of the data to measure on."""


def open(config: ClassificationConfig, run: Run, inputs: Inputs | None = None, images: int = 0) -> ClassificationTask:
    """Load the data of a run, find out its classes, and refuse what cannot be trained.

    Args:
        config: the recipe's settings; with a field ``encoder`` that names a timm model, its own normalisation, crop
            and interpolation are used.
        run: its seed draws the samples.
        inputs: what the networks are fed, where it is not that.
        images: how many of the images to train on; 0 is all.

    Raises:
        UserError: no labels, one class, fewer images than a batch, a part of the data that is empty.
    """
    source = load(config.data, config.train_split, NEEDS, run.seed).first(images)
    held_out = load(config.data, config.eval_split, NEEDS, run.seed).first(config.test_images)
    run.uses(held_out)
    task = ClassificationTask(config, run, source, held_out, inputs or inputs_of(config))
    run.log(f"{config.data}: {len(source)} images to train on, {len(held_out)} held out, {task.num_classes} classes.")
    return task


def inputs_of(config: ClassificationConfig) -> Inputs:
    """What the networks of a recipe are fed: a timm encoder's own data config, else ImageNet's at this size."""
    size, name = (config.size, config.size), getattr(config, "encoder", "")
    if not name:
        return Inputs.of(None, size)
    with torch.device("meta"):
        return Inputs.of(create_timm(name, **made_for(name, config.size)), size)


class ClassificationTask:
    """Data, training and measuring of one run; made by :func:`open`.

    Attributes:
        source: training images.
        held_out: images that are only measured on.
        classes: names of the classes.
        inputs: what the networks are fed.
        measured: the transform of images that are measured.
        augmented: the transform of images that are trained on.
    """

    def __init__(
        self, config: ClassificationConfig, run: Run, source: Dataset, held_out: Dataset, inputs: Inputs
    ) -> None:
        self.config, self.run, self.source, self.held_out, self.inputs = config, run, source, held_out, inputs
        self.classes = class_names(source, held_out)
        self.measured = inputs.transform()
        self.augmented = self._augmented(config.augmentation)

    @property
    def num_classes(self) -> int:
        """How many classes the data has."""
        return len(self.classes)

    def _augmented(self, augmentation: Augmentation) -> Transform:
        assert self.inputs.size is not None
        return training_transform(
            self.inputs.size,
            self.inputs.resized,
            self.num_classes,
            augmentation,
            self.inputs.mean,
            self.inputs.std,
            self.config.smoothing,
        )

    def train(
        self,
        phase: str,
        model: nn.Module,
        dataset: Dataset | None = None,
        training: Training | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        transform: Transform | None = None,
    ) -> Trained:
        """Train a whole classifier with every setting of the config: repeats, smoothing, moving average, patience.

        Args:
            phase: a name, once a run.
            model: images ``(B, 3, H, W)`` to logits ``(B, K)``.
            dataset: to train on; the task's own without it.
            training: how long and how fast; the config's without it.
            evaluate: called with the model during training; with patience and without this, the loss on the part
                ``val`` of the data decides.
            transform: of training images; the config's augmentation without it.
        """
        training = training or self.config.training
        dataset = self.source if dataset is None else dataset
        if self.config.augmentation.repeats > 1:
            dataset = Repeated(dataset, self.config.augmentation.repeats)
        if training.patience is not None and evaluate is None:
            evaluate = self._validation_loss
        on_model = None if evaluate is None else lambda objective: evaluate(objective.model)
        objective = Classification(model, smoothing=self.config.smoothing)
        result = fit(self.run, phase, objective, dataset, training, transform or self.augmented, evaluate=on_model)
        trained: Any = result.objective if result.ema is None else result.ema
        return Trained(trained.model, result.curves)

    def _validation_loss(self, model: nn.Module) -> dict[str, float]:
        if not hasattr(self, "_validation"):
            self._validation = load(self.config.data, "val", NEEDS, self.run.seed)
        loss = {"loss": lambda logits, batch: F.cross_entropy(logits, batch["label"], reduction="none")}
        return {"loss": float(evaluate(self.run, model, self._validation, loss, self.measured)["loss"])}

    def confusion_matrix(
        self, model: nn.Module, dataset: Dataset | None = None, transform: Transform | None = None
    ) -> Tensor:
        """``(K, K)`` counts on the held-out images: rows are the true classes."""
        held_out = self.held_out if dataset is None else dataset
        return confusion_matrix(self.run, model, held_out, self.num_classes, transform or self.measured)

    def measure(
        self, model: nn.Module, dataset: Dataset | None = None, transform: Transform | None = None
    ) -> dict[str, float]:
        """``{"accuracy": …}`` on the held-out images."""
        return {"accuracy": accuracy(self.confusion_matrix(model, dataset, transform))}

    def arm(self, make: Callable[[int], nn.Module], phase: str = "classifier") -> Arm:
        """Make one network with ``make(num_classes)`` from the run's random start, train it and measure it."""
        check_arms({phase: lambda: make(self.num_classes)})
        self.run.seed_everything("network")
        trained = self.train(phase, make(self.num_classes))
        return Arm(phase, trained.model, self.measure(trained.model), trained.curves)

    def compare(
        self,
        makers: Mapping[str, Callable[[int], nn.Module]],
        published: Mapping[str, str] | None = None,
        measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> Comparison:
        """Train networks that differ in one thing, each made by ``make(num_classes)``; see :class:`Comparison`."""
        bound = {name: (lambda make=make: make(self.num_classes)) for name, make in makers.items()}
        return Comparison(self.run, bound, self.train, measure or self.measure, published)

    def show(self, model: nn.Module) -> None:
        """:func:`show` of the held-out images."""
        show(self.run, model, self.classes, self.held_out, self.measured)

    def references(self, number: int) -> tuple[Tensor, Tensor]:
        """Images ``(N, …)`` as when measuring and their labels, of the first ``number`` of every class in a shuffled
        order; on the run's device. What a class lacks is noted.

        Raises:
            UserError: none was found.
        """
        wanted, images, labels = dict.fromkeys(range(self.num_classes), number), [], []
        order = permutation(len(self.source), seed=self.run.seed)
        for start in range(0, min(len(order), 200 * number * self.num_classes), 256):
            for sample in self.source.samples(order[start : start + 256]):
                label = int(sample["label"])
                if wanted.get(label, 0):
                    wanted[label] -= 1
                    images.append(self.measured.one(sample, torch.Generator())["image"])
                    labels.append(label)
            if not any(wanted.values()):
                break
        if not images:
            raise UserError(f"{self.config.data} has no labelled samples to take references from.")
        absent = [self.classes[label] for label, missing in wanted.items() if missing == number]
        if absent:
            self.run.note(f"No reference samples of {', '.join(absent[:5])}.")
        return self.run.fabric.to_device(torch.stack(images)), self.run.fabric.to_device(torch.tensor(labels))

    def keep(self, model: nn.Module, text: str, name: str = "network", **facts: Any) -> None:
        """Save a trained network with all that it needs to be used: ``isthmus.load(run)``, ``isthmus apply``."""
        folder = self.run.dir / saved.KEPT / name
        if self.run.is_first:
            saved.save(folder, model, self.inputs, self.classes, facts)
        self.run.artifact(name, folder, text)


def show(run: Run, model: nn.Module, classes: Sequence[str], held_out: Dataset, transform: Transform) -> None:
    """The confusion matrix, where it can be read, and held-out images with what the network predicts.

    Args:
        run: which records the figures.
        model: images to logits ``(B, K)``.
        classes: K names.
        held_out: images and labels.
        transform: as for measuring.
    """
    if len(classes) <= 16:
        table = confusion_matrix(run, model, held_out, len(classes), transform)
        run.figure("confusion", figures.confusion_matrix(table, classes), "How often each class is taken for which.")
    batch = example_batch(held_out, spaced(len(held_out), 16), transform)
    with torch.no_grad():
        predicted = model.eval()(run.fabric.to_device(batch["image"])).argmax(1).cpu()
    names = [classes[int(label)] for label in predicted]
    pictures = figures.captioned(batch["image"], names, (predicted == batch["label"]).tolist(), columns=8)
    run.figure("examples", pictures, "Held-out images, and what the network predicts; red is wrong.")


def answer(kept: Saved, item: Item) -> Answer:
    """The likeliest class of a picture, the five likeliest with their probabilities, and the picture under it."""
    facts = likeliest(kept, item.predicted)
    return Answer(facts, annotated(item.image, f"{facts['class']} ({facts['probability'][facts['class']]:.0%})"))


def likeliest(kept: Saved, logits: Tensor) -> dict[str, Any]:
    """The class of logits ``(K,)`` by name, and the five likeliest with their probabilities."""
    probability = logits.float().softmax(0).cpu()
    best = probability.topk(min(5, len(probability)))
    classes = kept.labels or [str(number) for number in range(len(probability))]
    likely = {classes[int(i)]: round(float(p), 4) for p, i in zip(*best, strict=True)}
    return {"class": classes[int(best.indices[0])], "probability": likely}
