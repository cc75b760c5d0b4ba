"""How far networks of basic and of bottleneck blocks hear, and how they segment where the answer lies far away."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.catalog import published
from isthmus.data.transforms import Compose
from isthmus.decoders.ffnet_head import FFNetHead
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.ffnet import FFNet
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.lenses.receptive_field import rms_radius
from isthmus.objectives.segmentation import Segmentation
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._simple_segmentation_cues import cue_scenes
from isthmus.recipes._simple_segmentation_measures import examples, measured


def pair(divisor: int) -> dict[str, FFNet]:
    """Basic and bottleneck blocks in the layout of ResNet-34 and -50, without classifiers."""
    widths = tuple(w // divisor for w in (64, 128, 256, 512))
    made = {}
    for name, bottleneck in (("basic", False), ("bottleneck", True)):
        body = FFNet("resnet", (3, 4, 6, 3), widths, (widths[0],), bottleneck=bottleneck, num_classes=0)
        for module in body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        made[name] = body
    return made


def fields(run: Run, size: int = 417, tries: int = 4) -> None:
    """RMS radius of the gradient of the last map's centre with respect to noise, mean over untrained networks.

    Batch norm runs on statistics of three noise pictures: those of the batch itself would carry gradients everywhere.
    """
    maps: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for trial in range(tries):
        run.seed_everything("field", trial)
        for name, body in pair(8).items():
            counts[name] = sum(p.numel() for p in body.parameters())
            body.to(run.fabric.device).train()
            for module in body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None  # a plain mean over what is seen
            with torch.no_grad():
                for _ in range(3):
                    body.forward_features(torch.randn(1, 3, size, size, device=run.fabric.device))
            x = torch.randn(1, 3, size, size, device=run.fabric.device, requires_grad=True)
            last = body.eval().forward_features(x)
            centre = last[:, :, last.shape[2] // 2, last.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(centre, x)
            maps[name] = maps.get(name, 0) + gradient.abs().sum((0, 1)).cpu() / tries
    radius = {name: rms_radius(field) for name, field in maps.items()}
    for name, value in radius.items():
        run.metric(f"field_radius_{name}", value, unit="px")
        run.metric(f"field_parameters_{name}", counts[name], unit="parameters")
    run.metric(
        "field_ratio", radius["basic"] / radius["bottleneck"], published=published("simple-segmentation")["field_ratio"]
    )
    run.metric("field_parameters_ratio", counts["basic"] / counts["bottleneck"])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    for axis, (name, field) in zip(figure.subplots(1, 2), maps.items(), strict=True):
        axis.imshow((field / field.max()).sqrt().numpy(), cmap="viridis")
        axis.set_title(f"{name}: {radius[name]:.0f} px", fontsize=10)
        axis.axis("off")
    run.figure("fields", figure, "What the centre of the last map hears of a picture of 417 pixels (square root).")


def far_cues(run: Run, training: Training, size: int = 128) -> None:
    """Both kinds of blocks, with the same head, where the answer lies far away."""
    train_set = cue_scenes(800, size, run.seed, "train")
    held_out = cue_scenes(200, size, run.seed, "test")
    found = {}
    for name, body in pair(16).items():
        run.seed_everything("cue", "start")
        encoder = Backbone(body)
        channels = [level.channels for level in encoder.feature_info]
        objective = Segmentation(encoder, FFNetHead(channels, 3, "C", "C", divisor=8))
        run.metric(f"cue_parameters_{name}", sum(p.numel() for p in objective.parameters()), unit="parameters")
        normalise = Compose([shared.Normalize()])
        trained: Any = fit(run, f"cue_{name}", objective, train_set, training, normalise).objective
        scores = measured(run, trained, held_out, 3, None, (size, size))
        found[name] = float(np.mean(scores["each"][1:]))
        run.metric(f"cue_miou_{name}", found[name])
        if name == "basic":
            examples(run, trained, held_out, 3, (size, size), "cue_examples")
    run.metric("cue_gain", found["basic"] - found["bottleneck"])
