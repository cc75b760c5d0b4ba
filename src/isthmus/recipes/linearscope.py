"""LinearScopes: the exact affine map that a network applies at one image (Navarrete Michelini et al. 2019).

The paper's claims (arXiv 1908.05168): with every non-linear unit frozen at an image, any convnet is y = F x + r,
exactly; classifiers lean heavily on r, what their biases add up to, while super-resolution is almost linear in the
image; and singular vectors of F can be found without forming it.

What is measured here, on digits: a classifier with biases and its twin without, super-resolution by two, and an
autoencoder with instance norm, sigmoid and tanh are trained; then F x + r against the output, rows from backward passes
against rows from impulses, singular values against the dense ones, accuracy from F x alone and from r alone, and the
derivative in the place of the ratio of smooth units. ``--encoder NAME --checkpoint FILE`` looks into a timm model
instead, on any ``--data``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, one_of
from isthmus.codec import UserError
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.data.inputs import Inputs
from isthmus.encoders.images.small_cnns import PooledCNN, SmoothAutoencoder, UpscalingCNN
from isthmus.encoders.trained import num_outputs, pretrained, trained
from isthmus.engine import Run, Training
from isthmus.engine.evaluate import FEW
from isthmus.engine.fit import fit
from isthmus.lenses.linear_scope import LinearScope
from isthmus.objectives.restoration import Restoration
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks import classification
from isthmus.tasks.applying import Answer, Item
from isthmus.tasks.classification import ClassificationConfig, ClassificationTask

needs = classification.NEEDS

#: Pixels a side of what the small networks see, where nothing else is said.
_SIDE = 8


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about a minute on two cores."""

    data: str = "digits"
    """Labelled images."""
    encoder: str = ""
    """A timm classifier to look into; small networks that are trained here without it."""
    checkpoint: str = ""
    """Its weights; timm's own pre-trained ones are loaded without it."""
    size: Natural = 0
    """Pixels a side of what the networks see; 0 is 8 for the small networks, and what a timm model is made for."""
    width: Count = 16
    """Channels of the first convolution of the classifiers; twice as many in the others."""
    looked_at: Natural = 0
    """Held-out images on which accuracy from F x alone is measured; 0 is all."""
    triplets: Count = 8
    """Leading singular triplets."""
    gates: Annotated[str, one_of(("refuse", "freeze"))] = "refuse"
    """Of a timm model: refuse products of two things that depend on the image, or freeze one of them."""
    training: Training = Training(epochs=12, batch_size=32, optimizer="adam", lr=2e-3)
    """Training of the classifiers and of the autoencoder."""
    super_resolution: Training = Training(epochs=25, batch_size=32, optimizer="adam", lr=2e-3)
    """Training of super-resolution."""
    train_split: str = "train+val"
    """Part of the data to train on."""

    @classmethod
    def paper(cls) -> Config:
        """VGG-19 with timm's weights on ImageNet pictures; the paper analyses pre-trained networks and trains none."""
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            encoder="vgg19",
            size=224,
            looked_at=100,
            triplets=16,
            eval_split="val",  # the labels of ImageNet's test pictures are not public
        )


def check(config: Config) -> None:
    """Refuse weights of no network, and sizes that the small networks cannot halve."""
    if config.checkpoint and not config.encoder:
        raise UserError("a checkpoint needs the name of its network: give --encoder too.")
    if config.size % 2 and not config.encoder:
        raise UserError(f"--size must be even, because maps are halved; got {config.size}.")


def run(config: Config, run: Run) -> None:
    """Train the small networks or take a timm model, and look into them."""
    if config.encoder:
        _look_into_trained(config, run)
        return
    side = config.size or _SIDE
    inputs = Inputs(size=(side, side), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    task = classification.open(replace(config, size=side), run, inputs)
    networks: dict[str, nn.Module] = {}
    for name, bias in (("classifier", True), ("bias_free", False)):
        run.seed_everything(name)
        networks[name] = task.train(name, PooledCNN(task.num_classes, config.width, bias)).model
    for name, degrade, training in (
        ("super_resolution", _halved, config.super_resolution),
        ("autoencoder", lambda x: x, config.training),
    ):
        run.seed_everything(name)
        restoration = Restoration(_untrained(name, config), degrade)
        result = fit(run, name, restoration, task.source, training, task.augmented)
        averaged: Any = result.objective if result.ema is None else result.ema
        networks[name] = averaged.network
    for network in networks.values():
        network.to(run.fabric.device).eval()
    scopes = _classifier(config, task, networks["classifier"])
    free = _accuracies(config, task, networks["bias_free"])
    run.metric("accuracy_bias_free", free["whole"])
    run.metric("accuracy_bias_free_without_r", free["without_r"])
    run.metric("lost_without_biases", scopes["whole"] - free["whole"])
    _exactness(config, task, networks)
    _restoration(task, networks, scopes["residual"])
    task.keep(
        networks["classifier"], "the classifier; `isthmus apply` explains its answers on pictures", gates="refuse"
    )


def answer(kept: Saved, item: Item) -> Answer:
    """The class of a picture, and why: how much of its logit F x and r make up, and each layer's part of r.

    The drawing shows what each pixel adds to the logit and the leading singular vectors.
    """
    scope = LinearScope(kept.model, item.input, gates=kept.facts["gates"])
    best = int(scope.y.argmax())
    facts = {
        "class": (kept.labels or [])[best],
        "logit": float(scope.y.flatten()[best]),
        "from_pixels": float(scope.contribution(best).sum()),
        "from_constants": float(scope.residual.flatten()[best]),
        "constants_by_layer": {name: round(float(r), 6) for name, r in scope.residual_by_layer(best).items()},
        "relative_error": scope.fidelity.relative,
    }
    return Answer(facts, scope.figure(best))


# ---------------------------------------------------------------------------------------------------------- measuring


def _look_into_trained(config: Config, run: Run) -> None:
    """A network of timm, with a person's weights or its own."""
    name = config.encoder
    network = trained(name, config.checkpoint, log=run.log) if config.checkpoint else pretrained(name)
    inputs = Inputs.of(network, (config.size, config.size) if config.size else None)
    held_out = load(config.data, config.eval_split, needs, run.seed).first(config.test_images)
    task = ClassificationTask(config, run, held_out, held_out, inputs)
    assert inputs.size is not None
    outputs = num_outputs(network, name, inputs.size[-1])
    labelled = outputs == task.num_classes
    if not labelled:
        run.note(f"{name} has {outputs} outputs, {config.data} {task.num_classes} classes: no accuracies.")
        task.classes = [str(number) for number in range(outputs)]
    _classifier(config, task, network.to(run.fabric.device).eval(), labelled)
    task.keep(network, f"{name}; `isthmus apply` explains its answers on pictures", gates=config.gates)


def _classifier(
    config: Config, task: ClassificationTask, network: nn.Module, labelled: bool = True
) -> dict[str, float]:
    """A classifier's accuracy from all, from F x and from r; drawings of what pixels add."""
    run, classes = task.run, task.classes
    found = _accuracies(config, task, network)
    if labelled:
        run.metric("accuracy", found["whole"])
        run.metric("accuracy_without_r", found["without_r"])
        run.metric("accuracy_from_r_alone", found["from_r"])
        run.metric("drop_without_r", found["whole"] - found["without_r"])
    run.metric("residual_share_classifier", found["residual"])
    run.metric("fidelity_classifier", found["error"])
    scope = LinearScope(network, _images(task, 1)[0], gates=cast(Any, config.gates))
    best = int(scope.y.argmax())
    caption = f"One image, predicted {classes[best]}: its pixels' votes, singular vectors, layers in r."
    run.figure("classifier", scope.figure(best), caption)
    if scope.y.numel() <= 16:
        votes = (scope.rows(range(scope.y.numel())) * scope.x).sum(1)
        named = {f"{label}: {float(each.sum()):.1f}": each for label, each in zip(classes, votes, strict=True)}
        drawn = figures.maps(named, "adds to the logit", signed=True)
        run.figure("votes", drawn, "What every pixel adds to every class; the sum is F x of that class.")
    parts = {name or "model": float(value) for name, value in scope.residual_by_layer(best).items()}
    run.figure("layers", figures.bars(dict(list(parts.items())[:24]), "adds to r of the answer"), "r by layer.")
    return found


def _accuracies(config: Config, task: ClassificationTask, network: nn.Module) -> dict[str, float]:
    """Accuracy of y, of F x and of r; mean of ‖r‖ over ‖y‖ around the mean over classes; the largest error."""
    images, labels = _images(task, config.looked_at)
    right = {"whole": 0, "without_r": 0, "from_r": 0}
    shares, error = [], 0.0
    for image, label in zip(images, labels.tolist(), strict=True):
        scope = LinearScope(network, image[None], gates=cast(Any, config.gates))
        y, r = scope.y[0], scope.residual[0]
        for name, logits in (("whole", y), ("without_r", y - r), ("from_r", r)):
            right[name] += int(logits.argmax()) == label
        centred = [value - value.mean() for value in (r, y)]
        shares.append(float(centred[0].norm() / centred[1].norm().clamp_min(1e-12)))
        error = max(error, scope.fidelity.relative)
    return {
        **{name: count / len(images) for name, count in right.items()},
        "residual": float(np.mean(shares)),
        "error": error,
    }


def _exactness(config: Config, task: ClassificationTask, networks: Mapping[str, nn.Module]) -> None:
    """Output, rows and singular values against what forming F by brute force gives; the derivative for comparison."""
    run, images = task.run, _images(task, 4)[0]
    kinds: dict[str, tuple[nn.Module, Tensor]] = {}
    for name in ("classifier", "super_resolution", "autoencoder"):
        x = _halved(images) if name == "super_resolution" else images
        kinds[name] = (networks[name], x)
        run.seed_everything("untrained", name)
        kinds[f"untrained {name}"] = (_untrained(name, config).to(images.device).eval(), x)
    fidelity = rows_error = svd_error = 0.0
    ratios = []
    for name, (network, x) in kinds.items():
        for each in x:
            scope = LinearScope(network, each[None])
            fidelity = max(fidelity, scope.fidelity.relative)
        dense = scope.columns(range(scope.x.numel())).flatten(1).T
        place = scope.y.numel() // 2
        row = scope.rows([place]).flatten()
        rows_error = max(rows_error, float((row - dense[place]).abs().max() / dense[place].abs().max()))
        count = min(config.triplets, *dense.shape)
        exact = torch.linalg.svdvals(dense)[:count]
        svd_error = max(svd_error, float(((scope.svd(count, sweeps=60).s - exact).abs() / exact[0]).max()))
        if "classifier" not in name:  # these have smooth units
            by_slope = LinearScope(network, x[-1:], smooth="derivative", tolerance=None)
            ratios.append(by_slope.fidelity.relative / max(scope.fidelity.relative, 1e-7))
    run.metric("fidelity", fidelity)
    run.metric("rows_error", rows_error)
    run.metric("svd_error", svd_error)
    run.metric("derivative_over_ratio", min(ratios))


def _restoration(task: ClassificationTask, networks: Mapping[str, nn.Module], classifier_share: float) -> None:
    """How large r is beside y in super-resolution; its filters and singular vectors."""
    run, network = task.run, networks["super_resolution"]
    images, _ = _images(task, 100)
    shares, through = [], []
    for image in images:
        scope = LinearScope(network, _halved(image[None]))
        shares.append(float(scope.residual.norm() / scope.y.norm()))
        through.append(float((scope.y - scope.residual).norm() / scope.y.norm()))
    run.metric("residual_share_super_resolution", float(np.mean(shares)))
    run.metric("through_share_super_resolution", float(np.mean(through)))
    run.metric("share_below_classifier", classifier_share - float(np.mean(shares)))
    scope = LinearScope(network, _halved(images[:1]))
    side, inside = scope.y.shape[-1], scope.x.shape[-1]
    middle = [(side // 2 + i) * side + side // 2 + j for i in (0, 1) for j in (0, 1)]
    rows = scope.rows(middle)[:, 0]
    filters = {f"row {place // side}, column {place % side}": row for place, row in zip(middle, rows, strict=True)}
    caption = f"Four neighbouring output pixels: how each is interpolated from {inside}² pixels."
    run.figure("filters", figures.maps(filters, "weight", signed=True), caption)
    run.figure("super_resolution", scope.figure(middle[0]), "Super-resolution: one output pixel, singular vectors.")
    auto = LinearScope(networks["autoencoder"], images[:1])
    run.figure("autoencoder", auto.figure(auto.y.numel() // 2), "The autoencoder, frozen at one image.")


# -------------------------------------------------------------------------------------------------------------- parts


def _untrained(name: str, config: Config) -> nn.Module:
    makers: dict[str, Callable[[], nn.Module]] = {
        "classifier": lambda: PooledCNN(10, config.width),
        "super_resolution": lambda: UpscalingCNN(config.width),
        "autoencoder": lambda: SmoothAutoencoder(config.width),
    }
    return makers[name]()


def _halved(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 2)


def _images(task: ClassificationTask, number: int) -> tuple[Tensor, Tensor]:
    """The first held-out images and their labels; all of them for 0, a few in a try-out."""
    few: Dataset = task.held_out.first(number)
    few = few.first(FEW) if task.run.few else few
    batches = list(evaluation_batches(few, 256, transform=task.measured))
    images = torch.cat([batch["image"] for batch in batches])
    return task.run.fabric.to_device(images), torch.cat([batch["label"] for batch in batches])
