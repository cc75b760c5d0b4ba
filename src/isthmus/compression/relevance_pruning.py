"""Pruning by explaining: filters through which least of the answer flows are taken out (Yeom et al., arXiv 1912.08881).

    from isthmus.compression.relevance_pruning import compress, load_pruned, save_pruned
    small = compress(model, images[:1], [(images, labels)], keep=0.5)      # ten images a class, or even one
    save_pruned(small, "small.safetensors"); model = load_pruned("small.safetensors")

Scores, ranking and cutting are repeated in steps of a twentieth of the filters, each time on the network that is left;
``finetune`` is called after each step, where there is data to train on. The result is a plain module: fewer channels,
fewer operations, and it exports like any other.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import UserError, build, save_weights, spec_of
from isthmus.compression import Compressed, bits_of
from isthmus.compression.filter_scores import Batch, Criterion, filter_scores, layers_of
from isthmus.compression.operations import multiply_accumulates
from isthmus.compression.ranking import choose, kept
from isthmus.compression.reshaping import load_reshaped, read_metadata, shapes_of
from isthmus.compression.surgery import Surgery

Batches = Iterable[Batch]
FORMAT = "isthmus-pruned"


def compress(
    model: nn.Module,
    example: Tensor,
    calibration: Batches | None = None,
    *,
    keep: float = 0.5,
    criterion: Criterion | str = "relevance",
    step: float = 0.05,
    floor: int | float = 1,
    equal: bool = False,
    join: str = "sum",
    layers: Sequence[str] | None = None,
    finetune: Callable[[nn.Module], Any] | None = None,
    generator: torch.Generator | None = None,
) -> Compressed:
    """A copy of ``model`` with a share of its filters left; the model itself stays as it is.

    Args:
        model: images to logits.
        example: an input; a batch of one will do.
        calibration: reference samples, ``(images, labels)`` or dictionaries; read once for every step.
        keep: share of the filters that stays.
        criterion: what they are ranked by.
        step: share of the original filters that goes at a time; 1 takes all at once.
        floor: filters that every layer keeps, a number or a share below 1.
        equal: the same share from every layer instead of one ranking.
        join: how scores of filters that have to go together are joined: sum, max or mean.
        layers: names of the layers to prune; convolutions, or linear layers where there are none.
        finetune: trains the smaller network a little, after every step.
        generator: for random scores.

    Raises:
        UserError: torch-pruning is missing, nothing can be cut, or no samples are given.
        ValueError: shares out of range, or a floor that keeps more than ``keep``.
    """
    way = prune(model, example, calibration, [keep], criterion, step, floor, equal, join, layers, finetune, generator)
    return next(iter(way))


def prune(
    model: nn.Module,
    example: Tensor,
    calibration: Batches | None,
    keeps: Sequence[float],
    criterion: Criterion | str = "relevance",
    step: float = 0.05,
    floor: int | float = 1,
    equal: bool = False,
    join: str = "sum",
    layers: Sequence[str] | None = None,
    finetune: Callable[[nn.Module], Any] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Compressed]:
    """The networks on the way: one for each of ``keeps``, descending. See :func:`compress`.

    Each is yielded as it is; the next one is cut from the same module, so copy what is to last.
    """
    for share in keeps:
        if not 0 < share <= 1:
            raise ValueError(f"keep is the share of filters that stays, above 0 and up to 1; got {share}.")
    if not 0 < step <= 1 or list(keeps) != sorted(keeps, reverse=True):
        raise ValueError(f"step must lie above 0 and up to 1 and shares descend, got step {step} and {list(keeps)}.")
    criterion = Criterion(criterion) if isinstance(criterion, str) else criterion  # type: ignore[arg-type]
    samples = [] if calibration is None else list(calibration)
    spec = _spec(model)
    before = _size(model, example)
    small = copy.deepcopy(model)
    surgery = Surgery(small, example, layers_of(model) if layers is None else layers)
    everything, original = surgery.filters, {name: len(index) for name, index in surgery.left.items()}
    floors = [max(1, kept(len(group.units), floor)) for group in surgery.groups]  # shares of what there is at first
    gone, steps = 0, []
    for share in keeps:
        goal = round((1 - share) * everything)
        while gone < goal:
            number = min(goal - gone, max(1, round(step * everything)))
            members = [name for group in surgery.groups for name in group.members if name in surgery.layers]
            scores = filter_scores(small, samples, criterion, members, generator)
            joined = [group.score(scores, join) for group in surgery.groups]
            picked = choose(joined, [g.cost for g in surgery.groups], number, floors, equal)
            surgery.remove_units(picked)
            gone += sum(surgery.groups[place].cost for place, _ in picked)
            steps.append({"removed": gone, "of": everything})
            if finetune is not None:
                finetune(small)
        report = {
            "criterion": criterion.name,
            "keep": share,
            "filters": {"before": everything, "after": everything - gone},
            "before": before,
            "after": _size(small, example),
            "kept": {n: i.tolist() for n, i in surgery.left.items() if len(i) < original[n]},
            "excluded": dict(surgery.excluded),
            "classes": sorted({int(label) for batch in samples for label in _labels(batch).reshape(-1)}),
            "steps": list(steps),
            "spec": spec,
        }
        yield Compressed(small, bits_of(small), report)


def save_pruned(pruned: Compressed, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write the network and all that is needed to make it again into one safetensors file.

    Raises:
        UserError: the network was neither made by timm through isthmus nor is it a part, so that a file cannot
            describe it; export it with torch.export instead.
    """
    spec = pruned.report.get("spec")
    if spec is None:
        raise UserError(
            f"{type(pruned.model).__name__} cannot be described in a file; make it with isthmus.codec.create_timm or "
            "from a part before pruning, or export it with torch.export."
        )
    about = {
        **(metadata or {}),
        "format": FORMAT,
        "spec": json.dumps(spec),
        "shapes": json.dumps(shapes_of(pruned.model)),
    }
    report = {key: value for key, value in pruned.report.items() if key != "spec"}
    save_weights(pruned.model, path, {**about, "report": json.dumps(report)})


def load_pruned(path: str | os.PathLike[str]) -> nn.Module:
    """The network of :func:`save_pruned`, in evaluation mode; torch-pruning is not needed.

    Raises:
        UserError: the file is missing, cut short, or none of these.
    """
    about = read_metadata(path)
    if about.get("format") != FORMAT:
        raise UserError(f"{path} is no pruned network; give a file written by save_pruned.")
    return load_reshaped(build(json.loads(about["spec"])), path, json.loads(about["shapes"])).eval()


# -------------------------------------------------------------------------------------------------------------- parts


def _spec(model: nn.Module) -> Any:
    try:
        return spec_of(model)
    except UserError:
        return None


def _labels(batch: Batch) -> Tensor:
    return batch[1] if isinstance(batch, tuple) else batch["label"]


@torch.no_grad()
def _size(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Parameters, and multiply-accumulates for one sample."""
    modes = {module: module.training for module in model.modules()}
    macs = multiply_accumulates(model.eval(), example[:1])
    for module, mode in modes.items():
        module.training = mode
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": macs}
