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
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from isthmus.catalog import published
from isthmus.codec import UserError, create_timm, load_weights, save_weights
from isthmus.data import Dataset, evaluation_batches, example_batch, load
from isthmus.data.dataset import Unreadable
from isthmus.data.hashing import below, words
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.readers.local import local
from isthmus.data.splits import spaced
from isthmus.data.transforms import CenterCrop, Compose, Flip, Normalize, RandomCrop, Resize, Transform
from isthmus.decoders.probes import AlexNetProbe, ConvProbe, NonLinearProbe, PooledProbe
from isthmus.engine import Run, Training, read_config
from isthmus.engine.fit import fit
from isthmus.engine.probing import Level, accuracy, first_per_class, probe
from isthmus.layers.random import derive_seed
from isthmus.objectives.classification import Classification
from isthmus.objectives.rotation import Rotation, rotate, rotate_all
from isthmus.report import figures

needs = ("image", "label?")
ENCODER = "encoder.safetensors"


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on two cores."""

    data: str = "auto"
    """Images with an upright orientation: auto is CIFAR-10 where it is at hand, else digits:32; any source will do."""
    encoder: str = "nin_cifar_tiny"
    """The network, ours or any of timm: nin_cifar_tiny, nin_cifar, rotnet_alexnet, resnet18, …"""
    size: int | None = None
    """Pixels a side of what the network sees; without it those of the images, but no more than it was made for."""
    resize: int | None = None
    """Shorter side before the crop; that of the crop without it."""
    padding: int = 0
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
    grid: int = 4
    """Cells a side that the linear probe pools the map to."""
    pool: Literal["mean", "max"] = "mean"
    """How it pools; the paper's ImageNet probes take the maximum on grids of 12, 7, 5, 6 and 6 for AlexNet's layers."""
    labels: tuple[int, ...] = (200, 40)
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


def run(config: Config, run: Run) -> None:
    """Pre-train, measure, probe, draw."""
    source = _source(config)
    run.seed_everything("network")
    network = create_timm(config.encoder, num_classes=len(config.rotations))  # first: a wrong name is told at once
    train, held_out = _images(run, config, source)
    config = dataclasses.replace(config, size=config.size or _natural_size(train, network))
    _set_size(network, config)
    untrained = copy.deepcopy(network)
    augmented, plain = _transforms(config, network)
    run.log(f"{source}: {len(train)} images to train on, {len(held_out)} held out, {config.size} pixels a side.")
    _check_exact(run)

    objective = _objective(network, config)
    fitted = fit(run, "pretrain", objective, train, config.pretrain, augmented)
    objective = cast(Rotation, fitted.ema or fitted.objective)
    network = objective.encoder
    confusion = _confusion(run, objective, held_out, plain)
    accuracy = float(confusion.diagonal().sum() / confusion.sum())
    chance = 1 / len(config.rotations)
    run.metric("rotation_accuracy", accuracy, published=published("rotnet").get("rotation_accuracy"))
    if run.is_first:
        save_weights(network, run.dir / ENCODER, {"timm": config.encoder, "size": str(config.size)})
    arguments = f"num_classes={len(config.rotations)}, checkpoint_path={str(run.dir / ENCODER)!r}"
    text = f"import isthmus.encoders; timm.create_model({config.encoder!r}, {arguments})"
    run.artifact("encoder", run.dir / ENCODER, f"the network with its rotation classifier: {text}")

    if config.control:
        control = _objective(copy.deepcopy(untrained), config)
        turn = Turned(derive_seed(run.seed, "turned"), config.rotations)
        fit(run, "control", control, train, config.pretrain, _transforms(config, network, turn)[0])
        found = _confusion(run, control, held_out, _transforms(config, network, turn)[1])
        turned_accuracy = float(found.diagonal().sum() / found.sum())
        run.metric("control_accuracy", turned_accuracy)
        run.metric("control_distance", abs(turned_accuracy - chance))

    _draw(run, objective, held_out, plain, untrained, confusion)
    probes = _probes(run, config, source, train, held_out, {"": network, "_untrained": untrained})
    if probes:
        run.figure("probes", figures.bars(probes), "Accuracy on frozen features, the same network untrained in grey.")
    skipped = dict(train.skipped + held_out.skipped)
    if skipped:
        named = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:10])
        run.note(f"{len(skipped)} images could not be read and were left out: {named}{' …' * (len(skipped) > 10)}")


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Tell how photographs were rotated, and turn them upright.

    Args:
        run_dir: a finished run.
        inputs: image files; others are left out.
        out: gets ``orientation.json`` (probabilities of every rotation, and the turn that undoes the likeliest) and
            ``NAME-upright.png`` for every photograph.

    Raises:
        UserError: no input is an image, or the run is incomplete.
    """
    config = _restored(run_dir)
    network = _network(config, len(config.rotations))
    load_weights(network, run_dir / ENCODER)
    objective = _objective(network, config).eval()
    _, plain = _transforms(config, network)
    found: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "orientation.json"]
    for path in inputs:
        try:
            image = decode_image(path)
        except Unreadable as error:
            found[str(path)] = {"skipped": str(error)}
            continue
        batch = plain({"image": image[None].float() / 255, "index": torch.tensor([0])}, torch.Generator())
        probability = objective.tell(batch["image"])[0]
        degrees = config.rotations[int(probability.argmax())]
        named = {str(d): round(float(p), 4) for d, p in zip(config.rotations, probability, strict=True)}
        target = out / f"{path.stem}-upright.png"
        if target in written:  # another folder's picture of the same name
            target = out / f"{path.stem}-{len(written)}-upright.png"
        to_pil_image(rotate(image, -degrees)).save(target)
        written.append(target)
        found[str(path)] = {
            "rotated_by": degrees,  # counter-clockwise
            "probability": named,
            "turn_clockwise": degrees % 360,
            "upright": target.name,
        }
    if len(written) == 1:
        told = "; ".join(f"{path}: {entry['skipped']}" for path, entry in found.items())
        raise UserError(f"none of the inputs is an image ({told}); known are {', '.join(IMAGE_SUFFIXES)}.")
    written[0].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return written


# ------------------------------------------------------------------------------------------------------------- parts


class Turned(Transform):
    """The control: every image in a rotation of its own that is the same whenever it comes up."""

    def __init__(self, seed: int, rotations: Sequence[int]) -> None:
        self.seed, self.rotations = seed, tuple(rotations)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Square images ``(B, C, S, S)``, turned by what their ``index`` says."""
        draws = words(self.seed, batch["index"].cpu().numpy(), 1)[:, 0]
        which = torch.from_numpy(below(draws, len(self.rotations)))
        copies = rotate_all(batch["image"], self.rotations).unflatten(0, (-1, len(self.rotations)))
        return {**batch, "image": copies[torch.arange(len(which)), which]}


def _objective(network: nn.Module, config: Config) -> Rotation:
    """The network ends in its own classifier of rotations, as the paper's do."""
    return Rotation(network, nn.Identity(), config.rotations, circle=config.circle)


def _network(config: Config, classes: int) -> nn.Module:
    network = create_timm(config.encoder, num_classes=classes)
    _set_size(network, config)
    return network


def _set_size(network: nn.Module, config: Config) -> None:
    if hasattr(network, "set_input_size"):  # transformers have positions for one size
        network.set_input_size(img_size=(config.size, config.size))  # type: ignore[operator]


def _natural_size(dataset: Dataset, network: nn.Module) -> int:
    """The images' shorter side, or what the network was made for; a multiple of 32 from 32 on."""
    stats: Any = network.pretrained_cfg
    side = min(*(dataset.image_size or dataset[0]["image"].shape[-2:]), stats["input_size"][-1])
    return side // 32 * 32 if side >= 32 else side


def _images(run: Run, config: Config, source: str) -> tuple[Dataset, Dataset]:
    """What to train and to measure on."""
    train, held_out = (load(source, split, needs, run.seed) for split in (config.train_split, config.eval_split))
    if not hasattr(train, "__len__"):
        raise UserError(f"{source} is a stream, of which no part can be held out; use folder:, parquet: or hub: here.")
    if not len(held_out):
        raise UserError(f"{source} holds nothing out to measure on; give more images, or --eval-split train.")
    if run.options.max_steps is not None and len(held_out) > 256:  # a try-out is not to measure for minutes
        held_out = held_out.select(range(256))
    return train, held_out


def _transforms(config: Config, network: nn.Module, turned: Turned | None = None) -> tuple[Transform, Transform]:
    """For training and for measuring; rotation comes after either, in the objective."""
    stats: Any = network.pretrained_cfg
    assert config.size is not None
    resize, normalize = Resize(config.resize or config.size), Normalize(stats["mean"], stats["std"])
    control = [turned] if turned else []
    flip = [Flip()] if config.flip else []
    train = [resize, RandomCrop(config.size, config.padding), *control, *flip, normalize]
    return Compose(train), Compose([resize, CenterCrop(config.size), *control, normalize])


def _source(config: Config) -> str:
    if config.data != "auto":
        return config.data
    cifar10 = local("cifar10/test.parquet")
    return f"parquet:{cifar10}" if cifar10 else f"digits:{config.size or 32}"


def _restored(run_dir: Path) -> Config:
    """The settings that ``apply`` needs."""
    saved = read_config(run_dir)["config"]
    try:
        with safe_open(str(run_dir / ENCODER), "pt") as file:
            size = int(file.metadata()["size"])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{run_dir} holds no readable {ENCODER}; finish the run first, or run it anew.") from error
    kept = {key: saved[key] for key in ("encoder", "resize", "circle")}
    return Config(**kept, size=size, rotations=tuple(saved["rotations"]))


# --------------------------------------------------------------------------------------------------------- measuring


def _check_exact(run: Run) -> None:
    """Four turns are none, and the copies are those of ``torch.rot90``: largest difference, which must be 0."""
    images = torch.rand(4, 3, 33, 33, generator=run.generator("exact"))
    four, copies = images, rotate_all(images).unflatten(0, (4, 4))
    for _ in range(4):
        four = rotate(four, 90)
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], 1)
    run.metric("four_turns_error", max(float((four - images).abs().max()), float((copies - turned).abs().max())))


def _confusion(run: Run, objective: Rotation, dataset: Dataset, transform: Transform) -> Tensor:
    """``(K, K)`` counts: rows are the true rotations, columns what was told, on all copies of all images."""
    count = len(objective.rotations)
    table = torch.zeros(count, count, dtype=torch.int64)
    objective.eval()
    for batch in evaluation_batches(dataset, 256, transform=transform):
        with torch.no_grad():
            copies, target = objective.copies(run.fabric.to_device(batch["image"]))
            told = objective.logits(copies).argmax(1)
        table += torch.bincount(target * count + told, minlength=count**2).view(count, count).cpu()
    return table


def _probes(
    run: Run, config: Config, source: str, train: Dataset, held_out: Dataset, networks: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Accuracies of probes on networks, by name, recorded as metrics on the way; empty where there are no labels."""
    if "label" not in train.columns or "label" not in held_out.columns:
        run.note(f"{source} has no labels, so there is no probe.")
        return {}
    labels, others = (_labels(source, split, run) for split in (config.train_split, config.eval_split))
    classes = 1 + int(max(labels.max(), others.max()))
    augmented, plain = _transforms(config, next(iter(networks.values())))
    reported = published("rotnet") if config.head == "conv" else {}
    found: dict[str, float] = {}
    for number in config.labels:
        chosen = first_per_class(labels, number)
        few = train.select(np.resize(chosen, len(train)) if config.wrap else chosen)
        told = f"{number}_per_class" if number else "all_labels"
        for suffix, network in networks.items():
            run.seed_everything("head", number)  # all probes start alike
            phase, level = f"probe_{told}{suffix}", Level(network, _layer(config, network))
            head = functools.partial(_head, config, classes)
            probed = probe(run, phase, level, head, few, config.probe, plain, augmented if config.augment else None)
            found[phase] = accuracy(run, probed, held_out, plain)
            run.metric(phase, found[phase], published=reported.get(phase))
        run.metric(f"gain_{told}", found[f"probe_{told}"] - found[f"probe_{told}_untrained"])
        if config.scratch:
            run.seed_everything("network")
            whole = Classification(_network(config, classes))
            fit(run, f"scratch_{told}", whole, few, config.probe, augmented)
            found[f"scratch_{told}"] = accuracy(run, whole, held_out, plain)
            run.metric(f"scratch_{told}", found[f"scratch_{told}"])
    return found


def _head(config: Config, classes: int, level: Tensor) -> nn.Module:
    channels = level.shape[1]
    if config.head == "conv":
        return ConvProbe(channels, classes)
    if config.head == "nonlinear":
        return NonLinearProbe(level[0].numel(), classes)
    if config.head == "alexnet":
        return AlexNetProbe(channels, classes, side=level.shape[-1], conv=config.layer == 3)  # conv4
    return PooledProbe(channels, classes, config.grid, average=config.pool == "mean")


def _labels(source: str, split: str, run: Run) -> np.ndarray:
    """Every label of a split, in order; images are not decoded for it."""
    batches = evaluation_batches(load(source, split, ("label",), seed=run.seed), 4096)
    return torch.cat([batch["label"] for batch in batches]).numpy()


def _layer(config: Config, network: nn.Module) -> int:
    """Index of the probed level."""
    info: Any = getattr(network, "feature_info", None)
    levels = list(info.info if hasattr(info, "info") else info or [])
    if not levels or not hasattr(network, "forward_intermediates"):
        raise UserError(f"{config.encoder} does not hand out its middle layers; choose another timm network.")
    ours = next((i for i, level in enumerate(levels) if level.get("stage") == "conv2"), max(0, len(levels) - 2))
    index = ours if config.layer is None else config.layer
    if not -len(levels) <= index < len(levels):
        raise UserError(f"{config.encoder} has {len(levels)} levels; --layer is from 0 to {len(levels) - 1}.")
    return index % len(levels)


# ----------------------------------------------------------------------------------------------------------- pictures


def _draw(
    run: Run, objective: Rotation, dataset: Dataset, transform: Transform, untrained: nn.Module, confusion: Tensor
) -> None:
    images = example_batch(dataset, spaced(len(dataset), 6), transform)["image"]
    copies, target = objective.copies(images)
    with torch.no_grad():
        told = objective.logits(run.fabric.to_device(copies)).argmax(1).cpu()
    names = [f"{degrees}°" for degrees in objective.rotations]
    pictures = figures.captioned(copies, [names[i] for i in told], (told == target).tolist(), columns=len(names))
    run.figure("rotations", pictures, "Held-out images in every rotation, and what the network says; red is wrong.")
    filters = figures.first_filters({"untrained": untrained, "trained on rotations": objective.encoder})
    if filters is not None:
        run.figure("filters", filters, "Filters of the first convolution, before and after.")
    run.figure("confusion", figures.confusion_matrix(confusion, names), "How often each rotation is taken for which.")
