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

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from isthmus.codec import Codec, UserError, create_timm, write_atomically
from isthmus.data import Dataset, load
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.transforms import Compose, Flip, RandomResizedCrop
from isthmus.decoders.ffnet_head import FFNetHead
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.engine import Run, Training, read_config
from isthmus.engine.fit import fit
from isthmus.objectives.segmentation import Segmentation
from isthmus.recipes import _image_classification as shared
from isthmus.recipes._simple_segmentation_fields import far_cues, fields
from isthmus.recipes._simple_segmentation_measures import examples, measured, overlaid, palette
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
        fields(run)
    if config.cues:
        far_cues(run, config.cue_training)
    crop = RandomResizedCrop(config.size, scale=(config.smallest, 1.0))
    steps = Compose([crop, Flip(), shared.Normalize()])
    result = fit(run, "segmenter", Segmentation(encoder, head, ignore), train_set, config.training, steps)
    objective: Any = result.objective
    found = measured(run, objective, held_out, len(names), ignore, config.size)
    run.metric("miou", found["miou"])
    run.metric("pixel_accuracy", found["accuracy"])
    shown = {name: value for name, value in zip(names, found["each"], strict=True) if value == value}
    if len(shown) <= 24:
        run.figure("classes", figures.bars(shown, "intersection over union"), "Of every class on held-out pictures.")
    examples(run, objective, held_out, len(names), config.size)
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
        made[out / f"{stem}-overlay.png"] = overlaid(image, mask, len(names))
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


# -------------------------------------------------------------------------------------------------------------- parts


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
    source = load(config.data, "train", ("mask",), run.seed)
    named = list(source.mask_classes or ())
    if hasattr(source, "object_classes"):  # drawn: there are no others
        return named
    largest = 0
    for split, count in (("train", config.images), ("test", config.test_images)):
        dataset = _dataset(config, split, count, run.seed, ("mask",))
        for start in range(0, len(dataset), 64):
            for sample in dataset.samples(range(start, min(start + 64, len(dataset)))):
                known = sample["mask"][sample["mask"] != config.ignore]
                largest = max(largest, int(known.max()) if known.numel() else 0)
    if largest == 255:
        run.log("The masks hold 255, which often means that nothing is known there; --ignore 255 leaves it out.")
    return named + [str(number) for number in range(len(named), largest + 1)]
