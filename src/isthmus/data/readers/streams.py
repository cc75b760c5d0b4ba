"""Samples that are read in turn, because they are too many to hold: shuffled, shared out, resumed at any step.

Every process and worker reads shards of its own. Their order is drawn anew each epoch, and samples are permuted within
windows of ``buffer``. All of it is a function of seed, epoch and place, so a run resumes at any step without a stored
state; unlike with the sources that have a length, the order depends on how many processes and workers share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset

from isthmus.codec import UserError
from isthmus.data.dataset import Unreadable, collate
from isthmus.data.hashing import permutation
from isthmus.data.transforms import Transform, as_floats, divided
from isthmus.data.workers import helped
from isthmus.layers.random import ShardedGenerator, derive_seed

if TYPE_CHECKING:  # ``datasets`` takes a second to import, and the built-in sources do without it
    from isthmus.data.readers.columns import Columns


#: How far :meth:`Stream.samples` reads on and keeps what it read.
MOST_AHEAD = 4096


class Shard(NamedTuple):
    """A file of samples: its name, how it is opened, and how many rows it has where that is known beforehand."""

    name: str
    open: Callable[[], Any]  # -> datasets.IterableDataset
    length: int | None = None


class Stream:
    """Samples in an order of the source's own. It has no length; :meth:`batches` gives what training needs.

    ``stream[i]`` and ``stream.fetch(range(n))`` read on from the start, for a look at the first few samples.

    Args:
        name: of the source.
        shards: the files.
        columns: turns rows into samples.
        wanted: the columns to read.
        buffer: samples that are permuted together; the memory that a reader takes.

    Attributes:
        columns, classes, skipped: as those of :class:`isthmus.data.dataset.Dataset`.
    """

    image_size = None
    in_memory = False
    mask_classes: Sequence[str] | None = None
    notes: Sequence[str] = ()

    def __init__(
        self, name: str, shards: Sequence[Shard], columns: Columns, wanted: Sequence[str], buffer: int = 1024
    ) -> None:
        if buffer < 1:
            raise UserError(f"{name}: buffer must be at least 1, got {buffer}.")
        self.name, self.shards, self.wanted, self.buffer = name, list(shards), tuple(wanted), buffer
        self.names = columns
        self.columns = tuple(columns.source)
        self.classes = columns.names.get("label") or columns.names.get("labels")
        self.skipped: list[tuple[str, str]] = []
        self._ahead: tuple[list[dict[str, Any]], Iterator[dict[str, Any]]] | None = None
        self._lengths = {i: shard.length for i, shard in enumerate(self.shards) if shard.length is not None}

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        transform: Transform | None = None,
        workers: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Training batches without end; arguments as those of :func:`isthmus.data.batches`, which calls this."""
        plan = _Plan(self, batch_size, seed, start_step, rank, world, transform, max(1, workers))
        if not workers:
            return (batch for batch, _ in plan.read(0))
        return self._told(helped(plan, workers))

    def evaluation_batches(
        self, batch_size: int, *, transform: Transform | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Every readable sample once, in order; arguments as those of :func:`isthmus.data.evaluation_batches`."""
        each, whole = divided(transform, None)
        generator = torch.Generator().manual_seed(0)
        samples = (sample for place in self._raw(range(len(self.shards)), 0) if (sample := self._read(*place)))
        for number in itertools.count():
            chunk = list(itertools.islice(samples, batch_size))
            if not chunk:
                return
            if number % world == rank:
                batch = as_floats(collate([each.one(s, generator) for s in chunk] if each else chunk))
                yield whole(batch, generator) if whole else batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples([index])[0]

    def samples(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> list[dict[str, Any]]:
        """Of the readable samples in order, those of some numbers below :data:`MOST_AHEAD`.

        Raises:
            UserError: a larger number, or one behind the end.
        """
        wanted = [int(i) for i in indices]
        if wanted and not 0 <= min(wanted) <= max(wanted) < MOST_AHEAD:
            raise UserError(f"{self.name} is a stream; only its first {MOST_AHEAD} samples can be asked for by number.")
        if self._ahead is None:
            places = self._raw(range(len(self.shards)), 0)
            self._ahead = [], (sample for place in places if (sample := self._read(*place)))
        held, rest = self._ahead
        held += itertools.islice(rest, max(0, max(wanted, default=-1) + 1 - len(held)))
        if wanted and max(wanted) >= len(held):
            raise UserError(f"{self.name} has {len(held)} readable samples, asked for number {max(wanted)}.")
        return [held[i] for i in wanted]

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        """:meth:`samples` as a batch, see :func:`isthmus.data.dataset.collate`."""
        return collate(self.samples(indices))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}  # a worker starts anew

    # ----------------------------------------------------------------------------------------------------- internals

    def endless(self, seed: int, reader: int, readers: int, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """``(epoch, sample)`` of one of ``readers`` readers, without end, from its sample number ``start``."""
        epoch, place = self._locate(seed, reader, readers, start)
        while True:
            found = False
            for sample in self._epoch(seed, epoch, reader, readers, place):
                found = True
                yield epoch, sample
            if not found and not place:
                first = f" ({self.skipped[0][0]}: {self.skipped[0][1]})" if self.skipped else ""
                raise UserError(
                    f"{self.name}: reader {reader + 1} of {readers} finds no readable sample{first}; give more shards, "
                    "or fewer processes and workers."
                )
            epoch, place = epoch + 1, 0

    def _order(self, seed: int, epoch: int, reader: int, readers: int) -> tuple[list[int], int]:
        """The shards of a reader, and how many readers share each of them sample by sample."""
        order = permutation(len(self.shards), derive_seed(seed, "shards", epoch)).tolist()
        return (order[reader::readers], 1) if len(order) >= readers else (order, readers)

    def _locate(self, seed: int, reader: int, readers: int, start: int) -> tuple[int, int]:
        """The epoch of a reader's sample number ``start``, and its place in that epoch."""
        for epoch in itertools.count():
            order, sharing = self._order(seed, epoch, reader, readers)
            first, total = (reader if sharing > 1 else 0), 0
            for shard in order:
                if start < max(0, -(-(total - first) // sharing)) or not start:
                    break
                total += self._length(shard)
            held = max(0, -(-(total - first) // sharing))
            if not start or start < held:
                return epoch, start
            if not held:
                return epoch, 0  # nothing here: ``endless`` says so
            start -= held
        raise AssertionError

    def _epoch(self, seed: int, epoch: int, reader: int, readers: int, place: int) -> Iterator[dict[str, Any]]:
        order, sharing = self._order(seed, epoch, reader, readers)
        number, within = divmod(place, self.buffer)
        first = reader if sharing > 1 else 0
        rows = itertools.islice(self._raw(order, number * self.buffer * sharing + first), 0, None, sharing)
        spare: dict[str, Any] | None = None
        while window := list(itertools.islice(rows, self.buffer)):
            shuffled = permutation(len(window), derive_seed(seed, "window", epoch, reader, number)).tolist()
            for turn in range(within, len(window)):
                following = (window[shuffled[(turn + later) % len(window)]] for later in range(len(window)))
                sample = self._first(following) or spare
                if sample is None:  # a whole window is damaged: the first readable sample of the epoch serves
                    sample = spare = self._first(self._raw(order, first))
                if sample is None:
                    return
                yield sample
            number, within = number + 1, 0

    def _first(self, places: Iterable[tuple[int, int, Mapping[str, Any] | Unreadable]]) -> dict[str, Any] | None:
        """The first readable sample: in the place of a damaged one stands the next of its window, or of the epoch."""
        return next((sample for place in places if (sample := self._read(*place))), None)

    def _raw(self, order: Sequence[int], start: int) -> Iterator[tuple[int, int, Mapping[str, Any] | Unreadable]]:
        """``(shard, row number, row)`` of the shards in turn, from row ``start`` of all of them together."""
        for shard in order:
            if start:
                length = self._length(shard)
                if start >= length:
                    start -= length
                    continue
            row, known = start, self._lengths.get(shard)
            try:
                table = self._open(shard)
                for batch in (table.skip(start) if start else table).iter(batch_size=1):
                    yield shard, row, {key: values[0] for key, values in batch.items()}
                    row += 1
            except Exception as error:  # whatever a damaged archive, a lost connection or Arrow may raise
                self._skip(self.shards[shard].name, Unreadable(f"row {row}: {' '.join(str(error).split())[:200]}"))
                for lost in range(row, known or 0):  # places stay where the footer says that they are
                    yield shard, lost, Unreadable("lies in the damaged part of its shard")
                row = max(row, known or 0)
            self._lengths[shard] = row
            start = 0

    def _open(self, shard: int) -> Any:
        table = self.shards[shard].open()
        return table.select_columns([each for each in self.names.top(self.wanted) if each in table.features])

    def _length(self, shard: int) -> int:
        if shard not in self._lengths:
            for _ in self._raw([shard], 0):
                pass
        return self._lengths[shard] or 0

    def _read(self, shard: int, row: int, cells: Mapping[str, Any] | Unreadable) -> dict[str, Any] | None:
        try:
            if isinstance(cells, Unreadable):
                raise cells
            sample = self.names.sample(cells, self.wanted)
        except Unreadable as error:
            self._skip(f"row {row} of {self.shards[shard].name}", error)
            return None
        return {**sample, "index": torch.tensor(shard * 2**32 + row)}

    def _skip(self, name: str, error: Unreadable) -> None:
        if (name, str(error)) not in self.skipped:
            self.skipped.append((name, str(error)))

    def _told(self, loader: Iterable[Any]) -> Iterator[dict[str, Any]]:
        for batch, skipped in loader:
            for name, reason in skipped:
                self._skip(name, Unreadable(reason))
            yield batch


class _Plan(IterableDataset):
    """What workers hold: worker w of W makes the batches of steps w, w + W, …, from shards of its own."""

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        seed: int,
        start_step: int,
        rank: int,
        world: int,
        transform: Transform | None,
        workers: int,
    ) -> None:
        self.stream, self.share, self.seed, self.start_step = stream, batch_size // world, seed, start_step
        self.rank, self.world, self.workers = rank, world, workers
        self.each, self.whole = divided(transform, None)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
        info = torch.utils.data.get_worker_info()
        return self.read(info.id if info else 0)

    def read(self, worker: int) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
        # The loader asks worker 0 first, wherever a run resumes.
        first = self.start_step + worker
        done = first // self.workers
        role = first % self.workers
        reader, readers = self.rank * self.workers + role, self.world * self.workers
        samples = self.stream.endless(self.seed, reader, readers, done * self.share)
        for step in itertools.count(first, self.workers):
            chunk = list(itertools.islice(samples, self.share))
            batch = as_floats(collate([self._one(epoch, sample) for epoch, sample in chunk]))
            if self.whole is not None:
                generator = ShardedGenerator(self.seed, "batch", step, rank=self.rank, world=self.world)
                batch = self.whole(batch, generator)
            yield batch, list(self.stream.skipped)

    def _one(self, epoch: int, sample: dict[str, Any]) -> dict[str, Any]:
        if self.each is None:
            return sample
        key = derive_seed(self.seed, "sample", epoch, int(sample["index"]))
        return self.each.one(sample, torch.Generator().manual_seed(key))
