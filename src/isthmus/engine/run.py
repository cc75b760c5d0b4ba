"""A run: one recipe, one seed, one folder, some devices. All that recipes see of the engine besides ``fit``."""

from __future__ import annotations

import functools
import json
import os
import random
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.strategies import DDPStrategy
from rich.console import Console

from isthmus.catalog import Claim
from isthmus.codec import UserError, write_atomically
from isthmus.engine import checkpoint, folder, sharding
from isthmus.engine.options import RunOptions
from isthmus.errors import RunFailed
from isthmus.layers.random import ShardedGenerator, derive_seed
from isthmus.report import Record, environment, record


class Run:
    """Opens (or takes up again) the folder of a run; use it as ``with Run("spark", config, options) as run:``.

    The folder holds ``config.json``, ``environment.json``, ``log.txt``, ``scalars/``, ``tensorboard/``,
    ``checkpoints/``, what the record writes, and ``finished.json`` once the block was left without an error.

    Args:
        name: of the recipe, as on the command line.
        config: its settings, a dataclass or a mapping; a resumed run must have the same.
        options: where and on what it runs.
        scale: ``"laptop"`` or ``"paper"``, for the record.
        claims: what the record judges metrics by.
        command: what was typed, for the record.

    Attributes:
        dir: the folder.
        fabric: devices, precision, and how processes talk; already launched.
        rank, world: this process among all that share the run.
        is_first: this process writes; the others do not.
        sharded: every process keeps a share of the model.
        resumed: the folder held this run before.

    Raises:
        UserError: the folder is taken, the run cannot be resumed so, or the devices are not there.
    """

    def __init__(
        self,
        name: str,
        config: Any = None,
        options: RunOptions | None = None,
        *,
        scale: str = "laptop",
        claims: Sequence[Claim] = (),
        command: str = "",
    ) -> None:
        self.name, self.options, self.config = name, options or RunOptions(), config
        self.seed = self.options.seed
        self.console = Console(stderr=True)
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        if self.options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False
        self.fabric = make_fabric(self.options)
        self.fabric.launch()
        self.rank, self.world = self.fabric.global_rank, self.fabric.world_size
        self.is_first = self.rank == 0
        self.sharded = self.options.strategy == "fsdp" and self.world > 1
        self._lock: folder.Lock | None = None
        self._remarks: set[str] = set()
        self._skipped: list[list[tuple[str, str]]] = []
        self.dir, before = self._open(scale, command)
        self.resumed, command = before.resumed, before.command or command
        self.phases: list[str] = []
        self._began = time.monotonic()
        known = {"seed": self.seed, "scale": scale, "config": config, "options": self.options, "command": command}
        try:
            record = functools.partial(Record, self.dir, name, **known, claims=claims)
            self._record = self._guard(record, resume=self.resumed, write=self.is_first)
        except UserError:
            self.close()
            raise
        self.seed_everything("start")
        if self.resumed:
            self.log(f"Going on with {self.dir}.")
        if before.remark:
            self.note(before.remark)

    def _open(self, scale: str, command: str) -> tuple[Path, folder.Before]:
        """Find and enter the folder on the first process, and tell the others how it went."""
        path, before, problem = Path(), folder.Before(False, "", ""), ""
        if self.is_first:
            try:
                path = folder.choose(self.name, self.options)
                self._lock = folder.Lock(path)
                folder.clean(path)
                before = folder.enter(path, self.name, self.config, self.options, scale, command)
                write_atomically(path / "environment.json", json.dumps(environment(), indent=1).encode())
                (path / folder.FINISHED).unlink(missing_ok=True)
            except OSError as error:
                problem = f"the folder of the run cannot be written: {checkpoint.disk_sentence(error)}"
            except UserError as error:
                problem = str(error)
        path_text, before, problem = self.fabric.broadcast((str(path), before, problem))
        if problem:
            self.close()
            raise UserError(problem)
        return Path(path_text), before

    @classmethod
    def quick(cls, parent: Path, seed: int = 0, name: str = "quick", config: Any = None, **options: Any) -> Run:
        """A quiet run in ``parent / "run"`` on one CPU, for tests and notebooks."""
        given = {"out": parent / "run", "seed": seed, "accelerator": "cpu", "quiet": True, "tensorboard": False}
        return cls(name, config, RunOptions(**{**given, **options}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self.finish()
            elif issubclass(kind, (KeyboardInterrupt, SystemExit)):
                self._tell("finish", "interrupted", f"go on with: {self.resume_command}")
                self.log(f"Interrupted; go on with: {self.resume_command}")
            elif self.world > 1 and sharding.is_lost(error):
                self._abandon(error)
            else:
                self._tell("finish", "failed", str(error), isinstance(error, UserError))
        except UserError:
            if kind is None:
                raise  # otherwise the first error is the one to tell
        finally:
            self.close()

    def _abandon(self, error: BaseException | None) -> None:
        """Say that another process is gone, also in the record, where that was the one that keeps it."""
        sentence = f"another process of this run ended; go on with: {self.resume_command}"
        if not self.is_first and not folder.Lock.is_held(self.dir):
            self._guard(record.abandon, self.dir, sentence)
        self._tell("finish", "failed", sentence)
        raise RunFailed(sentence) from error

    def finish(self) -> None:
        """Mark the run as complete."""
        self.fabric.barrier()
        self._tell_skipped()
        self._tell("finish")
        if self.is_first:
            done = {"seconds": round(time.monotonic() - self._began, 1), "phases": self.phases, "resumed": self.resumed}
            self._guard(write_atomically, self.dir / folder.FINISHED, json.dumps(done, indent=1).encode())

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # ------------------------------------------------------------------------------------------------ randomness

    def generator(self, *key: int | str) -> ShardedGenerator:
        """A generator that belongs to this run's seed and ``key``, aware of this process's share of a batch."""
        return ShardedGenerator(self.seed, *key, rank=self.rank, world=self.world)

    def seed_everything(self, *key: int | str) -> None:
        """Seed torch, NumPy and Python from the run's seed and ``key``: for layers that draw without a generator."""
        seed = derive_seed(self.seed, *key)
        # torch.manual_seed would, at every step, queue a call for each kind of device that is not in use.
        torch.default_generator.manual_seed(seed)
        if self.fabric.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.fabric.device.type == "mps":
            torch.mps.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global state
        random.seed(seed)

    def cap(self, steps: int) -> int:
        """``steps``, or ``--max-steps`` where that is fewer."""
        return steps if self.options.max_steps is None else min(steps, self.options.max_steps)

    @property
    def few(self) -> bool:
        """A try-out: ``--max-steps`` is below 20, so that measuring looks at few samples as well."""
        return self.options.max_steps is not None and self.options.max_steps < 20

    # --------------------------------------------------------------------------------------------------- results

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run; its settings are read from the folder."""
        return f"isthmus run {self.name} --resume --out {shlex.quote(str(self.dir))}"

    def log(self, text: str) -> None:
        """Tell the person at the terminal, and keep it in ``log.txt``."""
        if not self.is_first:
            return
        if not self.options.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
        self._guard(self._append, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metric(self, name: str, value: float, published: str | float | None = None, unit: str = "") -> None:
        """Record a measured figure, beside the published one where there is one."""
        self._tell("metric", name, float(value), published=published, unit=unit)

    def figure(self, name: str, figure: Any, caption: str = "") -> None:
        """Record a picture: a matplotlib Figure, a PIL image, or a ``(3, H, W)`` tensor in [0, 1]."""
        self._tell("figure", name, figure, caption)

    def artifact(self, name: str, path: Path, text: str = "") -> None:
        """Record a file that the run leaves for use, with a sentence on what it is."""
        self._tell("artifact", name, path, text)

    def note(self, text: str) -> None:
        """Record a sentence for the report's reader."""
        self._tell("note", text)

    def uses(self, dataset: Any) -> None:
        """Say how a source was understood, and, when the run ends, what of it could not be read."""
        for note in getattr(dataset, "notes", ()):
            self._remark(f"{dataset.name}: {note}")
        skipped = getattr(dataset, "skipped", None)
        if skipped is not None and all(skipped is not known for known in self._skipped):
            self._skipped.append(skipped)

    def _tell_skipped(self) -> None:
        found = dict(entry for skipped in self._skipped for entry in skipped)
        if found:
            named = "; ".join(f"{name}: {reason}" for name, reason in list(found.items())[:10])
            more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
            told = "1 sample could not be read and was"
            if len(found) > 1:
                told = f"{len(found)} samples could not be read and were"
            self._remark(f"{told} left out: {named}{more}.")

    def _remark(self, text: str) -> None:
        """Log and record a sentence, once however often it is told."""
        if text not in self._remarks:
            self._remarks.add(text)
            self.log(text)
            self.note(text)

    def curves(self, phase: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Record the curves of a phase; fit does so at its end."""
        for name, points in curves.items():
            self._tell("curve", f"{phase}/{name}", [step for step, _ in points], [value for _, value in points])

    def _tell(self, method: str, *arguments: Any, **named: Any) -> None:
        """Call the record, on the first process only."""
        if self.is_first:
            self._guard(getattr(self._record, method), *arguments, **named)

    def _guard(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function that writes into the folder; what the disk refuses becomes a sentence."""
        try:
            return function(*arguments, **named)
        except OSError as error:
            raise UserError(f"{self.dir} could not be written to: {checkpoint.disk_sentence(error)}") from error

    def _append(self, line: str) -> None:
        with open(self.dir / "log.txt", "a", encoding="utf-8") as file:
            file.write(line)


class _Autocast(MixedPrecision):
    """Mixed precision that leaves the batch alone: pictures and targets rounded to 16 bits would change the loss."""

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(options: RunOptions) -> Fabric:
    """Fabric for these options; torchrun's and SLURM's process counts take precedence.

    Raises:
        UserError: the devices, the strategy or the precision are not to be had here.
    """
    kind = options.accelerator
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    devices, nodes = launched_by_others() or (options.devices, options.num_nodes)
    several = nodes > 1 or devices != 1
    strategy: Any = "auto"
    if several and options.strategy == "fsdp":
        strategy = sharding.strategy()
    elif several or options.strategy == "ddp":
        # Models keep heads that an objective does not use, and alternating objectives train a part at a time.
        strategy = DDPStrategy(find_unused_parameters=True)
    plugins: list[Any] = []
    precision: Any = options.precision
    if precision != "32-true":
        scaler = torch.amp.GradScaler(kind) if precision == "16-mixed" else None
        plugins, precision = [_Autocast(precision, kind, scaler)], None
    if several:
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    try:
        return Fabric(
            accelerator=kind, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision, plugins=plugins
        )
    except (ValueError, RuntimeError) as error:
        told = str(error).splitlines()[0]
        raise UserError(f"{devices} devices of kind {kind} on {nodes} nodes cannot be set up here: {told}") from error


def launched_by_others() -> tuple[int, int] | None:
    """Devices a node and nodes as torchrun or SLURM started them; ``None`` where this process stands alone."""
    env = os.environ
    if {"LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} <= env.keys():
        local = int(env["LOCAL_WORLD_SIZE"])
        return local, int(env["WORLD_SIZE"]) // local
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(env.get("SLURM_NNODES", 1))
        return int(env["SLURM_NTASKS"]) // nodes, nodes
    return None
