"""Large kernels: how far a network looks, and whether at shape or texture (Zhang, Ding, Yue, arXiv 2410.08049).

The paper's claims: a few very large depthwise kernels widen the effective receptive field more than a deep stack of
small ones does, and networks that have them go by shape rather than by texture.

What is measured here: UniRepLKNets that differ in kernels and depth alone are trained on the same drawn shapes, as long
as each other. Then the field of each is measured on larger pictures, in three scales, because the ranking depends on
the scale: the *raw* map weighs every gradient as it is, the *relative* one (logarithm over three decades) counts faint
influence from afar. And networks that saw shape and texture always together are asked about pictures on which the two
contradict each other.

What comes out: trained large kernels look about twice as wide as 3x3 ones, at equal depth and at twice the depth, on
the raw scale; on the relative scale by a quarter, and from seed to seed that may turn round, because squeeze-and-excite
and response normalisation pool over the whole picture and give all three networks faint influence from everywhere. The
two claims on what that is good for do not hold here. Accuracy is equal on average, but spreads by three points over
seeds, more than the one point allowed. And at 32 pixels shape is the easier cue: networks of either kind that have
learnt the agreeing pictures go by it in 99 % of the contradicting ones, which leaves nothing to gain.

The verdict is over seeds 3 to 5. One over seeds 0 to 2 was set aside, because its networks had learnt only 60 to
80 % of the agreeing pictures, which makes the question about contradicting ones empty; the bars stayed. There too the
shape bias did not hold (-0.06), and of the others accuracy did (-0.009) and the relative field did not (0.97).

    isthmus run large-kernels --weights pretrained --networks resnet50 convnext_tiny --field-data folder:PICTURES \
        --field-size 1024                                     # the fields of published networks on your own pictures

    from isthmus.lenses.receptive_field import receptive_field
    field = receptive_field(model, images)                    # (N, 3, H, W), as the model wants them
    print(field.area_ratio(), field.rms_radius); field.figure()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from isthmus import saved
from isthmus.bounds import Count, Natural, Share, at_least
from isthmus.catalog import published
from isthmus.codec import UserError, create_timm, write_atomically
from isthmus.data import evaluation_batches, load
from isthmus.data.dataset import Unreadable
from isthmus.data.inputs import Inputs
from isthmus.data.readers.decoding import decode_image
from isthmus.encoders.backbone import made_for
from isthmus.encoders.images.unireplknet import UniRepLKNet
from isthmus.engine import Run, Training, read_config
from isthmus.engine.comparison import check_arms, count_parameters
from isthmus.lenses.receptive_field import Scale, receptive_field
from isthmus.tasks import applying, classification, receptive_fields
from isthmus.tasks.classification import Augmentation, ClassificationConfig, ClassificationTask
from isthmus.tasks.shape_bias import ask_for_cues

needs = classification.NEEDS

#: Kernels of every block, stage by stage.
SMALL_NETWORKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "large": ((3,), (13,), (13, 13), (7,)),
    "twin": ((3,), (3,), (3, 3), (3,)),
    "deep": ((3,) * 2, (3,) * 2, (3,) * 4, (3,) * 2),
}


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """Settings of a run; the defaults take about two minutes on one core."""

    data: str = "scenes:32?space=easy&count=1800"
    """Labelled images; any source will do."""
    networks: tuple[str, ...] = ("large", "twin", "deep")
    """Networks to compare: large, twin (the same depth, all kernels 3x3) and deep (twice the depth, all 3x3) are small
    UniRepLKNets, replknet_13b is RepLKNet-31B with 13x13 kernels, and any name of timm will do."""
    weights: Literal["train", "pretrained", "random"] = "train"
    """Train the networks, or measure them as they are, with timm's published weights or with none."""
    size: Count = 32
    """Pixels a side of what the networks are trained on."""
    widths: tuple[Count, ...] = (16, 32, 48, 64)
    """Channels of the stages of the small networks."""
    layer_scale: float = 0.1
    """Weight of every block of the small networks at the start."""
    drop_path: Share = 0.0
    """Stochastic depth."""
    training: Training = Training(epochs=20, batch_size=64, lr=4e-3, weight_decay=0.05, warmup_epochs=1)
    """Training of every network."""
    field_data: str = "scenes:256?space=easy&count=8"
    """Pictures to measure the field on; they should be much larger than the field."""
    field_size: Annotated[int, at_least(32)] = 256
    """Pixels a side that they are resized to, whatever their shape."""
    field_images: Count = 8
    """How many of them."""
    cue_images: Natural = 1800
    """Training pictures whose shape and texture always agree, for the first two networks; 0 leaves that out."""
    cue_training: Training = Training(epochs=20, batch_size=64, lr=4e-3, weight_decay=0.05, warmup_epochs=1)
    """Training on them."""
    test_images: Natural = 1000
    """Held-out images to measure on; 0 is all."""
    eval_split: str = "test"
    """Part of the data to measure on, the field included."""

    @classmethod
    def paper(cls) -> Config:
        """RepLKNet-31B, with 13x13 kernels, and two ResNets: 120 epochs of ImageNet-1k, fields at 1024 pixels.

        RandAugment and random erasing of the published recipe are left out.
        """
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            networks=("replknet_31b", "replknet_13b", "resnet101", "resnet152"),
            size=224,
            drop_path=0.5,
            training=Training(
                epochs=120, batch_size=2048, lr=4e-3, weight_decay=0.05, warmup_epochs=10, accumulate=8, workers=8
            ),
            augmentation=Augmentation(crop=0.08, flip=True, mixup=0.8, cutmix=1.0),
            smoothing=0.1,
            field_data="hub:ILSVRC/imagenet-1k",
            field_size=1024,
            field_images=50,
            cue_images=0,
            test_images=0,
            eval_split="val",
        )


def check(config: Config) -> None:
    """Refuse networks that cannot be built."""
    if not config.networks or len(set(config.networks)) < len(config.networks):
        raise UserError(f"networks must be different names, at least one, got {config.networks}.")
    untrained = replace(config, weights="random")
    check_arms({name: partial(make_network, untrained, name, 2) for name in config.networks})


def run(config: Config, run: Run) -> None:
    """Train every network, measure its field, and ask what it goes by."""
    source = load(config.field_data, config.eval_split, ("image",), run.seed).first(config.field_images)
    pictures = receptive_fields.pictures(source, _inputs(config), config.field_size)
    if config.weights != "train":
        networks = {}
        for name in config.networks:
            run.seed_everything("network")
            networks[name] = make_network(config, name)
            run.metric(f"parameters_{name}", count_parameters(networks[name]), unit="parameters")
        _fields(run, config, networks, pictures)
        return
    task = classification.open(config, run, _inputs(config))
    arms = task.compare({name: partial(make_network, config, name) for name in config.networks})
    _fields(run, config, {name: arm.model for name, arm in arms.arms.items()}, pictures)
    accuracies = arms.values("accuracy")
    rivals = [accuracies[name] for name in ("twin", "deep") if name in accuracies]
    if "large" in accuracies and rivals:
        run.metric("accuracy_over_small_kernels", accuracies["large"] - max(rivals))
    grey = next(iter(config.networks[1:]), " ")
    arms.bars("accuracy", "Accuracy on held-out images.", grey, "accuracies")
    task.show(arms.first.model)
    task.keep(arms.first.model, f"the network {arms.first.name}", field_size=config.field_size)
    _check_merge(run, arms.first.model, task)
    if config.cue_images:
        makers: dict[str, Callable[[int], nn.Module]] = {
            name: partial(make_network, config, name) for name in config.networks[:2]
        }
        counts = config.cue_images, config.test_images or 1000
        biases = ask_for_cues(run, makers, config.cue_training, config.size, counts, config.smoothing)
        if {"large", "twin"} <= biases.keys():
            run.metric("shape_bias_gain", biases["large"] - biases["twin"])


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Classify pictures with the first of the trained networks, and measure its field, the mean over all of them.

    Beside the answers there are ``field.json`` (sides and areas of the squares that hold given shares of the field, in
    the three scales) and ``field.png``.
    """
    if read_config(run_dir)["config"]["weights"] != "train":
        raise UserError(f"{run_dir} measured networks as they were and trained none; run with --weights train.")
    kept = saved.load(run_dir)
    written = applying.apply(kept, inputs, out, classification.answer)
    size = int(kept.facts["field_size"])
    transform, pictures = receptive_fields.transform(kept.inputs, size), []
    for path in inputs:
        try:
            image = decode_image(path)
        except Unreadable:
            continue  # the answers say so
        pictures.append(transform({"image": image[None].float() / 255}, torch.Generator())["image"][0])
    field = receptive_field(receptive_fields.sized(kept.model.cpu(), size), pictures)
    facts = {"pixels": size, **receptive_fields.facts(field)}
    write_atomically(out / "field.json", (json.dumps(facts, indent=1) + "\n").encode())
    write_atomically(out / "field.png", applying.png(field.figure()))
    return [*written, out / "field.json", out / "field.png"]


# ------------------------------------------------------------------------------------------------------------ networks


def make_network(config: Config, name: str, num_classes: int = 0) -> nn.Module:
    """One of the networks that ``Config.networks`` names."""
    if name in SMALL_NETWORKS:
        kernels = SMALL_NETWORKS[name]
        return UniRepLKNet(
            [len(stage) for stage in kernels],
            config.widths,
            kernels,
            num_classes=num_classes,
            drop_path_rate=config.drop_path,
            layer_scale=config.layer_scale,
        )
    arguments: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    if config.weights == "train":
        arguments["num_classes"] = num_classes
    if config.weights == "pretrained":
        arguments["pretrained"] = True
    if name == "replknet_13b":
        name, arguments = "replknet_31b", {**arguments, "large_kernel_sizes": (13, 13, 13, 13)}
    return create_timm(name, **arguments, **made_for(name, config.size))


def _inputs(config: Config) -> Inputs:
    """What the networks are fed: what the first of them was made for."""
    with torch.device("meta"):
        network = make_network(replace(config, weights="random"), config.networks[0])
    return Inputs.of(network, (config.size, config.size))


def _check_merge(run: Run, network: nn.Module, task: ClassificationTask) -> None:
    """Merge the branches of the kept network, which is on the disk already, and say how far its logits move."""
    if not hasattr(network, "reparameterize"):
        return
    batch = next(evaluation_batches(task.held_out, min(256, len(task.held_out)), transform=task.measured))
    x = run.fabric.to_device(batch["image"])
    with torch.no_grad():
        before = network.eval()(x)
        network.reparameterize()  # type: ignore[operator]
        run.metric("merge_gap", float((network(x) - before).abs().max() / before.abs().max()))


# ---------------------------------------------------------------------------------------------------- receptive fields


def _fields(run: Run, config: Config, networks: Mapping[str, nn.Module], pictures: Sequence[Tensor]) -> None:
    """The field of every network, and what the claims are about, as far as the small networks are among them."""
    reported = published("large-kernels") if config.field_size == 1024 else {}  # of 50 ImageNet validation images
    fields = receptive_fields.measure(run, networks, pictures, config.field_size, reported)
    receptive_fields.draw(run, fields)
    measures: tuple[tuple[Scale, float], ...] = (("raw", 0.5), ("relative", 0.2))
    for other in ("twin", "deep") if "large" in fields else ():
        for scale, threshold in measures if other in fields else ():
            large, small = (float(fields[n].area_ratio((threshold,), scale).ratio) for n in ("large", other))
            if min(large, small) > 0:  # else it looks beyond the picture
                run.metric(f"{scale}_area_over_{other}", large / small)
