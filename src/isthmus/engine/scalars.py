"""Curves of a phase while it runs: kept in memory, appended to a CSV file and to TensorBoard."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from lightning_fabric import Fabric
from torch import Tensor

from isthmus.codec import UserError, write_atomically
from isthmus.engine.checkpoint import disk_sentence

Curves = dict[str, list[tuple[int, float]]]


class Scalars:
    """Writes what it is given, on the first process only; use it in a ``with``, which closes its file.

    Args:
        folder: of the run; ``scalars/PHASE.csv`` (step, name, value) and ``tensorboard/PHASE`` go there.
        phase: name of the phase.
        curves: what a resumed phase had before; rows that a killed process wrote beyond them are dropped.
        write: whether to write at all.
        tensorboard: whether to write for TensorBoard too.
    """

    def __init__(self, folder: Path, phase: str, curves: Curves, write: bool, tensorboard: bool) -> None:
        self.curves = curves
        self._path = folder / "scalars" / f"{phase}.csv"
        self._board: EventFile | None = None
        self._write = write
        if not write:
            return
        text = io.StringIO()
        rows = sorted((step, name, value) for name, points in curves.items() for step, value in points)
        csv.writer(text).writerows([("step", "name", "value"), *rows])
        self._guarded(write_atomically, self._path, text.getvalue().encode())
        if tensorboard:
            last = max((points[-1][0] for points in curves.values() if points), default=0)
            self._board = self._guarded(EventFile, folder / "tensorboard" / phase, last + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Note scalars after ``step`` steps.

        Raises:
            UserError: the disk is full.
        """
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))
        if self._write:
            self._guarded(self._append, step, values)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        with open(self._path, "a", newline="") as file:
            csv.writer(file).writerows((step, name, value) for name, value in values.items())
        if self._board is not None:
            self._board.add(step, values)

    def _guarded(self, function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except OSError as error:
            raise UserError(f"{self._path} could not be written: {disk_sentence(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()


class EventFile:
    """Scalars in TensorBoard's format, written at once and by this thread, so that a full disk is noticed where it is.

    Args:
        folder: of the events.
        start: TensorBoard forgets what earlier files in the folder say from this step on.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.isthmus"
        self._records = RecordWriter(open(folder / name, "wb", buffering=0))  # noqa: SIM115 - close() closes it
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._put(Event(wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START)))

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of one step."""
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._put(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        self._records.close()


class Window:
    """Sums of scalars since they were last logged, kept on the device so that nothing waits for them."""

    def __init__(self, sums: dict[str, Tensor] | None = None, counts: dict[str, int] | None = None) -> None:
        self.sums, self.counts = sums or {}, counts or {}

    def add(self, turn: str, metrics: Mapping[str, Tensor], norm: Tensor) -> None:
        """Add a step of a turn."""
        for name, value in {**metrics, "gradient_norm": norm}.items():
            name = f"{turn}/{name}" if turn else name
            self.sums[name] = value.float() + self.sums.get(name, 0.0)
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, fabric: Fabric) -> dict[str, float]:
        """Means over the steps since the last call and over all processes; starts anew."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        if fabric.world_size > 1 and means:
            stacked = fabric.all_reduce(torch.stack(list(means.values())).to(fabric.device), reduce_op="mean")
            return dict(zip(means, stacked.tolist(), strict=True))  # type: ignore[union-attr]
        return {name: mean.item() for name, mean in means.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}
