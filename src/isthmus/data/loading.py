"""Batches as a function of (seed, step): the same on one device or many, with workers or without, after any restart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from isthmus.codec import UserError
from isthmus.data.dataset import Dataset, collate
from isthmus.data.readers.streams import Stream
from isthmus.data.transforms import Transform, as_floats, divided
from isthmus.data.workers import helped
from isthmus.layers.random import ShardedGenerator, derive_seed


def steps_per_epoch(dataset: Dataset | Stream, batch_size: int, drop_last: bool = True) -> int:
    """How many batches one pass over ``dataset`` gives.

    Raises:
        UserError: fewer samples than one batch takes.
    """
    if isinstance(dataset, Stream):
        raise UserError(f"{dataset.name} is a stream, whose length is not known; set a number of steps, not of epochs.")
    full, rest = divmod(len(dataset), batch_size)
    steps = full if drop_last else full + bool(rest)
    if not steps:
        raise UserError(
            f"{dataset.name} has {len(dataset)} samples, fewer than one batch of {batch_size}; "
            f"set the batch size to {len(dataset)} or less."
        )
    return steps


def batches(
    dataset: Dataset | Stream,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    transform: Transform | None = None,
    workers: int = 0,
    drop_last: bool = True,
) -> Iterator[dict[str, Any]]:
    """Training batches without end. That of step t is a function of ``(dataset, batch_size, seed, t)`` alone.

    Every epoch visits the samples in an order of its own. ``image`` is float32 ``(B, 3, H, W)`` in [0, 1]; ``index``
    int64 ``(B,)`` tells the samples' numbers in the source.

    Args:
        dataset: of :func:`isthmus.data.load`.
        batch_size: samples a step on all devices together.
        seed: of order and augmentation.
        start_step: the step of the first batch; resuming needs nothing else.
        rank: this process; it gets rows ``rank·b`` to ``(rank+1)·b`` of every global batch, b = batch_size / world.
        world: number of processes.
        transform: see :mod:`isthmus.data.transforms`. Where images differ in size it runs on single samples, with a
            generator of (seed, epoch, index), until they have one; the rest, or all, runs on the whole batch.
        workers: processes that prepare batches; ignored where the dataset stands in memory.
        drop_last: leave out the samples at the end of an epoch that do not fill a batch.

    Raises:
        UserError: fewer samples than a batch, or images that differ in size and no transform that makes them equal.
        ValueError: ``batch_size`` does not divide by ``world``.
    """
    if batch_size < 1 or batch_size % world or not 0 <= rank < world:
        raise ValueError(f"batch size {batch_size} cannot be shared by {world} processes (this is number {rank}).")
    if world > 1 and not drop_last:
        raise ValueError("drop_last=False leaves some processes without samples; it is for one process only.")
    if isinstance(dataset, Stream):
        return dataset.batches(
            batch_size, seed=seed, start_step=start_step, rank=rank, world=world, transform=transform, workers=workers
        )
    plan = _Plan(batch_size, steps_per_epoch(dataset, batch_size, drop_last), seed, rank, world)
    return _run(_Steps(dataset, plan, transform), itertools.count(start_step), workers)


def evaluation_batches(
    dataset: Dataset | Stream,
    batch_size: int,
    *,
    transform: Transform | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict[str, Any]]:
    """Every readable sample once, in order, with the last short batch. Unreadable ones are left out, not replaced.

    Args:
        dataset: of :func:`isthmus.data.load`.
        batch_size: samples a batch of this process.
        transform: one without randomness, such as ``Resize`` and ``CenterCrop``.
        workers: processes that prepare batches.
        rank: this process; the samples are dealt out batch by batch.
        world: number of processes.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"got batch size {batch_size}, rank {rank}, world {world}.")
    if isinstance(dataset, Stream):
        return dataset.evaluation_batches(batch_size, transform=transform, rank=rank, world=world)
    steps = range(rank, -(-len(dataset) // batch_size), world)
    found = _run(_InOrder(dataset, batch_size, transform), steps, workers)
    return (batch for batch in found if len(batch["index"]))


def example_batch(
    dataset: Dataset | Stream, numbers: Sequence[int] | np.ndarray, transform: Transform | None = None
) -> dict[str, Any]:
    """Some samples as :func:`evaluation_batches` would give them; in the place of an unreadable one stands the next.

    Raises:
        UserError: not one sample of the source can be read.
    """
    each, whole = divided(transform, dataset.image_size)
    generator = torch.Generator().manual_seed(0)
    samples = dataset.samples(numbers)
    batch = as_floats(collate([each.one(sample, generator) for sample in samples] if each else samples))
    return whole(batch, generator) if whole else batch


class _Plan(NamedTuple):
    batch_size: int
    steps: int
    seed: int
    rank: int
    world: int


class _Steps(TorchDataset):
    """Step number → batch; what workers hold."""

    def __init__(self, dataset: Dataset, plan: _Plan, transform: Transform | None) -> None:
        self.dataset, self.plan = dataset, plan
        self.each, self.whole = divided(transform, dataset.image_size)
        self._order: tuple[int, Any] = (-1, None)

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, place = divmod(step, self.plan.steps)
        if self._order[0] != epoch:
            self._order = epoch, self.dataset.order(derive_seed(self.plan.seed, "order", epoch))
        chosen = self._order[1][place * self.plan.batch_size : (place + 1) * self.plan.batch_size]
        share = self.plan.batch_size // self.plan.world
        mine = chosen[self.plan.rank * share : (self.plan.rank + 1) * share]
        if self.each is None:
            batch = self.dataset.fetch(mine)
        else:
            samples = zip(mine.tolist(), self.dataset.samples(mine), strict=True)
            batch = collate([self._one(sample, epoch, number) for number, sample in samples])
        batch = as_floats(batch)
        if self.whole is None:
            return batch
        generator = ShardedGenerator(self.plan.seed, "batch", step, rank=self.plan.rank, world=self.plan.world)
        return self.whole(batch, generator)

    def _one(self, sample: Mapping[str, Any], epoch: int, number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(derive_seed(self.plan.seed, "sample", epoch, number))
        assert self.each is not None
        return self.each.one(sample, generator)


class _InOrder(TorchDataset):
    """Batch number → the samples in order."""

    def __init__(self, dataset: Dataset, batch_size: int, transform: Transform | None) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.each, self.whole = divided(transform, dataset.image_size)

    def __getitem__(self, step: int) -> dict[str, Any]:
        numbers = range(step * self.batch_size, min((step + 1) * self.batch_size, len(self.dataset)))
        generator = torch.Generator().manual_seed(0)
        if self.each is None:
            batch = self.dataset.fetch(numbers, replace=False)
        else:
            batch = collate([self.each.one(s, generator) for s in self.dataset.samples(numbers, replace=False)])
        if not batch:
            return {"index": torch.zeros(0, dtype=torch.int64)}
        batch = as_floats(batch)
        return batch if self.whole is None else self.whole(batch, generator)


def _run(steps: _Steps | _InOrder, order: Any, workers: int) -> Iterator[dict[str, Any]]:
    if not workers or steps.dataset.in_memory:
        yield from (steps[step] for step in order)
        return
    known = set(steps.dataset.skipped)
    for batch, skipped in helped(_Telling(steps), workers, order):
        for entry in skipped:
            if entry not in known:
                known.add(entry)
                steps.dataset.skipped.append(entry)
        yield batch


class _Telling(TorchDataset):
    """Sends along what a worker had to skip, because its memory is not ours."""

    def __init__(self, steps: _Steps | _InOrder) -> None:
        self.steps = steps

    def __getitem__(self, step: int) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        return self.steps[step], list(self.steps.dataset.skipped)
