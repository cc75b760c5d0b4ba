"""Pre-training without labels: what recipes have in common that learn an encoder by an objective and then test it.

::

    task = pretraining.open(config, run, network)           # pictures, held-out pictures, their size and classes
    objective = task.pretrain("pretrain", objective, transform)
    task.probe("probe", encoder, make_head, task.first_per_class(40), config.probe)
    task.finetune("finetune", network, task.drawn_per_class(8), config.finetune)
    task.keep(objective, "what was pre-trained", "encoder")
    task.keep_for_timm(network, config.encoder)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import saved
from isthmus.bounds import Count
from isthmus.codec import UserError, save_weights
from isthmus.codec.timm_models import headless, line_for_timm
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.data.inputs import Inputs
from isthmus.data.transforms import CenterCrop, Compose, Resize, Transform
from isthmus.engine import Run, Training, probing
from isthmus.engine.evaluate import confusion_matrix
from isthmus.engine.fit import fit
from isthmus.layers.masking import random_mask
from isthmus.objectives.classification import Classification

#: Pictures are all that pre-training needs; labels, where there are some, are for probes and fine-tuning.
NEEDS = ("image", "label?")
#: The file that timm loads.
ENCODER = "encoder.safetensors"
#: Pictures in a batch of a try-out, on every device.
_FEW = 8

_Objective = TypeVar("_Objective", bound=nn.Module)


@dataclass(frozen=True)
class PretrainingConfig:
    """Settings that every recipe of pre-training has."""

    data: str = "photos:64"
    """Where the pictures come from: photos:64, folder:PATH, parquet:PATH, hub:NAME …"""
    size: Count | None = None
    """Pixels a side of what the network sees; without it those of the images, but no more than it was made for."""
    pretrain: Training = dataclasses.field(default_factory=lambda: Training(steps=300, batch_size=32))
    """Pre-training."""


def open(
    config: Any,
    run: Run,
    network: nn.Module | None = None,
    *,
    source: str = "",
    train_split: str = "train",
    eval_split: str = "val",
    fallback: bool = False,
    resize: int | None = None,
    most: int | None = None,
) -> PretrainingTask:
    """Load the pictures of a run, find out their size and classes, and refuse what cannot be trained.

    Args:
        config: with the fields of :class:`PretrainingConfig`.
        run: its seed draws the samples.
        network: a timm model, whose size, mean and deviation pictures are prepared for.
        source: the data, where they are not ``config.data``.
        train_split: part of the data to train on.
        eval_split: part of the data to measure on.
        fallback: measure on training pictures, with a note, where the source is too small to hold some back.
        resize: the shorter side of pictures before their middle is cut out; the size of the cut without it.

        most: the largest side without ``config.size``; what the network was made for without it.

    Raises:
        UserError: a stream, nothing held out, fewer pictures than a batch, pictures that become smaller than the cut.
    """
    source = source or config.data
    train = load(source, train_split, NEEDS, run.seed)
    if not hasattr(train, "__len__"):
        raise UserError(f"{source} is a stream, of which no part can be held out; use folder:, parquet: or hub: here.")
    try:
        held_out: Dataset | None = load(source, eval_split, NEEDS, run.seed)
        assert held_out is not None
        held_out = held_out if len(held_out) else None
        reason = ""
    except UserError as error:
        if not fallback:
            raise
        held_out, reason = None, f" {error}"
    if held_out is None and not fallback:
        raise UserError(f"{source} holds nothing out to measure on; give more images, or --eval-split train.")
    if held_out is None:
        run.note(f"No validation images:{reason} Training images are looked at instead.")
    size = config.size or natural_size(train, network, most)
    if resize is not None and resize < size:
        raise UserError(f"--resize {resize} makes pictures smaller than the {size} pixels that are cut out of them.")
    inputs = Inputs.of(network, (size, size), crop_pct=size / (resize or size))
    task = PretrainingTask(config, run, source, train, train if held_out is None else held_out, size, inputs)
    task.check("--pretrain", config.pretrain, len(train))
    run.uses(task.held_out)
    return task


def natural_size(dataset: Dataset, network: nn.Module | None = None, most: int | None = None) -> int:
    """The pictures' shorter side, but no more than the network was made for; a multiple of 32 from 32 on."""
    stats: Any = getattr(network, "pretrained_cfg", None) or {"input_size": (3, 224, 224)}
    side = min(*dataset.natural_size(), most or stats["input_size"][-1])
    return side // 32 * 32 if side >= 32 else side


class PretrainingTask:
    """Data, training and measuring of one run; made by :func:`open`.

    Attributes:
        source: what the data are called.
        train: pictures to train on.
        held_out: pictures that are only measured on.
        size: pixels a side of what the network sees.
        inputs: how pictures are prepared for it.
    """

    def __init__(
        self, config: Any, run: Run, source: str, train: Dataset, held_out: Dataset, size: int, inputs: Inputs
    ) -> None:
        self.config, self.run, self.source, self.train, self.held_out = config, run, source, train, held_out
        self.size, self.inputs = size, inputs
        run.log(f"{source}: {len(train)} images to train on, {len(held_out)} held out, {size} pixels a side.")

    # ------------------------------------------------------------------------------------------------ training

    def check(self, flag: str, training: Training, samples: int) -> None:
        """Refuse a training that cannot be before anything is trained.

        Raises:
            UserError: which begins with the flag.
        """
        training = self._tried(training)
        try:
            training.schedule_for(samples, self.run.cap(training.length(samples)))
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error

    def pretrain(
        self,
        phase: str,
        objective: _Objective,
        transform: Transform,
        training: Training | None = None,
    ) -> _Objective:
        """Train an objective on the pictures; what is returned is its moving average, where the training has one.

        Args:
            phase: a name, once a run.
            objective: pictures to a loss.
            transform: of training pictures.
            training: how long and how fast; the config's ``pretrain`` without it.
        """
        return self._fit(phase, objective, self.train, training or self.config.pretrain, transform)

    def _fit(
        self, phase: str, objective: _Objective, dataset: Dataset, training: Training, transform: Transform | None
    ) -> _Objective:
        fitted = fit(self.run, phase, objective, dataset, self._tried(training), transform)
        return cast(_Objective, fitted.ema or fitted.objective)

    def _tried(self, training: Training) -> Training:
        """In a try-out small batches, so that a published setting can be tried on a laptop."""
        if not self.run.few:
            return training
        batch_size = min(training.batch_size, _FEW * self.run.world * training.accumulate)
        return dataclasses.replace(training, batch_size=batch_size, workers=0)

    # ------------------------------------------------------------------------------------------------ few labels

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The label of every training picture, in order."""
        return self.train.labels

    @property
    def labelled(self) -> bool:
        """Whether the pictures have labels, to train and to measure."""
        return all("label" in dataset.columns for dataset in (self.train, self.held_out))

    @functools.cached_property
    def num_classes(self) -> int:
        """How many classes there are: those named, or those that labels speak of."""
        if self.train.classes is not None:
            return len(self.train.classes)
        return 1 + int(max(self.labels.max(initial=0), self.held_out.labels.max(initial=0)))

    @property
    def classes(self) -> list[str]:
        """Names of the classes, their numbers where they have none."""
        return list(self.train.classes or map(str, range(self.num_classes)))

    def first_per_class(self, number: int, wrap: bool = False) -> Dataset:
        """The first ``number`` training pictures of every class, 0 is all; ``wrap`` repeats them to an epoch of all."""
        chosen = probing.first_per_class(self.labels, number)
        return self.train.select(np.resize(chosen, len(self.train)) if wrap else chosen)

    def drawn_per_class(self, number: int) -> Dataset:
        """``number`` training pictures of every class, drawn by the run's seed; all for 0."""
        if not number:
            return self.train
        labels = torch.from_numpy(self.labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.run.seed))
        chosen = [order[labels[order] == label][:number] for label in range(self.num_classes)]
        return self.train.select(torch.cat(chosen).sort().values.numpy())

    def probe(
        self,
        phase: str,
        encoder: nn.Module,
        make_head: Callable[[Tensor], nn.Module],
        few: Dataset,
        training: Training,
        augmented: Transform | None = None,
    ) -> float:
        """Held-out accuracy of a head that is trained on frozen features, see :func:`isthmus.engine.probing.probe`."""
        plain = self.inputs.transform()
        probed = probing.probe(self.run, phase, encoder, make_head, few, self._tried(training), plain, augmented)
        return self.accuracy(probed)

    def finetune(
        self,
        phase: str,
        network: nn.Module,
        few: Dataset,
        training: Training,
        augmented: Transform,
        smoothing: float = 0.0,
        binary: bool = False,
    ) -> nn.Module:
        """Train a whole classifier on few labels: its moving average, where the training has one.

        Args:
            phase: a name, once a run.
            network: pictures to logits.
            few: labelled pictures; a batch is at most all of them.
            training: how long and how fast.
            augmented: of training pictures; it normalises them.
            smoothing: label smoothing.
            binary: the mean of binary cross-entropies.
        """
        training = dataclasses.replace(training, batch_size=min(training.batch_size, len(few)))
        objective = Classification(network, smoothing=smoothing, binary=binary)
        return self._fit(phase, objective, few, training, augmented).model

    def accuracy(self, classifier: nn.Module, held_out: Dataset | None = None) -> float:
        """Share of held-out pictures whose label gets the highest score: of a network, or a ``Classification``."""
        logits = None
        if isinstance(classifier, Classification):
            logits = lambda model, batch: model.logits(batch["image"])  # noqa: E731
        held_out = self.held_out if held_out is None else held_out
        table = confusion_matrix(
            self.run, classifier, held_out, self.num_classes, self.inputs.transform(), logits=logits
        )
        return int(table.diagonal().sum()) / max(int(table.sum()), 1)

    def load_test(self) -> Dataset | None:
        """The test pictures, on which fine-tuned networks are compared; ``None`` with a note where that cannot be."""
        if not self.labelled:
            self.run.note("These pictures have no labels, so there was no fine-tuning; the encoder is what you need.")
            return None
        test = load(self.source, "test", ("image", "label"), self.run.seed)
        if self.num_classes < 2 or not len(test):
            self.run.note("Fine-tuning was left out: it needs at least two classes and some test images.")
            return None
        self.run.uses(test)
        return test.first(_FEW if self.run.few else 0)

    # ------------------------------------------------------------------------------------------------ what is hidden

    def masked(
        self,
        grid: Callable[[Tensor], tuple[int, int]],
        visible_cells: Callable[[int], int],
        number: int = 256,
    ) -> list[dict[str, Tensor]]:
        """Held-out pictures with masks that are the same for every objective of the run.

        Args:
            grid: rows and columns of patches of a batch of pictures.
            visible_cells: how many of so many patches stay visible.
            number: of pictures, at most.

        Returns:
            Batches on the device: ``image`` in [0, 1], and ``visible``, boolean ``(B, h, w)``.
        """
        transform = Compose([Resize(self.size), CenterCrop(self.size)])
        generator, batches = torch.Generator().manual_seed(self.run.seed), []
        chosen = self.held_out.first(_FEW if self.run.few else number)
        for batch in evaluation_batches(chosen, 64, transform=transform):
            shape = grid(batch["image"])
            visible = random_mask(len(batch["image"]), shape, visible_cells(shape[0] * shape[1]), generator)
            batches.append(self.run.fabric.to_device({"image": batch["image"], "visible": visible}))
        return batches

    # ------------------------------------------------------------------------------------------------ what is kept

    def keep(
        self,
        model: nn.Module,
        text: str,
        name: str,
        inputs: Inputs | None = None,
        labels: Sequence[str] | None = None,
        **facts: Any,
    ) -> None:
        """Save a model with all that it needs to be used: ``isthmus.load(run)``, ``isthmus apply``."""
        folder = self.run.dir / saved.KEPT / name
        if self.run.is_first:
            saved.save(folder, model, inputs or self.inputs, labels, facts)
        self.run.artifact(name, folder, text)

    def keep_for_timm(self, network: nn.Module, name: str) -> None:
        """Save a timm model as the file that timm loads under any number of classes: no head that nobody trained."""
        path = self.run.dir / ENCODER
        if self.run.is_first:
            save_weights(headless(network), path)
        self.run.artifact("encoder", path, f"the pre-trained encoder: {line_for_timm(name, path)}")


@torch.no_grad()
def mean_loss(loss: Callable[[dict[str, Tensor]], Tensor], batches: Sequence[dict[str, Tensor]]) -> float:
    """The mean over pictures of what ``loss(batch)`` gives for :meth:`PretrainingTask.masked` batches."""
    total = sum(loss(batch) * len(batch["image"]) for batch in batches)
    return float(total) / sum(len(batch["image"]) for batch in batches)


def scaled(image: Tensor, size: int, multiple: int) -> Tensor:
    """A picture ``(1, 3, H, W)`` in its own shape: the shorter side ``size``, both sides whole patches.

    Args:
        image: in [0, 1].
        size: pixels of the shorter side.
        multiple: side of a patch; the longer side is four times ``size`` at most.
    """
    shorter = min(image.shape[2:])
    sides = [
        min(max(round(side * size / shorter / multiple), size // multiple), 4 * size // multiple) * multiple
        for side in image.shape[2:]
    ]
    return F.interpolate(image, sides, mode="bicubic", antialias=True).clamp(0, 1)
