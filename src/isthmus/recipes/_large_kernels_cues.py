"""Shape or texture: what a network goes by when the two contradict each other (after Geirhos et al., arXiv 1811.12231).

A network is trained on pictures in which every shape has a texture of its own, so that either tells the class. Then it
sees pictures in which they disagree. Its *shape bias* is the share of shape among the decisions for one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.data import evaluation_batches, load
from isthmus.data.builtin.scenes import Bias, Scenes, Space
from isthmus.engine import Run, Training
from isthmus.recipes import _image_classification as shared
from isthmus.report import figures

#: Number i of one goes with number i of the other.
SHAPES = ("circle", "square", "triangle", "star")
FILLS = ("stripes", "checker", "dots", "noise")


def cues(size: int, split: str, seed: int, agree: bool, count: int) -> Scenes:
    """Pictures of one large shape on plain ground; shape i has fill i where they agree, and any other where not."""
    # Smaller ones show too little of their texture, and then every network goes by shape.
    space = Space.easy(shapes=SHAPES, fills=FILLS, textures=("plain",), sizes=range(600, 900))
    plant = Bias("shape", "fill", 100 if agree else 0)
    told = {"space": space, "rule": "correlated", "plant": plant, "count": count}
    found = load(f"scenes:{size}", split, ("image", "label", "factors"), seed, **told)
    assert isinstance(found, Scenes)
    return found


def ask_for_cues(
    run: Run,
    networks: Mapping[str, Callable[[int], nn.Module]],
    training: Training,
    size: int,
    counts: tuple[int, int],
    smoothing: float = 0.0,
) -> dict[str, float]:
    """Train networks on agreeing pictures and ask them about contradicting ones.

    Args:
        run: gets the metrics, and a figure of what the first network says.
        networks: name → a new network for so many classes.
        training: of each.
        size: pixels of a side.
        counts: how many pictures to train on, and how many to ask about.
        smoothing: of labels.

    Returns:
        The shape bias of every network.
    """
    _, plain = shared.transforms(size, len(SHAPES))
    agreeing = cues(size, "train", run.seed, True, counts[0])
    control = cues(size, "test", run.seed, True, counts[1])
    conflicting = cues(size, "test", run.seed, False, counts[1])
    biases: dict[str, float] = {}
    for name, make in networks.items():
        run.seed_everything("cue network")
        result: Any = shared.train(run, f"cues_{name}", make(len(SHAPES)), agreeing, training, plain, smoothing)
        network = result.objective.model
        told, shape, fill = _decisions(run, network, conflicting, plain)
        biases[name], decided = shape_bias(told, shape, fill)
        run.metric(f"shape_bias_{name}", biases[name])
        run.metric(f"decided_for_either_{name}", decided)
        told, shape, _ = _decisions(run, network, control, plain)
        run.metric(f"accuracy_with_both_cues_{name}", float((told == shape).float().mean()))
        if len(biases) == 1:
            _draw(run, name, network, conflicting, plain)
    return biases


def shape_bias(told: Tensor, shape: Tensor, fill: Tensor) -> tuple[float, float]:
    """Share of shape among the decisions for shape or texture, and the share of those among all; classes ``(N,)``."""
    by_shape, by_fill = int((told == shape).sum()), int((told == fill).sum())
    return by_shape / max(by_shape + by_fill, 1), (by_shape + by_fill) / len(told)


@torch.no_grad()
def _decisions(run: Run, network: nn.Module, dataset: Scenes, plain: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the network says, the number of the shape, and that of the fill, for every picture."""
    network.to(run.fabric.device).eval()
    fill = dataset.factor_names.index("fill")
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in evaluation_batches(dataset, 256, transform=plain):
        told = network(run.fabric.to_device(batch["image"])).argmax(1).cpu()
        found.append((told, batch["label"], batch["factors"][:, fill]))
    told, shape, texture = (torch.cat(column) for column in zip(*found, strict=True))
    return told, shape, texture


def _draw(run: Run, name: str, network: nn.Module, dataset: Scenes, plain: Any) -> None:
    chosen = dataset.select(np.arange(min(16, len(dataset))))
    batch = next(evaluation_batches(chosen, len(chosen), transform=plain))
    with torch.no_grad():
        told = network(run.fabric.to_device(batch["image"])).argmax(1).cpu()
    fill = batch["factors"][:, dataset.factor_names.index("fill")]
    captions = []
    for said, shape, texture in zip(told.tolist(), batch["label"].tolist(), fill.tolist(), strict=True):
        captions.append("shape" if said == shape else "texture" if said == texture else "neither")
    pictures = figures.captioned(batch["image"], captions, (told == batch["label"]).tolist(), columns=8)
    run.figure("cues", pictures, f"Shape and texture contradict each other, and {name} goes by what stands above.")
