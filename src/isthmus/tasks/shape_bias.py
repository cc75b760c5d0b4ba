"""Shape or texture: what a network goes by when the two contradict each other (after Geirhos et al., arXiv 1811.12231).

A network is trained on pictures in which every shape has a texture of its own, so that either tells the class. Then it
sees pictures in which they disagree. Its *shape bias* is the share of shape among the decisions for one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.data import evaluation_batches, load
from isthmus.data.builtin.scenes import Bias, Scenes, Space
from isthmus.data.inputs import Inputs
from isthmus.data.transforms import Transform
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.objectives.classification import Classification
from isthmus.report import figures

#: Number i of one goes with number i of the other.
SHAPES = ("circle", "square", "triangle", "star")
FILLS = ("stripes", "checker", "dots", "noise")


def cues(size: int, split: str, seed: int, agree: bool, count: int) -> Scenes:
    """Pictures of one large shape on plain ground; shape i has fill i where they agree, and any other where not."""
    # Smaller ones show too little of their texture, and then every network goes by shape.
    space = Space.easy(shapes=SHAPES, fills=FILLS, textures=("plain",), sizes=range(600, 900))
    plant = Bias("shape", "fill", 100 if agree else 0)
    drawn = {"space": space, "rule": "correlated", "plant": plant, "count": count}
    found = load(f"scenes:{size}", split, ("image", "label", "factors"), seed, **drawn)
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
        run: gets the metrics, and a figure of what the first network predicts.
        networks: name → a new network for so many classes.
        training: of each.
        size: pixels of a side.
        counts: how many pictures to train on, and how many to ask about.
        smoothing: of labels.

    Returns:
        The shape bias of every network.
    """
    transform = Inputs(size=(size, size)).transform()
    agreeing = cues(size, "train", run.seed, True, counts[0])
    control = cues(size, "test", run.seed, True, counts[1])
    conflicting = cues(size, "test", run.seed, False, counts[1])
    biases: dict[str, float] = {}
    for name, make in networks.items():
        run.seed_everything("cue network")
        objective = Classification(make(len(SHAPES)), smoothing=smoothing)
        result = fit(run, f"cues_{name}", objective, agreeing, training, transform)
        trained: Any = result.objective if result.ema is None else result.ema
        network = trained.model
        predicted, shape, fill = _decisions(run, network, conflicting, transform)
        biases[name], decided = shape_bias(predicted, shape, fill)
        run.metric(f"shape_bias_{name}", biases[name])
        run.metric(f"decided_for_either_{name}", decided)
        predicted, shape, _ = _decisions(run, network, control, transform)
        run.metric(f"accuracy_with_both_cues_{name}", float((predicted == shape).float().mean()))
        if len(biases) == 1:
            _draw(run, name, network, conflicting, transform)
    return biases


def shape_bias(predicted: Tensor, shape: Tensor, fill: Tensor) -> tuple[float, float]:
    """Share of shape among the decisions for shape or texture, and the share of those among all; classes ``(N,)``."""
    by_shape, by_fill = int((predicted == shape).sum()), int((predicted == fill).sum())
    return by_shape / max(by_shape + by_fill, 1), (by_shape + by_fill) / len(predicted)


@torch.no_grad()
def _decisions(
    run: Run, network: nn.Module, dataset: Scenes, transform: Transform | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The predicted class, the number of the shape, and that of the fill, for every picture."""
    network.to(run.fabric.device).eval()
    fill = dataset.factor_names.index("fill")
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in evaluation_batches(dataset, 256, transform=transform):
        predicted = network(run.fabric.to_device(batch["image"])).argmax(1).cpu()
        found.append((predicted, batch["label"], batch["factors"][:, fill]))
    predicted, shape, texture = (torch.cat(column) for column in zip(*found, strict=True))
    return predicted, shape, texture


def _draw(run: Run, name: str, network: nn.Module, dataset: Scenes, transform: Transform) -> None:
    chosen = dataset.first(16)
    batch = next(evaluation_batches(chosen, len(chosen), transform=transform))
    with torch.no_grad():
        predicted = network(run.fabric.to_device(batch["image"])).argmax(1).cpu()
    fill = batch["factors"][:, dataset.factor_names.index("fill")]
    captions = []
    for decided, shape, texture in zip(predicted.tolist(), batch["label"].tolist(), fill.tolist(), strict=True):
        captions.append("shape" if decided == shape else "texture" if decided == texture else "neither")
    pictures = figures.captioned(batch["image"], captions, (predicted == batch["label"]).tolist(), columns=8)
    run.figure("cues", pictures, f"Shape and texture contradict each other, and {name} goes by what stands above.")
