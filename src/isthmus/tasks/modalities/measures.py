"""Networks of several modalities: whether they can be built, how good they are, and what merging changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from isthmus.data import Dataset
from isthmus.engine import Run
from isthmus.engine.evaluate import shared_batches
from isthmus.tasks.modalities.data import input_of
from isthmus.tasks.modalities.models import make_model
from isthmus.tasks.modalities.settings import COLUMNS


def check_networks(config: Any, sources: Mapping[str, tuple[Dataset, Dataset]], kernels: Iterable[int]) -> None:
    """Refuse, before anything is trained, a task whose network cannot be built."""
    for name, (train, _) in sources.items():
        sample = train[0][COLUMNS[name]]
        if not isinstance(sample, Tensor):
            continue  # prepared() refuses it
        outputs = len(sample) if name == "forecast" else 2
        with torch.device("meta"):
            for kernel in kernels:
                make_model(replace(config, pretrained=False), name, list(sample.shape), outputs, kernel)


@torch.no_grad()
def measured(run: Run, config: Any, name: str, model: Any, held_out: Dataset, transform: Any) -> float:
    """Accuracy, or the mean squared error of what is forepredicted, on standardised series."""
    total = count = 0.0
    model.to(run.fabric.device).eval()
    for batch in shared_batches(run, held_out, 128, transform):
        predicted = model(input_of(name, batch, config))
        if name == "forecast":
            total += float((predicted - batch["signal"][..., config.forecast.length :]).square().mean((1, 2)).sum())
        else:
            total += int((predicted.argmax(1) == batch["label"]).sum())
        count += len(predicted)
    if run.world > 1:
        sums = run.fabric.all_reduce(torch.tensor([total, count], device=run.fabric.device), reduce_op="sum")
        total, count = cast(Tensor, sums).tolist()
    return total / count


@torch.no_grad()
def merge_gap(model: Any, x: Tensor) -> float:
    """Largest change of an output by merging the branches."""
    merged = copy.deepcopy(model)
    merged.reparameterize()
    return float((merged(x) - model(x)).abs().max())
