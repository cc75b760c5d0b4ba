"""A key-value bottleneck at work: it classifies pictures, and goes on learning from a few of them, new classes too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from isthmus import saved
from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.codec import Codec, UserError, build, spec_of
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import decode_image
from isthmus.decoders.voting import Vote
from isthmus.saved import Saved
from isthmus.tasks import applying, classification

#: Passes over what is taught.
LESSONS = 60


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Classify pictures; those in a folder ``teach/CLASS/`` are learned first.

    Args:
        run_dir: a finished run.
        inputs: image files. Those in ``…/teach/CLASS/`` teach that class, a new one too; the rest is classified.
        out: gets ``answers.json``, every picture with its class above it, and, where something was taught,
            ``classifier``, which :func:`isthmus.load` reads.

    Raises:
        UserError: no input is an image, or the run is incomplete.
    """
    kept = saved.load(run_dir)
    lessons = [path for path in inputs if path.parent.parent.name == "teach"]
    written: list[Path] = []
    if lessons:
        kept = teach(kept, lessons)
        folder = saved.save(out / "classifier", kept.model, kept.inputs, kept.labels, kept.facts)
        written = [folder / saved.FACTS, folder / saved.WEIGHTS]
    rest = [path for path in inputs if path not in set(lessons)]
    if rest or not lessons:
        written = applying.apply(kept, rest, out, classification.answer) + written
    return written


def teach(kept: Saved, lessons: Sequence[Path]) -> Saved:
    """Learn pictures whose folder names their class, as one more task of the stream that the run trained on.

    Raises:
        UserError: none of them is an image.
    """
    codec, transform = kept.model, kept.inputs.transform()
    assert isinstance(codec, Codec)
    images, names, reasons = [], [], []
    for path in lessons:
        try:
            batch = {"image": decode_image(path)[None].float() / 255, "index": torch.tensor([0])}
        except Unreadable as error:
            reasons.append(f"{path}: {error}")
            continue
        images.append(transform(batch, torch.Generator())["image"])
        names.append(path.parent.name)
    if not images:
        raise UserError(f"nothing to learn from: {'; '.join(reasons)}.")
    known = kept.labels or []
    classes = [*known, *sorted(set(names) - set(known))]
    codec = widened(codec, len(classes)) if len(classes) > len(known) else codec
    label = torch.tensor([classes.index(name) for name in names])
    with torch.no_grad():
        embeddings = torch.cat([codec.encoder(image)[-1] for image in images])
    bottleneck: Any = codec.bottleneck.train()
    training = kept.facts["stream"]
    optimiser = torch.optim.SGD([bottleneck.values], training["lr"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(LESSONS):
        for chosen in torch.randperm(len(label), generator=generator).split(training["batch_size"]):
            optimiser.zero_grad()
            assert codec.decoder is not None
            logits = codec.decoder(bottleneck([embeddings[chosen]]).features)
            F.cross_entropy(logits, label[chosen], label_smoothing=kept.facts["smoothing"]).backward()
            if training["clip"] is not None:
                torch.nn.utils.clip_grad_norm_([bottleneck.values], training["clip"])
            optimiser.step()
    return replace(kept, model=codec.eval(), labels=classes)


def widened(codec: Codec, num_classes: int) -> Codec:
    """The same codec with room for more classes; what it knows of the others stays."""
    old: Any = codec.bottleneck
    spec = spec_of(old)
    spec["kwargs"]["value_dim"] = num_classes
    made: KeyValueBottleneck = build(spec)
    state = old.state_dict()
    state["values"] = F.pad(state["values"], (0, num_classes - state["values"].shape[-1]))
    made.load_state_dict(state)
    return Codec(codec.encoder, made, Vote(num_classes)).eval()
