"""FFNet: segmentation without dilation, attention or branches (Mehta et al., arXiv 2206.08236).

The paper's claim: a plain residual network of basic blocks with a tiny up-head segments as well as what is built with
far more fuss; baselines looked bad because bottleneck blocks, with one 3×3 convolution each, do not see far enough.

What is measured here: the effective receptive field of networks of basic and of bottleneck blocks of one layout; the
same two as segmenters, trained alike on pictures where discs can only be told apart by a cue in a far corner; and an
FFNet trained on drawn scenes, or with ``--data`` on a person's own pictures and masks (``--encoder`` takes any timm
name), which ``isthmus apply`` then uses on pictures of any size. ``released("ffnet86S_BBB_mobile")`` builds any of the
87 published networks.

What comes out: basic blocks see 1.37 times as far, as the paper says. On the far cues they lose by far (0.4 to 0.6):
with equal parameters the bottlenecks have four times as many channels, both kinds of network already see further than
the 60 pixels that are asked for, and within 400 steps only the wide one learns to bring the colour of the cue along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from isthmus.bounds import Count, one_of
from isthmus.catalog import published
from isthmus.codec import UserError, create_timm
from isthmus.data.builtin.cues import cue_scenes
from isthmus.decoders.ffnet_head import FFNetHead
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.encoders.images.ffnet import body_of
from isthmus.engine import Run, Training
from isthmus.lenses.receptive_field import field_of_noise, rms_radius
from isthmus.report import figures
from isthmus.tasks import dense
from isthmus.tasks.dense import DenseConfig, DenseTask

needs = dense.NEEDS
answer = dense.answer


@dataclass(frozen=True)
class Config(DenseConfig):
    """Settings of a run; the defaults take about two minutes on two cores."""

    encoder: str = ""
    """A timm name, ours included (ffnet86s); a small network of basic blocks without it."""
    branch: Annotated[str, one_of("ABC")] = "B"
    """Widths of the up-branch: A, B or C."""
    segmentation: Annotated[str, one_of("ABC")] = "B"
    """Widths of the last two layers: A, B or C."""
    mobile: bool = False
    """Resize by the nearest value, as the mobile variants do."""
    divisor: Count = 4
    """Every width of the head, and of the small network, over this."""
    field: bool = True
    """Measure receptive fields of basic and bottleneck blocks."""
    cues: bool = True
    """Train both on pictures with far cues."""
    cue_training: Training = Training(steps=400, batch_size=8, lr=3e-3, weight_decay=0.01, warmup_steps=20, clip=1.0)
    """Training of each."""

    @classmethod
    def paper(cls) -> Config:
        """FFNet-86S B-B-B on Cityscapes. The paper's own recipe was not to be had: these are the usual settings.

        The learning rate falls linearly where others take the power 0.9. ``--data parquet:CITYSCAPES`` with columns
        ``image`` and ``mask`` of 19 classes and 255 for the rest.
        """
        return cls(
            data="parquet:cityscapes",
            encoder="ffnet86s",
            divisor=1,
            size=(1024, 1024),
            smallest=0.25,
            classes=19,
            ignore=255,
            images=0,
            test_images=0,
            training=Training(
                epochs=480,
                batch_size=8,
                optimizer="sgd",
                lr=0.01,
                weight_decay=5e-4,
                schedule="linear",
                workers=8,
            ),
            field=False,
            cues=False,
        )


def check(config: Config) -> None:
    """Refuse what no run can do, before any of it is done."""
    if not config.encoder and config.divisor > 32:
        raise UserError(f"--divisor must be 1 to 32 for the small network, got {config.divisor}.")


def run(config: Config, run: Run) -> None:
    """Measure fields, train on cues, train the segmenter."""
    run.seed_everything("segmenter")
    encoder = _encoder(config)
    task = dense.open(config, run, encoder.model)
    channels = [level.channels for level in encoder.feature_info]
    head = FFNetHead(channels, task.outputs, config.branch, config.segmentation, config.mobile, config.divisor)
    _check_places(config, run, encoder.feature_info[-1].reduction)
    if config.field:
        _fields(run)
    if config.cues:
        _far_cues(task, config.cue_training)
    segmenter = task.train("segmenter", encoder, head)
    found = task.measure(segmenter)
    run.metric("miou", found.miou)
    run.metric("pixel_accuracy", found.pixel_accuracy)
    task.show(segmenter, found)
    task.keep(segmenter, "the segmenter; `isthmus apply` makes masks with it")


# ----------------------------------------------------------------------------------------------------------- the claims


def _pair(divisor: int) -> dict[str, nn.Module]:
    return {name: body_of(bottleneck, divisor) for name, bottleneck in (("basic", False), ("bottleneck", True))}


def _fields(run: Run, size: int = 417, tries: int = 4) -> None:
    """RMS radius of the gradient of the last map's centre with respect to noise, mean over untrained networks."""
    fields: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for trial in range(tries):
        run.seed_everything("field", trial)
        for name, body in _pair(8).items():
            counts[name] = sum(p.numel() for p in body.parameters())
            fields[name] = fields.get(name, torch.zeros(())) + field_of_noise(body, size, run.fabric.device) / tries
    radius = {name: rms_radius(field) for name, field in fields.items()}
    for name, value in radius.items():
        run.metric(f"field_radius_{name}", value, unit="px")
        run.metric(f"field_parameters_{name}", counts[name], unit="parameters")
    reported = published("simple-segmentation")["field_ratio"]
    run.metric("field_ratio", radius["basic"] / radius["bottleneck"], published=reported)
    run.metric("field_parameters_ratio", counts["basic"] / counts["bottleneck"])
    titled = {f"{name}: {radius[name]:.0f} px": (field / field.max()).sqrt() for name, field in fields.items()}
    run.figure("fields", figures.maps(titled), f"What counts for the centre of the last map, of {size} pixels (root).")


def _far_cues(task: DenseTask, training: Training, size: int = 128) -> None:
    """Both kinds of blocks, with the same head, where the answer lies far away."""
    run, names = task.run, ["ground", "under red", "under blue"]
    train_set, held_out = (cue_scenes(count, size, run.seed, part) for count, part in ((800, "train"), (200, "test")))
    found = {}
    for name, body in _pair(16).items():
        run.seed_everything("cue", "start")
        encoder = Backbone(body)
        head = FFNetHead([level.channels for level in encoder.feature_info], 3, "C", "C", divisor=8)
        counted = sum(p.numel() for module in (encoder, head) for p in module.parameters())
        run.metric(f"cue_parameters_{name}", counted, unit="parameters")
        segmenter = task.train(f"cue_{name}", encoder, head, train_set, training, task.normalize)
        each = task.measure(segmenter, held_out, 3, (size, size)).each[1:]
        found[name] = sum(each) / len(each)
        run.metric(f"cue_miou_{name}", found[name])
        if name == "basic":
            task.draw(segmenter, held_out, names, (size, size), "cue_examples")
    run.metric("cue_gain", found["basic"] - found["bottleneck"])


# -------------------------------------------------------------------------------------------------------------- parts


def _check_places(config: Config, run: Run, reduction: int) -> None:
    """Batch norm needs two values a channel in training; the coarsest map of one small picture has a single place."""
    alone = config.training.batch_size == config.training.accumulate * run.world
    if alone and max(config.size) <= reduction:
        raise UserError(
            f"a batch of one picture of {config.size[0]}x{config.size[1]} pixels leaves one place of the coarsest map "
            f"(reduction {reduction}), and batch norm needs two; raise --training.batch-size or --size."
        )


def _encoder(config: Config) -> Any:
    if config.encoder:
        if not made_for(config.encoder, -1):
            return Backbone(config.encoder)
        try:  # plain ViTs can be told to take any size
            return Backbone(config.encoder, dynamic_img_size=True, dynamic_img_pad=True)
        except TypeError:
            return Backbone(config.encoder, img_size=config.size)
    widths = tuple(w // config.divisor for w in (64, 128, 192, 320))
    slim = create_timm("ffnet22s", num_classes=0, widths=widths, stem=(widths[0] // 2, widths[0]), layers=(2, 2, 2, 2))
    return Backbone(slim)
