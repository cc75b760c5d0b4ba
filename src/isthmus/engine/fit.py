"""The training loop. One function, read from top to bottom; everything in it depends on (seed, phase, step) alone."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import Loss, Turn, UserError
from isthmus.engine.checkpoint import Checkpoints, Clock
from isthmus.engine.guard import Finite, Interrupted, Signals
from isthmus.engine.learner import Groups, Learner
from isthmus.engine.patience import Patience
from isthmus.engine.progress import Bar
from isthmus.engine.run import Run
from isthmus.engine.scalars import Curves, Scalars, Window
from isthmus.engine.training import Training, flag_of, named
from isthmus.layers.random import ShardedGenerator, derive_seed

Batch = dict[str, Any]


@dataclass
class FitResult:
    """A finished phase: the objective, ready for use, its moving average, and curves ``{name: [(step, value)]}``."""

    objective: nn.Module
    ema: nn.Module | None
    steps: int
    curves: Curves = field(default_factory=dict)


def fit(
    run: Run,
    phase: str,
    objective: nn.Module,
    dataset: Any,
    training: Training,
    transform: Callable[[Batch, torch.Generator], Batch] | None = None,
    groups: Groups | Mapping[str, Groups] | None = None,
    batches: Callable[[int, int, int], Iterator[Batch]] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> FitResult:
    """Train an objective, from its last checkpoint where the run is resumed, and keep the result.

    Args:
        run: folder, devices, seed.
        phase: a name, once a run: letters, digits, - and _.
        objective: ``objective(batch, generator) -> Loss``; with ``turns`` it is called with a turn's name as well.
        dataset: of ``isthmus.data.load``; ``None`` where ``batches`` makes them.
        training: how long, how fast, with which optimiser.
        transform: ``transform(batch, generator) -> batch``, augmentation while loading.
        groups: parameter groups, in place of those that ``training`` gives; by turn where the objective alternates.
        batches: ``batches(start_step, rank, world)`` yields this process's share of every global batch, without end.
        evaluate: ``evaluate(objective) -> {name: value}``, every ``training.evaluate_every`` steps and after the last;
            with ``training.patience`` its ``loss`` decides when training ends.

    Raises:
        UserError: settings that contradict each other or the data; a checkpoint that is damaged or another run's;
            a full disk; numbers that are not finite (:class:`isthmus.engine.guard.Diverged`).
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    _check_phase(run, phase)
    run.uses(dataset)
    samples = len(dataset) if hasattr(dataset, "__len__") else None
    flag = flag_of(run.config, training)
    steps = run.cap(training.length(samples, flag))
    schedule = training.schedule_for(samples, steps, flag)
    if training.batch_size % run.world:
        raise UserError(
            f"{named('batch_size', flag)} {training.batch_size} cannot be shared equally by {run.world} processes."
        )
    learner = Learner(run, objective, training, groups)
    files = Checkpoints(run.dir / "checkpoints", phase)
    identity = {"phase": phase, "seed": run.seed, "samples": samples, "steps": steps, **_numbers(training)}

    patience = Patience(training.patience)
    if training.patience is not None and (evaluate is None or training.evaluate_every is None or run.sharded):
        raise UserError("patience needs an evaluation, evaluate_every, and a model that is not sharded.")

    state = files.load_result() if run.resumed else None
    if state is not None:
        _restore(files, state, identity, learner.load_result)
        run.log(f"{phase}: finished before, loaded.")
        return _finished(run, phase, learner, state.get("step", steps), state["curves"])
    state = files.load(run.log) if run.resumed else None
    start, curves, window = 0, Curves(), Window()
    if state is not None:
        _restore(files, state, identity, learner.load)
        start, curves, window = state["step"], state["curves"], Window(**state["window"])
        patience.load(state.get("patience"))
        state = None  # it is as large as all that it was copied to
    _check_agreed(run, start)

    def save(step: int) -> None:
        finite.judge()
        began = time.monotonic()
        content = {"identity": identity, "step": step, "curves": curves, "window": window.state(), **learner.state()}
        content["patience"] = patience.state()
        if run.is_first:
            files.save(step, content)
        clock.saved(time.monotonic() - began)

    stream = batches(start, run.rank, run.world) if batches else _load(run, phase, dataset, training, start, transform)
    clock = Clock(run.options.save_every, run.options.save_seconds)
    finite = Finite(phase, files.newest, lag=run.fabric.device.type != "cpu", scaled=learner.scaler is not None)
    logs = Scalars(run.dir, phase, curves, write=run.is_first, tensorboard=run.options.tensorboard)
    with Signals() as signals, logs as scalars, Bar(run, phase, start, steps, training.batch_size) as bar:
        done = start
        for step in range(start, steps):
            if (batch := next(stream, None)) is None:
                raise UserError(f"the data ended after {step} of {steps} steps; it must go on without end.")
            run.seed_everything(phase, "step", step, run.rank)
            lr, weight_decay = schedule.at(step)
            learner.set_rates(lr, weight_decay)
            parts = [run.fabric.to_device(part) for part in _cut(batch, training.accumulate)]
            for turn, optimizer in learner.due(step):
                metrics, norm = _update(run, learner, turn, optimizer, parts, (phase, step))
                window.add(turn.name, metrics, norm)
                finite.watch(step, batch.get("index"), metrics["loss"], norm)
            if learner.ema is not None:
                learner.ema.update(learner.objective)

            done = step + 1
            if done % run.options.log_every == 0 or done == steps:
                finite.judge()
                values = {**window.means(run.fabric), "lr": lr, "weight_decay": weight_decay}
                scalars.add(done, values)
                bar.update(done, values)
            if evaluate is not None and (done == steps or training.evaluates(done)):
                values = learner.evaluate(evaluate)
                scalars.add(done, {f"evaluate/{name}": value for name, value in values.items()})
                if training.patience is not None:
                    if "loss" not in values:
                        raise UserError(f"patience watches loss; evaluate gives {', '.join(values) or 'nothing'}.")
                    patience.see(run.fabric.broadcast(values["loss"]), learner.result)
                    if patience.over and done < steps:
                        run.log(f"{phase}: no better loss in {training.patience} evaluations, over after step {done}.")
                        break
            stop, due = _agree(run, done, signals.stop, clock.due(done))
            if done < steps and (stop or due):
                save(done)
            if done < steps and stop:
                run.log(f"{phase}: stopped after step {done} of {steps}.")
                raise Interrupted
    finite.judge()
    if (close := getattr(stream, "close", None)) is not None:
        close()
    if patience.best is not None:
        learner.load_result(patience.best)
    result = {"identity": identity, "step": done, "curves": curves, **learner.result()}
    if run.is_first:
        files.finish(result)
    return _finished(run, phase, learner, done, curves)


def _update(
    run: Run, learner: Learner, turn: Turn, optimizer: Any, parts: list[Batch], key: tuple[str, int]
) -> tuple[dict[str, Tensor], Tensor]:
    """One step of one optimiser over all parts of a batch; returns mean loss and metrics, and the gradients' norm."""
    count, totals = len(parts), {}
    with learner.only(turn):
        for number, part in enumerate(parts):
            # Parts are shares like those of processes, so that they draw what the whole batch would have drawn.
            shard = {"rank": run.rank * count + number, "world": run.world * count}
            generator = ShardedGenerator(run.seed, *key, "objective", turn.name, **shard)
            with run.fabric.no_backward_sync(learner.module, enabled=number + 1 < count):
                out = learner.module(part, generator, turn.name) if turn.name else learner.module(part, generator)
                _check_loss(out, learner.objective)
                run.fabric.backward(out.loss / count)
            for name, value in {**out.metrics, "loss": out.loss}.items():
                value = torch.as_tensor(value).detach() / count
                totals[name] = totals[name] + value if name in totals else value
    norm = learner.clip(turn, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return totals, norm


def _check_phase(run: Run, phase: str) -> None:
    if not re.fullmatch(r"[\w-]+", phase):
        raise UserError(f"a phase's name has letters, digits, - and _, got {phase!r}.")
    if phase in run.phases:
        raise UserError(f"this run has trained a phase {phase!r} already; every phase needs a name of its own.")
    run.phases.append(phase)


def _check_loss(out: Loss, objective: nn.Module) -> None:
    if out.loss.ndim != 0 or not out.loss.requires_grad:
        what = f"shape {tuple(out.loss.shape)}" if out.loss.ndim else "no trained parameter behind it"
        raise UserError(f"{type(objective).__name__} must return a scalar loss to minimise, got one with {what}.")


def _numbers(training: Training) -> dict[str, Any]:
    """The settings that decide the final weights."""
    settings = dataclasses.asdict(training)
    idle = ["workers", "compile", *(["evaluate_every"] if training.patience is None else [])]
    return {key: value for key, value in settings.items() if key not in idle}


def _restore(files: Checkpoints, state: dict[str, Any], identity: dict[str, Any], load: Callable[[Any], None]) -> None:
    """Load a state after checking that it belongs to this phase with these settings."""
    where = f"the checkpoint of {files.phase} in {files.folder}"
    if not isinstance(saved := state.get("identity"), dict):
        raise UserError(f"{where} is not one of isthmus; delete it to train this phase from its start.")
    for key, value in identity.items():
        if saved.get(key) != value:
            raise UserError(
                f"{where} was made with {key} {saved.get(key)}, now it is {value}; resume with the same, or start anew."
            )
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where} does not fit this objective ({reason}); start anew in another --out.") from error


def _check_agreed(run: Run, start: int) -> None:
    """Processes on other machines must see the same checkpoint."""
    if run.fabric.broadcast(start) != start:
        raise UserError(f"process {run.rank} sees another checkpoint than the first; --out must be on a shared disk.")


def _load(
    run: Run, phase: str, dataset: Any, training: Training, start: int, transform: Callable[..., Batch] | None
) -> Iterator[Batch]:
    from isthmus.data import batches

    return batches(
        dataset,
        training.batch_size,
        seed=derive_seed(run.seed, phase, "data"),
        start_step=start,
        rank=run.rank,
        world=run.world,
        transform=transform,  # type: ignore[arg-type] - any such callable will do
        workers=training.workers,
    )


def _cut(batch: Batch, count: int) -> list[Batch]:
    """A batch in equal parts; values that are no tensors or lists go to every part."""
    if count == 1:
        return [batch]
    size = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim) // count
    cuttable = {k for k, v in batch.items() if isinstance(v, (Tensor, list, tuple)) and len(v) == size * count}
    return [{k: v[i * size : (i + 1) * size] if k in cuttable else v for k, v in batch.items()} for i in range(count)]


def _agree(run: Run, step: int, stop: bool, due: bool) -> tuple[bool, bool]:
    """Whether to stop and whether to save, the same on all processes; several ask each other every ten steps."""
    every = run.options.save_every
    if run.world == 1:
        return stop, due
    if step % 10 and (every is None or step % every):
        return False, False
    flags = torch.tensor([float(stop), float(due)], device=run.fabric.device)
    stops, dues = run.fabric.all_reduce(flags, reduce_op="sum").tolist()  # type: ignore[union-attr]
    return stops > 0, dues > 0


def _finished(run: Run, phase: str, learner: Learner, steps: int, curves: Curves) -> FitResult:
    """The same whether the phase was trained now or loaded, the global generators included."""
    run.curves(phase, curves)
    run.seed_everything(phase, "after")
    return FitResult(learner.release(), None if learner.ema is None else learner.ema.module.eval(), steps, curves)
