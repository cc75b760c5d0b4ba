"""RotNet: features from telling how an image was rotated (Gidaris, Singh, Komodakis, arXiv 1803.07728).

The paper's claim: a convnet that learns to tell whether a photograph was rotated by 0, 90, 180 or 270 degrees has to
find out what is on it; its middle layers then serve other tasks almost as well as supervised ones.

What is measured here: a small network is trained on rotations of unlabelled images; on images that it never saw, how
often it tells the rotation; and how well a linear probe on its second block classifies, beside the same network
untrained, with many and with few labels. A control, the same training on images that were turned at random beforehand,
must learn nothing: what is learnt is the upright orientation.

The claims are about CIFAR-10. Where it is not at hand, the built-in digits stand in, which have an upright orientation
too (but for 0, 1 and 8, and 6 against 9). The sixteen built-in photographs are too few scenes for this task.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from isthmus.bounds import Count, Natural
from isthmus.catalog import published
from isthmus.codec import create_timm, save_weights
from isthmus.data import example_batch
from isthmus.data.readers.local import local
from isthmus.data.splits import spaced
from isthmus.data.transforms import Compose, Flip, Normalize, RandomCrop, Resize, Transform
from isthmus.data.transforms.turned import Turned
from isthmus.decoders import probes as heads
from isthmus.encoders.backbone import made_for
from isthmus.engine import Run, Training
from isthmus.engine.evaluate import accuracy, confusion_matrix
from isthmus.engine.probing import Level, level_index
from isthmus.layers.random import derive_seed
from isthmus.objectives.rotation import Rotation, rotate, rotate_all
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks import pretraining
from isthmus.tasks.applying import Answer, Item
from isthmus.tasks.pretraining import PretrainingConfig, PretrainingTask

needs = pretraining.NEEDS


@dataclass(frozen=True)
class Config(PretrainingConfig):
    """Settings of a run; the defaults take about two minutes on two cores."""

    data: str = "auto"
    """Images with an upright orientation: auto is CIFAR-10 where it is at hand, else digits:32; any source will do."""
    encoder: str = "nin_cifar_tiny"
    """The network, ours or any of timm: nin_cifar_tiny, nin_cifar, rotnet_alexnet, resnet18, …"""
    resize: Count | None = None
    """Shorter side before the crop; that of the crop without it."""
    padding: Natural = 0
    """Zeros around a training image before it is cropped at random."""
    flip: bool = True
    """Mirror training images left and right at random; the copies of an image share crop and mirroring."""
    rotations: tuple[int, ...] = (0, 90, 180, 270)
    """Degrees, counter-clockwise; angles that are no multiples of 90 are interpolated."""
    circle: bool = False
    """Show only the largest centred circle, for images whose borders or corners give the angle away."""
    pretrain: Training = Training(steps=400, batch_size=32, optimizer="sgd", lr=0.05, weight_decay=5e-4)
    """Training on rotations."""
    control: bool = True
    """Train once more on images that were turned at random beforehand, from which nothing can be learnt."""
    layer: int | None = None
    """Level of the network that is probed, as timm counts its features from 0; conv2 of our networks, else the last
    but one."""
    head: Literal["linear", "nonlinear", "conv", "alexnet"] = "linear"
    """The probe: linear on a pooled map, or the paper's non-linear and convolutional ones, or its AlexNet's own end."""
    grid: Count = 4
    """Cells a side that the linear probe pools the map to."""
    pool: Literal["mean", "max"] = "mean"
    """How it pools; the paper's ImageNet probes take the maximum on grids of 12, 7, 5, 6 and 6 for AlexNet's layers."""
    labels: tuple[Natural, ...] = (200, 40)
    """Labels a class that probes are trained with, the first in the order of the source; 0 is all."""
    wrap: bool = False
    """Let an epoch with few labels be as long as one with all, by going through them again."""
    scratch: bool = False
    """Train the network on the same labels from scratch too, as the supervised comparison."""
    augment: bool = False
    """Crop and mirror while probes are trained; without it, frozen features are computed once."""
    probe: Training = Training(steps=1000, batch_size=100, optimizer="sgd", lr=0.1, weight_decay=0.02)
    """Training of the probes."""
    train_split: str = "train"
    """Part of the data to train on, rotations and labels."""
    eval_split: str = "val+test"
    """Part of the data to measure on."""

    @classmethod
    def paper(cls) -> Config:
        """The published CIFAR-10 experiment with four blocks and the convolutional classifier on conv2.

        ImageNet: ``--encoder rotnet_alexnet --size 224 --resize 256 --padding 0 --pretrain.epochs 50
        --pretrain.batch-size 192 --pretrain.lr 0.01 --pretrain.gamma 0.1 --pretrain.milestones 15 30 45``.
        Few labels: ``--labels 20 100 400 1000 --scratch``.
        """
        return cls(
            data="hub:uoft-cs/cifar10?image=img",
            encoder="nin_cifar",
            padding=4,
            pretrain=Training(
                epochs=200,
                batch_size=128,
                optimizer="sgd",
                lr=0.1,
                weight_decay=5e-4,
                decay_all=True,
                schedule="multistep",
                milestones=(60, 120, 160),
                gamma=0.2,
            ),
            control=False,
            head="conv",
            labels=(0,),
            wrap=True,
            augment=True,
            probe=Training(
                epochs=100,
                batch_size=128,
                optimizer="sgd",
                lr=0.1,
                weight_decay=5e-4,
                decay_all=True,
                schedule="multistep",
                milestones=(35, 70, 85),
                gamma=0.2,
            ),
            train_split="train+val",
            eval_split="test",
        )


def no_verdict(config: Config) -> str:
    """Why a run with these settings cannot speak to the claims; empty where it can."""
    if config.data != "auto" or local("cifar10/test.parquet"):
        return ""
    return (
        "The claims of rotnet are about CIFAR-10, which is not at hand: put its test images as "
        "data/cifar10/test.parquet into the folder that ISTHMUS_SHARED names. Without it there are numbers on digits."
    )


def check(config: Config) -> None:
    """Refuse rotations that are not different."""
    Rotation(nn.Identity(), nn.Identity(), config.rotations)


def run(config: Config, run: Run) -> None:
    """Pre-train, measure, probe, draw."""
    with torch.device("meta"):
        like = create_timm(config.encoder)
    layer = level_index(like, config.layer)
    task = pretraining.open(
        config,
        run,
        like,
        source=_source(config),
        train_split=config.train_split,
        eval_split=config.eval_split,
        resize=config.resize,
    )
    if task.labelled:
        for number in config.labels:
            task.check("--probe", config.probe, len(task.first_per_class(number, config.wrap)))
    run.seed_everything("network")
    network = _network(config, task, len(config.rotations))
    untrained = copy.deepcopy(network)
    _check_exact(run)

    objective = task.pretrain("pretrain", _objective(network, config), _augmented(config, task))
    network = objective.encoder
    confusion = _confusion(task, objective)
    run.metric("rotation_accuracy", accuracy(confusion), published=published("rotnet").get("rotation_accuracy"))
    _keep(config, task, network)
    if config.control:
        turned = Turned(derive_seed(run.seed, "turned"), config.rotations)
        control = _objective(copy.deepcopy(untrained), config)
        control = task.pretrain("control", control, _augmented(config, task, turned))
        found = accuracy(_confusion(task, control, turned))
        run.metric("control_accuracy", found)
        run.metric("control_distance", abs(found - 1 / len(config.rotations)))

    _draw(task, objective, untrained, confusion)
    if task.labelled:
        probes = _probes(config, task, layer, {"": network, "_untrained": untrained})
        run.figure("probes", figures.bars(probes), "Accuracy on frozen features, the same network untrained in grey.")
    else:
        run.note(f"{task.source} has no labels, so there is no probe.")


def answer(kept: Saved, item: Item) -> Answer:
    """How a photograph was rotated, and the photograph turned upright."""
    rotations = kept.facts["rotations"]
    objective = Rotation(kept.model, nn.Identity(), rotations, circle=kept.facts["circle"]).eval()
    probability = objective.tell(item.input)[0].cpu()
    degrees = rotations[int(probability.argmax())]
    buffer = io.BytesIO()
    to_pil_image(rotate(item.image, -degrees)).save(buffer, "PNG")
    facts = {
        "rotated_by": degrees,  # counter-clockwise
        "probability": {str(d): round(float(p), 4) for d, p in zip(rotations, probability, strict=True)},
        "turn_clockwise": degrees % 360,
    }
    return Answer(facts, files={"-upright.png": buffer.getvalue()})


# ------------------------------------------------------------------------------------------------------------- parts


def _objective(network: nn.Module, config: Config) -> Rotation:
    """The network ends in its own classifier of rotations, as the paper's do."""
    return Rotation(network, nn.Identity(), config.rotations, circle=config.circle)


def _network(config: Config, task: PretrainingTask, classes: int) -> nn.Module:
    return create_timm(config.encoder, num_classes=classes, **made_for(config.encoder, task.size))


def _augmented(config: Config, task: PretrainingTask, turned: Turned | None = None) -> Transform:
    """For training; rotation comes after it, in the objective."""
    steps: list[Transform] = [Resize(config.resize or task.size, task.inputs.interpolation)]
    steps += [RandomCrop(task.size, config.padding), *([turned] if turned else []), *([Flip()] if config.flip else [])]
    return Compose([*steps, Normalize(task.inputs.mean, task.inputs.std)])


def _keep(config: Config, task: PretrainingTask, network: nn.Module) -> None:
    """The network for ``isthmus apply``, and as a file for timm, both with its classifier of rotations."""
    degrees = [str(angle) for angle in config.rotations]
    facts = {"rotations": list(config.rotations), "circle": config.circle}
    task.keep(network, "the network with its rotation classifier", "network", labels=degrees, **facts)
    path = task.run.dir / pretraining.ENCODER
    if task.run.is_first:
        save_weights(network, path, {"timm": config.encoder, "size": str(task.size)})
    call = f"timm.create_model({config.encoder!r}, num_classes={len(degrees)}, checkpoint_path={str(path)!r})"
    task.run.artifact("encoder", path, f"the same for timm: import isthmus.encoders; {call}")


def _confusion(task: PretrainingTask, objective: Rotation, turned: Turned | None = None) -> Tensor:
    """``(K, K)`` counts: rows are the true rotations, columns the predicted, on all copies of all held-out images."""
    *cut, normalize = cast(Compose, task.inputs.transform()).transforms
    measured = Compose([*cut, *([turned] if turned else []), normalize])

    def copied(batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        image, label = objective.copies(measured(batch, generator)["image"])
        return {**batch, "image": image, "label": label}

    def logits(objective: Any, batch: Mapping[str, Any]) -> Tensor:
        return objective.logits(batch["image"])

    count = len(objective.rotations)
    return confusion_matrix(task.run, objective, task.held_out, count, cast(Transform, copied), logits=logits)


def _check_exact(run: Run) -> None:
    """Four turns are none, and the copies are those of ``torch.rot90``: largest difference, which must be 0."""
    images = torch.rand(4, 3, 33, 33, generator=run.generator("exact"))
    four, copies = images, rotate_all(images).unflatten(0, (4, 4))
    for _ in range(4):
        four = rotate(four, 90)
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], 1)
    run.metric("four_turns_error", max(float((four - images).abs().max()), float((copies - turned).abs().max())))


def _source(config: Config) -> str:
    if config.data != "auto":
        return config.data
    cifar10 = local("cifar10/test.parquet")
    return f"parquet:{cifar10}" if cifar10 else f"digits:{config.size or 32}"


def _head(config: Config, classes: int, level: Tensor) -> nn.Module:
    average, conv4 = config.pool == "mean", config.layer == 3
    return heads.rotnet_head(config.head, level, classes, grid=config.grid, average=average, conv=conv4)


def _probes(config: Config, task: PretrainingTask, layer: int, networks: Mapping[str, nn.Module]) -> dict[str, float]:
    """Accuracies of probes on networks, by name, recorded as metrics on the way."""
    run, found = task.run, dict[str, float]()
    reported = published("rotnet") if config.head == "conv" else {}
    augmented = _augmented(config, task)
    for number in config.labels:
        few = task.first_per_class(number, config.wrap)
        count = f"{number}_per_class" if number else "all_labels"
        for suffix, network in networks.items():
            run.seed_everything("head", number)  # all probes start alike
            phase, head = f"probe_{count}{suffix}", functools.partial(_head, config, task.num_classes)
            change = augmented if config.augment else None
            found[phase] = task.probe(phase, Level(network, layer), head, few, config.probe, change)
            run.metric(phase, found[phase], published=reported.get(phase))
        run.metric(f"gain_{count}", found[f"probe_{count}"] - found[f"probe_{count}_untrained"])
        if config.scratch:
            run.seed_everything("network")
            whole = _network(config, task, task.num_classes)
            whole = task.finetune(f"scratch_{count}", whole, few, config.probe, augmented)
            found[f"scratch_{count}"] = task.accuracy(whole)
            run.metric(f"scratch_{count}", found[f"scratch_{count}"])
    return found


def _draw(task: PretrainingTask, objective: Rotation, untrained: nn.Module, confusion: Tensor) -> None:
    run, dataset = task.run, task.held_out
    images = example_batch(dataset, spaced(len(dataset), 6), task.inputs.transform())["image"]
    copies, target = objective.copies(images)
    with torch.no_grad():
        predicted = objective.logits(run.fabric.to_device(copies)).argmax(1).cpu()
    names = [f"{degrees}°" for degrees in objective.rotations]
    right = (predicted == target).tolist()
    pictures = figures.captioned(copies, [names[i] for i in predicted], right, columns=len(names))
    run.figure("rotations", pictures, "Held-out images in every rotation, and what is predicted; red is wrong.")
    filters = figures.first_filters({"untrained": untrained, "trained on rotations": objective.encoder})
    if filters is not None:
        run.figure("filters", filters, "Filters of the first convolution, before and after.")
    run.figure("confusion", figures.confusion_matrix(confusion, names), "How often each rotation is taken for which.")
