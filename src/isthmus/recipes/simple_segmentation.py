"""FFNet: segmentation without dilation, attention or branches (Mehta et al., arXiv 2206.08236).

The paper's claim: a plain residual network of basic blocks with a tiny up-head segments as well as what is built with
far more fuss; baselines looked bad because bottleneck blocks, with one 3×3 convolution each, do not see far enough.

What is measured here: the effective receptive field of networks of basic and of bottleneck blocks of one layout; the
same two as segmenters, trained alike on pictures where discs can only be told apart by a cue in a far corner; and an
FFNet trained on drawn scenes, or with ``--data`` on a person's own pictures and masks (``--encoder`` takes any timm
name), which ``isthmus apply`` then uses on pictures of any size. ``released("ffnet86S_BBB_mobile")`` builds any of the
87 published networks.

What comes out: basic blocks hear 1.37 times as far, as the paper says. On the far cues they lose by far (0.4 to 0.6):
with equal parameters the bottlenecks have four times as many channels, both kinds of network already hear further than
the 60 pixels that are asked for, and within 400 steps only the wide one learns to bring the colour of the cue along.
"""

from __future__ import annotations

import colorsys
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from isthmus.codec import Codec, UserError, create_timm, write_atomically
from isthmus.data import Dataset, evaluation_batches, load
from isthmus.data.dataset import Unreadable
from isthmus.data.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.transforms import Compose, Flip, RandomResizedCrop, Resize
from isthmus.decoders import ffnet_head
from isthmus.decoders.ffnet_head import FFNetClassifier, FFNetHead
from isthmus.encoders import ffnet
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.encoders.ffnet import FFNet
from isthmus.encoders.trained import read_state
from isthmus.engine import Run, Training, read_config
from isthmus.engine.fit import fit
from isthmus.lenses.receptive_field import rms_radius
from isthmus.objectives.segmentation import Segmentation
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._segmentation_cues import cue_scenes
from isthmus.report import figures

needs = ("image", "mask")

_SEGMENTER = "segmenter"
_CLASSES = "classes.json"


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on two cores."""

    data: str = "scenes:64"
    """Pictures with masks."""
    encoder: str = ""
    """A timm name, ours included (ffnet86s); a small network of basic blocks without it."""
    branch: str = "B"
    """Widths of the up-branch: A, B or C."""
    segmentation: str = "B"
    """Widths of the last two layers: A, B or C."""
    mobile: bool = False
    """Resize by the nearest value, as the mobile variants do."""
    divisor: int = 4
    """Every width of the head, and of the small network, over this."""
    size: tuple[int, int] = (64, 64)
    """Height and width of pictures in training and measuring."""
    smallest: float = 0.4
    """Smallest share of a picture that a training crop covers."""
    classes: int = 0
    """Classes of the masks; counted in the data where it is 0; 1 learns one binary mask of the values 0 and 1."""
    ignore: int = -1
    """A class that is neither learnt nor measured, often 255; -1 is none."""
    images: int = 800
    """Pictures to train on; 0 is all."""
    test_images: int = 200
    """Pictures to measure on; 0 is all."""
    training: Training = Training(steps=240, batch_size=16, lr=3e-3, weight_decay=0.01, warmup_steps=20, clip=1.0)
    """Training of the segmenter."""
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


def released(name: str, classes: int | None = None) -> Codec:
    """One of the published networks, such as ``ffnet86S_dBBB_mobile``, ``ffnet46NS_CCC_mobile_pre_down`` or, with its
    pre-training head, ``classification_ffnet50_AAX``.

    Args:
        name: as in the published code.
        classes: 19 (Cityscapes), or 1000 of the pre-training heads, without it.

    Raises:
        UserError: a name that does not follow the pattern, or a depth that was not published.
    """
    pattern = (
        r"(?:(?:segmentation|classification)_)?ffnet(\d+)(NS|N|S)?_(d)?([ABC])([ABC])([ABCX])(_mobile)?(_pre_down)?"
    )
    match = re.fullmatch(pattern, name)
    if match is None or (match[6] == "X") != name.startswith("classification"):
        raise UserError(f"{name!r} is no published FFNet; names are like ffnet86S_dBBB_mobile or ffnet122N_CBB.")
    depth, kind = int(match[1]), match[2] or ""
    if (match[4] == "C") != (kind in ("N", "NS")) or (match[4] == "B") != (kind == "S"):
        raise UserError(f"{name!r}: A bodies have no letter, B bodies an S, C bodies an N or NS.")
    try:
        ffnet.arguments_of(depth, kind)
    except ValueError as error:
        raise UserError(str(error)) from error
    timm_name = f"ffnet{depth}{kind.lower()}" + ("_d" if match[3] else "")
    body = create_timm(timm_name, num_classes=0, **({"pre_down": True} if match[8] else {}))
    encoder = Backbone(body)
    channels = [level.channels for level in encoder.feature_info]
    if match[6] == "X":
        return Codec(encoder, decoder=FFNetClassifier(channels, classes or 1000, match[5], bool(match[7])))
    return Codec(encoder, decoder=FFNetHead(channels, classes or 19, match[5], match[6], bool(match[7])))


def run(config: Config, run: Run) -> None:
    """Measure fields, train on cues, train the segmenter."""
    _check(config)
    train_set = _dataset(config, "train", config.images, run.seed)
    held_out = _dataset(config, "test", config.test_images, run.seed)
    names = _class_names(config, run)
    run.log(f"{config.data}: {len(train_set)} pictures to train on, {len(held_out)} held out, {len(names)} classes.")
    run.seed_everything("segmenter")
    encoder = _encoder(config)
    channels = [level.channels for level in encoder.feature_info]
    outputs = 1 if config.classes == 1 else len(names)
    head = FFNetHead(channels, outputs, config.branch, config.segmentation, config.mobile, config.divisor)
    _check_places(config, run, encoder.feature_info[-1].reduction)
    ignore = None if config.ignore < 0 else config.ignore
    if config.field:
        _fields(run)
    if config.cues:
        _far_cues(run, config)
    crop = RandomResizedCrop(config.size, scale=(config.smallest, 1.0))
    steps = Compose([crop, Flip(), shared.Normalize()])
    result = fit(run, "segmenter", Segmentation(encoder, head, ignore), train_set, config.training, steps)
    objective: Any = result.objective
    found = _measured(run, config, objective, held_out, len(names), ignore)
    run.metric("miou", found["miou"])
    run.metric("pixel_accuracy", found["accuracy"])
    shown = {name: value for name, value in zip(names, found["each"], strict=True) if value == value}
    if len(shown) <= 24:
        run.figure("classes", figures.bars(shown, "intersection over union"), "Of every class on held-out pictures.")
    _examples(run, config, objective, held_out, len(names))
    if run.is_first:
        Codec(objective.encoder, decoder=objective.decoder).save_pretrained(run.dir / _SEGMENTER)
        write_atomically(run.dir / _SEGMENTER / _CLASSES, json.dumps(names).encode())
    run.artifact("segmenter", run.dir / _SEGMENTER, "the segmenter; `isthmus apply` makes masks with it")


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Segment pictures of any size: ``NAME-mask.png`` (class numbers, in colour), ``NAME-overlay.png``, ``masks.json``.

    Args:
        run_dir: a finished run.
        inputs: image files; others are left out.
        out: the folder to write to.

    Raises:
        UserError: the run is incomplete, or no input is an image.
    """
    folder = run_dir / _SEGMENTER
    if not (folder / _CLASSES).is_file():
        raise UserError(f"{run_dir} has no {_SEGMENTER}; run the recipe to its end first.")
    names = json.loads((folder / _CLASSES).read_text())
    if len(names) > 256:
        raise UserError(f"{len(names)} classes do not fit into the 256 colours of a mask.")
    size = tuple(read_config(run_dir)["config"]["size"])
    codec = Codec.from_pretrained(folder)
    seen_at = size if _of_one_size(codec.encoder) else None
    objective = Segmentation(codec.encoder, codec.decoder).eval()  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    made: dict[Path, Image.Image] = {}
    for source in inputs:
        try:
            image = decode_image(source)
        except Unreadable as error:
            found[str(source)] = {"skipped": str(error)}
            continue
        x = shared.Normalize()({"image": image[None].float() / 255}, torch.Generator())["image"]
        with torch.no_grad():
            shown = x if seen_at is None else F.interpolate(x, seen_at, mode="bilinear", antialias=True)
            mask = objective.logits(shown, (x.shape[2], x.shape[3])).argmax(1)[0]
        stem, number = source.stem, len(made)
        while out / f"{stem}-mask.png" in made:  # another folder's picture of that name
            stem, number = f"{source.stem}-{number}", number + 1
        drawn = Image.fromarray(mask.to(torch.uint8).numpy(), "P")
        drawn.putpalette([value for colour in palette(len(names)) for value in colour])
        made[out / f"{stem}-mask.png"] = drawn
        made[out / f"{stem}-overlay.png"] = _overlaid(image, mask, len(names))
        share = torch.bincount(mask.flatten(), minlength=len(names)) / mask.numel()
        found[str(source)] = {
            "mask": f"{stem}-mask.png",
            "share": {name: round(float(s), 4) for name, s in zip(names, share, strict=True) if s > 0},
        }
    if not made:
        told = "; ".join(f"{name}: {entry['skipped']}" for name, entry in found.items())
        raise UserError(f"none of the inputs is an image ({told}); known are {', '.join(IMAGE_SUFFIXES)}.")
    out.mkdir(parents=True, exist_ok=True)
    for path, picture in made.items():
        picture.save(path)
    document = {"classes": names, "palette": palette(len(names)), "pictures": found}
    write_atomically(out / "masks.json", (json.dumps(document, indent=1) + "\n").encode())
    return [out / "masks.json", *made]


def convert(path: Path, out: Path, name: str) -> Path:
    """A published checkpoint as a folder for ``Codec.from_pretrained``.

    Args:
        path: a state dict of the release "models" of Qualcomm-AI-research/FFNet.
        out: the folder (a ``.safetensors`` ending is left off).
        name: the network, such as ``ffnet86S_dBBB_mobile``.

    Raises:
        UserError: no such network, or the checkpoint does not fit it.
    """
    codec = released(name)
    state = read_state(path)
    try:
        encoder: Any = codec.encoder
        body = ffnet.convert_official(state)
        encoder.model.load_state_dict(body)
        codec.decoder.load_state_dict(ffnet_head.convert_official(state))  # type: ignore[union-attr]
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit {name}: {str(error).splitlines()[-1].strip()}") from error
    return codec.save_pretrained(out.with_suffix("") if out.suffix == ".safetensors" else out)


# ---------------------------------------------------------------------------------------------------------- measuring


def _pair(divisor: int) -> dict[str, FFNet]:
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


def _fields(run: Run, size: int = 417, tries: int = 4) -> None:
    """RMS radius of the gradient of the last map's centre with respect to noise, mean over untrained networks.

    Batch norm runs on statistics of three noise pictures: those of the batch itself would carry gradients everywhere.
    """
    maps: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for trial in range(tries):
        run.seed_everything("field", trial)
        for name, body in _pair(8).items():
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
    run.metric("field_ratio", radius["basic"] / radius["bottleneck"], published=1.35)
    run.metric("field_parameters_ratio", counts["basic"] / counts["bottleneck"])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    for axis, (name, field) in zip(figure.subplots(1, 2), maps.items(), strict=True):
        axis.imshow((field / field.max()).sqrt().numpy(), cmap="viridis")
        axis.set_title(f"{name}: {radius[name]:.0f} px", fontsize=10)
        axis.axis("off")
    run.figure("fields", figure, "What the centre of the last map hears of a picture of 417 pixels (square root).")


def _far_cues(run: Run, config: Config, size: int = 128) -> None:
    """Both kinds of blocks, with the same head, where the answer lies far away."""
    train_set = cue_scenes(800, size, run.seed, "train")
    held_out = cue_scenes(200, size, run.seed, "test")
    found = {}
    for name, body in _pair(16).items():
        run.seed_everything("cue", "start")
        encoder = Backbone(body)
        channels = [level.channels for level in encoder.feature_info]
        objective = Segmentation(encoder, FFNetHead(channels, 3, "C", "C", divisor=8))
        run.metric(f"cue_parameters_{name}", sum(p.numel() for p in objective.parameters()), unit="parameters")
        normalise = Compose([shared.Normalize()])
        trained: Any = fit(run, f"cue_{name}", objective, train_set, config.cue_training, normalise).objective
        measured = _measured(run, config, trained, held_out, 3, None, size=(size, size))
        found[name] = float(np.mean(measured["each"][1:]))
        run.metric(f"cue_miou_{name}", found[name])
        if name == "basic":
            _examples(run, config, trained, held_out, 3, "cue_examples", (size, size))
    run.metric("cue_gain", found["basic"] - found["bottleneck"])


@torch.no_grad()
def _measured(
    run: Run,
    config: Config,
    objective: Segmentation,
    dataset: Dataset,
    classes: int,
    ignore: int | None,
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Intersection over union, of every class and their mean, and the share of right pixels."""
    from torchmetrics import JaccardIndex

    objective.to(run.fabric.device).eval()
    jaccard = JaccardIndex("multiclass", num_classes=classes, ignore_index=ignore, average="none")
    right = total = 0
    seen = torch.zeros(classes, dtype=torch.bool)
    for batch in evaluation_batches(dataset, 16, transform=Compose([Resize(size or config.size), shared.Normalize()])):
        mask = batch["mask"]
        told = objective.logits(run.fabric.to_device(batch["image"]), (mask.shape[1], mask.shape[2])).argmax(1).cpu()
        known = torch.ones_like(mask, dtype=torch.bool) if ignore is None else mask != ignore
        jaccard.update(told, mask)
        right, total = right + int((told == mask)[known].sum()), total + int(known.sum())
        seen[mask[known].unique()] = True
    each = jaccard.compute()
    values = [float(v) if s else float("nan") for v, s in zip(each, seen, strict=True)]
    return {"miou": float(np.nanmean(values)), "each": values, "accuracy": right / max(1, total)}


@torch.no_grad()
def _examples(
    run: Run,
    config: Config,
    objective: Segmentation,
    dataset: Dataset,
    classes: int,
    name: str = "examples",
    size: tuple[int, int] | None = None,
) -> None:
    chosen = dataset.select(np.arange(min(6, len(dataset))))
    batch = next(evaluation_batches(chosen, len(chosen), transform=Resize(size or config.size)))
    normal = shared.Normalize()({"image": batch["image"]}, torch.Generator())["image"]
    told = objective.logits(run.fabric.to_device(normal)).argmax(1).cpu()
    colours = torch.tensor(palette(max(classes, int(batch["mask"].max()) + 1)), dtype=torch.uint8)
    figure = Figure(figsize=(1.6 * len(chosen), 4.6), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for column in range(len(chosen)):
        pictures = (batch["image"][column].permute(1, 2, 0), colours[batch["mask"][column]], colours[told[column]])
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.axis("off")
    run.figure(name, figure, "Held-out pictures, their masks, and the masks that are told.")


# -------------------------------------------------------------------------------------------------------------- parts


def palette(classes: int) -> list[list[int]]:
    """A colour for every class: black for the first, then hues far from each other."""
    colours = [[0, 0, 0]]
    for number in range(1, classes):
        hue, light = (number * 0.61803) % 1.0, (0.95, 0.7)[number % 2]
        colours.append([round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.8, light)])
    return colours[:classes]


def _overlaid(image: Tensor, mask: Tensor, classes: int) -> Image.Image:
    colours = torch.tensor(palette(classes), dtype=torch.float32)[mask].permute(2, 0, 1)
    mixed = torch.where(mask > 0, 0.5 * image.float() + 0.5 * colours, image.float())
    return Image.fromarray(mixed.round().to(torch.uint8).permute(1, 2, 0).numpy())


def _check(config: Config) -> None:
    """Refuse what no run can do, before any of it is done.

    Raises:
        UserError: see its message.
    """
    for name in ("images", "test_images", "classes"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(config, name)}.")
    if min(config.size) < 1:
        raise UserError(f"--size must be a height and a width of 1 pixel or more, got {config.size}.")
    if not 0 < config.smallest <= 1:
        raise UserError(f"--smallest is a share above 0 and up to 1, got {config.smallest}.")
    if not config.encoder and not 1 <= config.divisor <= 32:
        raise UserError(f"--divisor must be 1 to 32 for the small network, got {config.divisor}.")


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


def _of_one_size(encoder: Any) -> bool:
    """Whether an encoder sees no pictures but those of the size that it was made for (windows, fixed positions)."""
    model = getattr(encoder, "model", None)
    fixed = bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    return fixed and not getattr(getattr(model, "patch_embed", None), "dynamic_img_pad", False)


def _dataset(config: Config, split: str, count: int, seed: int, columns: Sequence[str] = needs) -> Dataset:
    dataset = load(config.data, split, columns, seed)
    return dataset.select(np.arange(count)) if count and count < len(dataset) else dataset


def _class_names(config: Config, run: Run) -> list[str]:
    """Names of what masks hold; numbers where the source does not name them.

    Every mask is looked at, because a class that only a few hold would end the training when it turns up.
    """
    if config.classes:
        return [str(number) for number in range(max(2, config.classes))]
    named: Sequence[str] | None = getattr(load(config.data, "train", ("mask",), run.seed), "object_classes", None)
    if named is not None:
        return ["ground", *named]
    largest = 0
    for split, count in (("train", config.images), ("test", config.test_images)):
        dataset = _dataset(config, split, count, run.seed, ("mask",))
        for start in range(0, len(dataset), 64):
            for sample in dataset.samples(range(start, min(start + 64, len(dataset)))):
                known = sample["mask"][sample["mask"] != config.ignore]
                largest = max(largest, int(known.max()) if known.numel() else 0)
    if largest == 255:
        run.log("The masks hold 255, which often means that nothing is known there; --ignore 255 leaves it out.")
    return [str(number) for number in range(largest + 1)]
