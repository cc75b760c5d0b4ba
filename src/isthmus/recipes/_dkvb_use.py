"""A trained bottleneck at work: kept in a folder, classifying pictures, and going on learning from a few of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.codec import Codec, UserError, build, spec_of, write_atomically
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.transforms import Transform
from isthmus.decoders.voting import Vote
from isthmus.engine import Run, read_config
from isthmus.recipes import _image_classification as shared

FOLDER = "classifier"
PICTURES = "pictures.json"
LESSONS = 60  # passes over what is taught


@dataclass(frozen=True)
class Pictures:
    """What a classifier takes and tells."""

    classes: list[str]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self) -> Transform:
        """``{"image": (B, 3, H, W) in [0, 1]}`` to what the encoder takes."""
        return shared.transforms(self.size, len(self.classes), None, self.mean, self.std)[1]


def keep(run: Run, codec: Codec, pictures: Pictures) -> None:
    """Leave the codec in the run's folder."""
    if run.is_first:
        save(run.dir / FOLDER, codec, pictures)
    text = f"encoder, bottleneck and vote: codec, pictures = isthmus.recipes.dkvb.load({str(run.dir)!r})"
    run.artifact("classifier", run.dir / FOLDER / Codec.WEIGHTS, text)


def save(folder: Path, codec: Codec, pictures: Pictures) -> None:
    """Write a folder that :func:`load` reads, and ``Codec.from_pretrained`` too."""
    codec.save_pretrained(folder)
    write_atomically(folder / PICTURES, (json.dumps(asdict(pictures), indent=1) + "\n").encode())


def load(folder: str | Path) -> tuple[Codec, Pictures]:
    """The codec of a run (or of what ``apply`` taught it), images to logits, and what it takes and tells.

    Raises:
        UserError: there is none.
    """
    path = Path(folder)
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    try:
        found = json.loads((path / PICTURES).read_text())
        pictures = Pictures(found["classes"], found["size"], tuple(found["mean"]), tuple(found["std"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no {FOLDER}; run the recipe to its end first.") from error
    return Codec.from_pretrained(path), pictures


def classify(codec: Codec, pictures: Pictures, inputs: Sequence[Path], out: Path) -> list[Path]:
    """Write ``classes.json`` and every picture with its likeliest class above it.

    The shares told are a softmax of the votes; those of a bottleneck are even, as label smoothing made them.
    """
    found: dict[str, Any] = {}
    written = [out / "classes.json"]
    for path in inputs:
        try:
            image = decode_image(path)
        except Unreadable as error:
            found[str(path)] = {"skipped": str(error)}
            continue
        with torch.no_grad():
            share = codec(_ready(image, pictures)).prediction[0].softmax(0)
        best = share.topk(min(5, len(pictures.classes)))
        told = {pictures.classes[int(i)]: round(float(p), 4) for p, i in zip(*best, strict=True)}
        name = next(iter(told))
        out.mkdir(parents=True, exist_ok=True)
        target = out / f"{path.stem}-class.png"
        if target in written:  # another folder's picture of the same name
            target = out / f"{path.stem}-{len(written)}-class.png"
        shared.annotated(image, f"{name} ({told[name]:.0%})").savefig(target)
        written.append(target)
        found[str(path)] = {"class": name, "probability": told, "picture": target.name}
    if len(written) == 1:
        told_all = "; ".join(f"{path}: {entry['skipped']}" for path, entry in found.items())
        raise UserError(f"none of the inputs is an image ({told_all}); known are {', '.join(IMAGE_SUFFIXES)}.")
    write_atomically(written[0], (json.dumps(found, indent=1) + "\n").encode())
    return written


def teach(
    run_dir: Path, codec: Codec, pictures: Pictures, lessons: Sequence[Path], out: Path
) -> tuple[Codec, Pictures, list[Path]]:
    """Learn pictures whose folder names their class, as one more task of the stream that the run trained on.

    Args:
        run_dir: whose training of values is gone on with.
        codec: stays as it is where no class is new; trained in place.
        pictures: what it tells.
        lessons: image files.
        out: gets the folder ``classifier``.

    Returns:
        The codec that knows them, its classes, and the files written.

    Raises:
        UserError: none of them is an image.
    """
    images, names, reasons = [], [], []
    for path in lessons:
        try:
            images.append(_ready(decode_image(path), pictures))
            names.append(path.parent.name)
        except Unreadable as error:
            reasons.append(f"{path}: {error}")
    if not images:
        raise UserError(f"nothing to learn from: {'; '.join(reasons)}.")
    new = sorted(set(names) - set(pictures.classes))
    classes = [*pictures.classes, *new]
    pictures = Pictures(classes, pictures.size, pictures.mean, pictures.std)
    codec = widened(codec, len(classes)) if new else codec
    label = torch.tensor([classes.index(name) for name in names])
    settings = read_config(run_dir)["config"]
    with torch.no_grad():
        embeddings = torch.cat([codec.encoder(image)[-1] for image in images])
    bottleneck: Any = codec.bottleneck.train()
    optimiser = torch.optim.SGD([bottleneck.values], settings["stream"]["lr"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(LESSONS):
        for chosen in torch.randperm(len(label), generator=generator).split(settings["stream"]["batch_size"]):
            optimiser.zero_grad()
            assert codec.decoder is not None
            logits = codec.decoder(bottleneck([embeddings[chosen]]).features)
            F.cross_entropy(logits, label[chosen], label_smoothing=settings["smoothing"]).backward()
            if (limit := settings["stream"]["clip"]) is not None:
                torch.nn.utils.clip_grad_norm_([bottleneck.values], limit)
            optimiser.step()
    save(out / FOLDER, codec.eval(), pictures)
    return codec, pictures, [out / FOLDER / name for name in (Codec.CONFIG, Codec.WEIGHTS, PICTURES)]


def widened(codec: Codec, classes: int) -> Codec:
    """The same codec with room for more classes; what it knows of the others stays."""
    old: Any = codec.bottleneck
    spec = spec_of(old)
    spec["kwargs"]["value_dim"] = classes
    made: KeyValueBottleneck = build(spec)
    state = old.state_dict()
    state["values"] = F.pad(state["values"], (0, classes - state["values"].shape[-1]))
    made.load_state_dict(state)
    return Codec(codec.encoder, made, Vote(classes)).eval()


def _ready(image: Tensor, pictures: Pictures) -> Tensor:
    batch = {"image": image[None].float() / 255, "index": torch.tensor([0])}
    return pictures.transform()(batch, torch.Generator())["image"]
