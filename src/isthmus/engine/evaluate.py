"""One evaluation for all recipes: on the run's devices, shared among its processes, in its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.data import Dataset, evaluation_batches
from isthmus.data.transforms import Transform
from isthmus.engine.run import Run

BATCH = 256
#: Samples that a try-out measures on, at most.
FEW = 64


class Metric(Protocol):
    """What torchmetrics calls a metric, as far as it is used here."""

    def update(self, predicted: Tensor, target: Tensor, /) -> None: ...

    def compute(self) -> Any: ...


Measure = Metric | Callable[[Any, Mapping[str, Any]], Tensor]


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    dataset: Dataset,
    metrics: Mapping[str, Measure],
    transform: Transform | None = None,
    *,
    key: str = "image",
    target: str = "label",
    batch_size: int = BATCH,
    predict: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Measure a model on a source, every sample once.

    Args:
        run: whose devices, processes and precision are used; a try-out looks at the first samples.
        model: moved to the device and set to evaluation mode.
        dataset: each process measures its share.
        metrics: by name, a torchmetrics metric (``update(predicted, batch[target])``, shared among processes by
            itself), or ``function(predicted, batch) -> (B, …)``, whose mean over all samples is returned as a tensor.
        transform: of batches, before they go to the device.
        key: the column that the model reads.
        target: the column that torchmetrics' metrics compare with.
        batch_size: samples at a time.
        predict: ``predict(model, batch)`` in place of ``model(batch[key])``.

    Returns:
        Each metric's value: ``compute()`` of a metric, a mean over samples for a function.
    """
    model.to(run.fabric.device).eval()
    for metric in metrics.values():
        if isinstance(metric, nn.Module):
            metric.to(run.fabric.device)
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in shared_batches(run, dataset, batch_size, transform):
        with run.fabric.autocast():
            predicted = model(batch[key]) if predict is None else predict(model, batch)
        for name, metric in metrics.items():
            if hasattr(metric, "update"):
                metric.update(_whole(predicted), batch[target])  # type: ignore[union-attr]
            else:
                total = metric(_whole(predicted), batch).double().sum(0)  # type: ignore[operator]
                sums[name] = sums[name] + total if name in sums else total
        count += _length(batch)
    everyone = _sum(run, torch.tensor(float(count), dtype=torch.float64, device=run.fabric.device))
    return {
        name: metric.compute()  # type: ignore[union-attr]
        if hasattr(metric, "update")
        else (_sum(run, sums[name]) / everyone).cpu()
        for name, metric in metrics.items()
    }


def shared_batches(
    run: Run, dataset: Dataset, batch_size: int = BATCH, transform: Transform | None = None
) -> Iterator[dict[str, Any]]:
    """This process's share of a source in batches, in order, on its device; of a try-out only the first samples."""
    run.uses(dataset)
    if run.few:
        dataset = dataset.first(min(FEW, batch_size) * run.world)
    for batch in evaluation_batches(dataset, batch_size, transform=transform, rank=run.rank, world=run.world):
        yield run.fabric.to_device(batch)


@torch.no_grad()
def confusion_matrix(
    run: Run,
    model: nn.Module,
    dataset: Dataset,
    num_classes: int,
    transform: Transform | None = None,
    *,
    key: str = "image",
    logits: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> Tensor:
    """``(K, K)`` counts on the CPU: rows are the true classes, columns the predicted ones.

    Args:
        run: whose devices and processes are used.
        model: ``batch[key]`` to logits ``(B, K)``.
        dataset: with the column ``label``.
        num_classes: K.
        transform: of batches.
        key: the column that the model reads.
        logits: ``logits(model, batch)`` in place of ``model(batch[key])``.
    """
    model.to(run.fabric.device).eval()
    table = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for batch in shared_batches(run, dataset, transform=transform):
        with run.fabric.autocast():
            scores = model(batch[key]) if logits is None else logits(model, batch)
        pairs = batch["label"].cpu() * num_classes + scores.argmax(1).cpu()
        table += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    return _sum(run, table.to(run.fabric.device)).cpu()


def accuracy(table: Tensor) -> float:
    """Share of right predictions in a table of :func:`confusion_matrix`."""
    return float(table.diagonal().sum() / table.sum().clamp_min(1))


def _sum(run: Run, value: Tensor) -> Tensor:
    return value if run.world == 1 else run.fabric.all_reduce(value, reduce_op="sum")  # type: ignore[return-value]


def _whole(predicted: Any) -> Any:
    """Predictions in 32 bits, whatever the precision they were made in."""
    return predicted.float() if isinstance(predicted, Tensor) and predicted.is_floating_point() else predicted


def _length(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
