"""Curves of a phase while it runs: kept in memory, appended to a CSV file and to TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from isthmus.codec import UserError, write_atomically
from isthmus.engine.checkpoint import disk_sentence

Curves = dict[str, list[tuple[int, float]]]


class Scalars:
    """Writes what it is given, on the first process only.

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
        self._board: Any = None
        self._write = write
        if not write:
            return
        text = io.StringIO()
        rows = sorted((step, name, value) for name, points in curves.items() for step, value in points)
        csv.writer(text).writerows([("step", "name", "value"), *rows])
        self._guarded(write_atomically, self._path, text.getvalue().encode())
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            last = max((points[-1][0] for points in curves.values() if points), default=0)
            self._board = self._guarded(SummaryWriter, str(folder / "tensorboard" / phase), purge_step=last + 1)

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
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _guarded(self, function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except OSError as error:
            raise UserError(f"{self._path} could not be written: {disk_sentence(error)}") from error

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


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
