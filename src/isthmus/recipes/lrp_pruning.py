"""Pruning by explaining (Yeom et al., arXiv 1912.08881): cut the filters through which least of the answer flows.

The paper's claim: layer-wise relevance, summed over a few reference samples, says better than weights, gradients or
Taylor expansions which filters a network can do without, above all where few samples are at hand and nothing can be
fine-tuned afterwards; a relevance pass costs about one gradient pass.

What is measured here, on moons, circles and a spiral: a network of three hidden layers, the last without an activation
as in the released code, trained with plain SGD, loses a third of its units in one shot, ranked on 1, 5 and 20
references a class, five draws each. Relevance is compared with the best of three ways to drop Taylor's signs. The
claim depends on the setting: after Adam both relevance and Taylor are said to fall below chance cuts (not tried here),
and in a pilot with an activation everywhere one reference a class brought no gain. No win over weights or chance is
claimed: weight magnitude needs no references and wins at this scale, and cutting at random does better than relevance
on one and on five references a class. Then a convolutional network is trained on digits and cut in steps by every
criterion; there Taylor keeps more accuracy than relevance.

``isthmus run lrp-pruning --model timm:NAME --checkpoint FILE --data SOURCE --keep 0.5`` prunes a network that a person
has; ``--finetune`` trains it a little after every step. ``isthmus.load(RUN).model`` is the pruned network, and
``isthmus apply`` classifies with it and shows why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, above, at_most, below, one_of
from isthmus.codec import UserError, create_timm
from isthmus.compression import Compressed
from isthmus.compression.filter_scores import Criterion, layers_of
from isthmus.compression.relevance_pruning import prune
from isthmus.compression.reshaping import Reshaped, shapes_of
from isthmus.data import Dataset, class_names, load
from isthmus.data.inputs import Inputs
from isthmus.data.subsets import subset
from isthmus.encoders.trained import num_outputs, trained
from isthmus.engine import Run, Training
from isthmus.lenses.relevance import COMPOSITES, relevance
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks import classification, plane_pruning
from isthmus.tasks.applying import Answer, Item
from isthmus.tasks.classification import Augmentation, ClassificationConfig, ClassificationTask

needs = ("image?", "signal?", "label")

#: How pictures of 32 pixels are changed in training where nothing else is asked for.
CIFAR = Augmentation(padding=4, flip=True)


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about a minute and a half on one core."""

    data: str = "planar"
    """The three sets of the plane and then digits; or pictures with labels, such as folder:PATH."""
    model: str = ""
    """timm:NAME of the network that is pruned; cifar_resnet20 without it."""
    checkpoint: str = ""
    """Its trained weights; it is trained on the data without them."""
    pretrained: bool = False
    """Start training from timm's weights."""
    keep: Annotated[float, above(0), below(1)] = 0.5
    """Share of the filters that stays in the end."""
    step: Annotated[float, above(0), at_most(1)] = 0.1
    """Share of the original filters that goes at a time."""
    criterion: str = "relevance"
    """What the kept network is pruned by: relevance, taylor, gradient, weight or random."""
    others: tuple[str, ...] = ("taylor", "gradient", "weight", "random")
    """Criteria to compare with at the same rates."""
    composite: Annotated[str, one_of(COMPOSITES)] = "zplus"
    """Rules of relevance: zplus, z, resnet, box, epsilon, alphabeta, alpha2beta1 or simple."""
    floor: Natural = 1
    """Filters that every layer keeps."""
    equal: bool = False
    """Take the same share from every layer instead of one ranking."""
    layers: Annotated[str, one_of(("auto", "conv", "linear", "all"))] = "auto"
    """Which layers are pruned: conv, linear, all, or auto: of the built-in network those inside its blocks, of yours
    convolutions where there are several, else linear layers."""
    references: Count = 10
    """Reference samples a class."""
    finetune: bool = False
    """Train after every step."""
    size: Natural = 0
    """Side of what the network sees; 0 is what it is made for, or the data's own where it is trained here."""
    test_images: Natural = 500
    """Images to measure on; 0 is all."""
    training: Training = Training(epochs=8, batch_size=64, optimizer="sgd", lr=0.1, weight_decay=5e-4)
    """Training of the network where there is no checkpoint."""
    finetuning: Training = Training(epochs=1, batch_size=64, optimizer="sgd", lr=0.01, weight_decay=5e-4)
    """Training after every step."""
    width: Count = 256
    """Units of a hidden layer of the networks of the plane."""
    last_activation: bool = False
    """An activation after their third hidden layer; the released ones have none there."""
    plane_composite: Annotated[str, one_of(COMPOSITES)] = "z"
    """Rules of relevance there: z is the released form of z+, which takes weights above zero alone."""
    shots: tuple[Count, ...] = (1, 5, 20)
    """Reference samples a class in the plane."""
    draws: Count = 5
    """Draws of them."""
    plane: Training = Training(steps=1000, batch_size=400, optimizer="momentum", lr=0.02, schedule="constant")
    """Training of the networks of the plane, on all points at once."""

    @classmethod
    def paper(cls) -> Config:
        """CIFAR-10 and a ResNet as the released code trains it; a twentieth of the filters goes, ten epochs follow."""
        sgd = Training(
            epochs=100,
            batch_size=100,
            optimizer="sgd",
            lr=0.1,
            weight_decay=5e-4,
            schedule="multistep",
            milestones=(30, 60, 90),
        )
        return cls(
            data="hub:uoft-cs/cifar10?image=img",
            model="timm:resnet50_cifar",
            keep=0.1,
            step=0.05,
            composite="resnet",
            finetune=True,
            size=32,
            test_images=0,
            augmentation=CIFAR,
            training=sgd,
            finetuning=replace(sgd, epochs=10, lr=0.01, schedule="cosine", milestones=()),
        )


def check(config: Config) -> None:
    """Refuse what cannot be pruned, or is no share."""
    if config.checkpoint and not config.model:
        raise UserError("a checkpoint needs the name of its network: give --model timm:NAME too.")
    if ":" in config.model and not config.model.startswith("timm:"):
        raise UserError(f"--model takes timm:NAME, got {config.model!r}.")
    if config.model and config.data.startswith("planar"):
        raise UserError("--model prunes a network for pictures: give pictures with --data, such as folder:PATH.")
    if config.data.startswith("planar") and config.data != "planar":
        raise UserError(f"--data planar runs all three sets of the plane; leave out the rest of {config.data!r}.")
    if not config.shots:
        raise UserError("--shots names no number of references a class; give at least one.")
    for name in (config.criterion, *config.others):
        Criterion(name, composite=config.composite)  # type: ignore[arg-type]


def run(config: Config, run: Run) -> None:
    """The plane, where it was asked for, and then a network for pictures."""
    if config.data == "planar":
        networks = (config.plane, config.width, config.last_activation)
        plane_pruning.compare(run, *networks, config.plane_composite, 1 / 3, config.shots, config.draws)
        config = replace(config, data="digits")
    _pictures(config, run)


def answer(kept: Saved, item: Item) -> Answer:
    """The class of a picture by the pruned network, and which of its places spoke for it."""
    network: Any = kept.model
    found = relevance(network.network, item.input, composite=kept.facts["composite"], strict=False)
    facts = classification.likeliest(kept, found.logits[0])
    figure = found.figure()
    figure.suptitle(f"{facts['class']} ({facts['probability'][facts['class']]:.0%})", fontsize=11, parse_math=False)
    return Answer(facts, figure)


# ------------------------------------------------------------------------------------------------------------ pictures


def _pictures(config: Config, run: Run) -> None:
    """Train or load, prune by every criterion in steps, measure each network on the way, keep one."""
    source = load(config.data, config.train_split, classification.NEEDS, run.seed)
    test = load(config.data, config.eval_split, classification.NEEDS, run.seed)
    test = subset(test, config.test_images, 0) if 0 < config.test_images < len(test) else test
    network, size = _network(config, run, source, class_names(source, test))
    if config.augmentation == Augmentation() and config.data != "digits" and size == 32:
        config = replace(config, augmentation=CIFAR)
    task = ClassificationTask(config, run, source, test, Inputs.of(network, (size, size)))
    if not config.checkpoint:
        network = task.train("network", network).model
    network.to(run.fabric.device).eval()
    whole = task.measure(network)["accuracy"]
    run.metric("accuracy_whole", whole)
    run.log(f"{config.data}: accuracy {whole:.3f} with all filters.")

    images, labels = task.references(config.references)
    samples = list(zip(images.split(50), labels.split(50), strict=True))
    example = samples[0][0][:1]
    steps = run.cap(math.ceil((1 - config.keep) / config.step - 1e-9))
    keeps = [max(config.keep, round(1 - config.step * (i + 1), 6)) for i in range(steps)]
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys((config.criterion, *config.others)):
        lines[name] = [(1.0, whole)]
        criterion = Criterion(name, composite=config.composite)  # type: ignore[arg-type]
        way = prune(
            network,
            example,
            samples,
            keeps,
            criterion,
            config.step,
            config.floor,
            config.equal,
            layers=_layers(config, network),
            finetune=_finetuner(config, task, name),
            generator=run.generator("random scores"),
        )
        small = None
        for small in way:
            share = small.report["filters"]["after"] / small.report["filters"]["before"]
            lines[name].append((share, task.measure(small.model)["accuracy"]))
        run.metric(f"accuracy_{name}", lines[name][-1][1])
        run.log(f"{name}: accuracy {lines[name][-1][1]:.3f} with {lines[name][-1][0]:.0%} of the filters.")
        if name == config.criterion and small is not None:
            _record(run, small)
            pruned = Reshaped(small.model, shapes_of(small.model))
            task.keep(pruned, "the pruned network", "pruned", composite=config.composite)
            _show(run, config, network, small, samples)
    rest = [points[-1][1] for name, points in lines.items() if name != config.criterion]
    if rest:
        run.metric("gain_over_best_other", lines[config.criterion][-1][1] - max(rest))
    how = "fine-tuned" if config.finetune else "without fine-tuning"
    drawn = figures.lines(lines, "share of filters left", "accuracy")
    run.figure("pruning", drawn, f"Held-out accuracy while filters go, {how}.")


def _network(config: Config, run: Run, source: Dataset, classes: list[str]) -> tuple[nn.Module, int]:
    """The network, not trained yet where there is no checkpoint, and the side of its input."""
    name = config.model.removeprefix("timm:") or "cifar_resnet20"
    if config.checkpoint:
        network = trained(name, config.checkpoint, log=run.log)
    else:
        run.seed_everything("network")
        try:
            network = create_timm(name, pretrained=config.pretrained, num_classes=len(classes))
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"weights of {name} cannot be had ({reason}); give --checkpoint FILE.") from error
    own, wanted = min(source.natural_size()), Inputs.of(network).size
    made_for = min(wanted) if wanted and (config.checkpoint or config.pretrained) else own
    size = config.size or made_for
    found = num_outputs(network, name, size)
    if config.checkpoint and found != len(classes):
        raise UserError(f"{config.checkpoint} is for {found} classes, {config.data} has {len(classes)}.")
    return network, size


def _layers(config: Config, network: nn.Module) -> list[str]:
    """The layers that are pruned; the recorded figures of the built-in network leave its residual stream alone."""
    if config.layers == "auto" and not config.model:
        return [name for name in layers_of(network, "conv") if name.endswith(".conv1")]
    return layers_of(network, config.layers)


def _finetuner(config: Config, task: ClassificationTask, name: str) -> Callable[[nn.Module], None] | None:
    """Trains what is left after every step; ``None`` where that is off."""
    if not config.finetune:
        return None
    done: list[int] = []

    def finetune(network: nn.Module) -> None:
        done.append(1)
        phase = f"finetune_{name}_{len(done)}"
        tuned = task.train(phase, network, training=config.finetuning, transform=task.measured).model
        if tuned is not network:  # the moving average
            network.load_state_dict(tuned.state_dict())
        network.to(task.run.fabric.device).eval()

    return finetune


def _record(run: Run, small: Compressed) -> None:
    """How much smaller it is."""
    before, after = small.report["before"], small.report["after"]
    for what in ("parameters", "macs"):
        run.metric(f"{what}_before", before[what])
        run.metric(f"{what}_after", after[what])
        run.metric(f"{what}_left", after[what] / before[what])
    run.metric("filters_left", small.report["filters"]["after"] / small.report["filters"]["before"])
    for layer, why in list(small.report["excluded"].items())[:6]:
        run.log(f"Not pruned: {layer}: {why}.")


def _show(
    run: Run, config: Config, network: nn.Module, small: Compressed, samples: list[tuple[Tensor, Tensor]]
) -> None:
    """Where the answer comes from, before and after, and what is left of every layer."""
    x, label = samples[0]
    for name, model in (("before", network), ("after", small.model)):
        found = relevance(model, x[:6], label[:6], config.composite, strict=False)
        run.figure(f"relevance_{name}", found.figure(6), f"What spoke for the label, {name} pruning; red is for it.")
    kept = small.report["kept"]
    modules = dict(network.named_modules())
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    whole = [getattr(modules[name], "out_channels", getattr(modules[name], "out_features", 0)) for name in kept]
    axis.bar(np.arange(len(kept)), whole, color="0.85", label="before")
    axis.bar(np.arange(len(kept)), [len(index) for index in kept.values()], color="C0", label="after")
    if len(kept) <= 30:
        axis.set_xticks(np.arange(len(kept)), list(kept), rotation=90, fontsize=7)
    axis.set_ylabel("filters")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    run.figure("layers", figure, "Filters of the layers that lost some.")
