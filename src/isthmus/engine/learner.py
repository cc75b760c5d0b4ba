"""Everything of a phase that changes with every step: the objective on its devices, optimisers, moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from isthmus.codec import Turn, UserError
from isthmus.engine import optim
from isthmus.engine.run import Run
from isthmus.engine.sharding import Shell
from isthmus.engine.training import Training

Groups = Sequence[dict[str, Any]]
FUSED = ("adam", "adamw", "sgd", "momentum")
"""Optimisers that torch runs in one pass over the memory, several times faster; not with a gradient scaler."""


class Learner:
    """Sets an objective up for training.

    Args:
        run: whose devices to use.
        objective: a module that holds all that is trained; ``turns`` makes it alternate between optimisers.
        training: optimiser settings, shared by all turns.
        groups: parameter groups of the only optimiser, or by the turn's name.

    Raises:
        UserError: nothing to train, unknown groups, or settings that this strategy cannot do.
    """

    def __init__(
        self, run: Run, objective: nn.Module, training: Training, groups: Groups | Mapping[str, Groups] | None
    ) -> None:
        self.run, self.objective, self.training = run, objective, training
        self.scaler: torch.amp.GradScaler | None = getattr(run.fabric.strategy.precision, "scaler", None)
        self._check(objective, training)
        self.alternates = bool(getattr(objective, "turns", None))
        objective.to(run.fabric.device)
        if run.world > 1 and run.fabric.device.type == "cpu" and _plain_batch_norms(objective):
            run.log("Batch norm is synchronised on GPUs only; here every process normalises its own share of a batch.")
        self._synced = _synchronise_batch_norm(objective) if run.world > 1 and run.fabric.device.type == "cuda" else []
        self.ema = ModelEmaV3(objective, decay=training.ema) if training.ema is not None else None
        if training.compile:
            objective.compile()
        names = {id(p): name for name, p in objective.named_parameters()}
        self.shell = Shell(objective) if run.sharded else None
        self.module = run.fabric.setup_module(self.shell or objective)
        everything = [p for p in objective.parameters() if p.requires_grad]
        self.turns: list[Turn] = list(objective.turns) if self.alternates else [Turn("", everything)]  # type: ignore[arg-type]
        if not everything or not all(turn.parameters for turn in self.turns):
            raise UserError(f"{type(objective).__name__} has no parameters to train; unfreeze some.")
        self._taught = {id(p): p for turn in self.turns for p in turn.parameters}
        # Sharding puts other parameters in the place of those that the caller grouped.
        self._now = {key: p for (key, name) in names.items() if (p := objective.get_parameter(name)) is not None}
        self.optimizers: list[Any] = [run.fabric.setup_optimizers(self._optimizer(turn, groups)) for turn in self.turns]
        self.module.train()

    def _check(self, objective: nn.Module, training: Training) -> None:
        if not isinstance(objective, nn.Module):
            raise UserError(f"an objective is a module that holds what it trains, got {type(objective).__name__}.")
        if training.batch_size % (self.run.world * training.accumulate):
            raise UserError(
                f"batch_size {training.batch_size} cannot be shared by {self.run.world} devices that accumulate "
                f"{training.accumulate} parts each; give a multiple of {self.run.world * training.accumulate}."
            )
        unable = [
            *(["ema"] if training.ema is not None else []),
            *(["lamb"] if training.optimizer.lower().startswith("lamb") else []),
            *(["alternating turns"] if getattr(objective, "turns", None) else []),
            *(["16-mixed precision"] if self.scaler is not None else []),
        ]
        if self.run.sharded and unable:
            raise UserError(f"{' and '.join(unable)} cannot be done on the shares of tensors that fsdp keeps; use ddp.")

    def _optimizer(self, turn: Turn, groups: Groups | Mapping[str, Groups] | None) -> torch.optim.Optimizer:
        t = self.training
        if isinstance(groups, Mapping):
            if unknown := set(groups) - {turn.name for turn in self.turns}:
                raise UserError(f"groups name {', '.join(sorted(unknown))}, and the objective has no such turn.")
            groups = groups.get(turn.name)
        if groups is None:
            mine = {id(p) for p in turn.parameters}
            words = None if t.decay_all else optim.NO_DECAY
            groups = optim.param_groups(self.objective, t.weight_decay, t.layer_decay, t.lr, no_decay=words)
            for group in groups:
                kept = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if id(p) in mine]
                group["names"], group["params"] = [n for n, _ in kept], [p for _, p in kept]
            groups = [group for group in groups if group["params"]]
        groups = [{**group, "params": [self._now.get(id(p), p) for p in group["params"]]} for group in groups]
        groups = optim.complete_groups(groups, t.lr, t.weight_decay)
        extra = dict(t.optimizer_args)
        if t.optimizer.lower() in ("lamb", "lambc"):
            extra.setdefault("max_grad_norm", t.clip)
        if t.optimizer.lower() in FUSED and self.scaler is None:
            extra.setdefault("fused", True)
        rates = {"lr": t.lr, "weight_decay": t.weight_decay, "momentum": t.momentum}
        return optim.create_optimizer(t.optimizer, groups, betas=t.betas, eps=t.eps, **rates, **extra)

    # ----------------------------------------------------------------------------------------------------- stepping

    def set_rates(self, lr: float, weight_decay: float) -> None:
        """Write a step's learning rate and weight decay into every optimiser."""
        for optimizer in self.optimizers:
            optim.set_rates(optimizer, lr, weight_decay)

    def due(self, step: int) -> Iterator[tuple[Turn, Any]]:
        """Turns, with their optimisers, that move at this step."""
        return ((t, o) for t, o in zip(self.turns, self.optimizers, strict=True) if step % t.every == 0)

    @contextlib.contextmanager
    def only(self, turn: Turn) -> Iterator[None]:
        """Let gradients reach this turn's parameters alone."""
        others = self._taught.keys() - {id(p) for p in turn.parameters}
        for key in others:
            self._taught[key].requires_grad_(False)
        try:
            yield
        finally:
            for key in others:
                self._taught[key].requires_grad_(True)

    def clip(self, turn: Turn, optimizer: Any) -> Tensor:
        """Clip this turn's gradients, unless the optimiser does so itself; returns their norm before that."""
        fabric, limit = self.run.fabric, self.training.clip
        if "max_grad_norm" in optimizer.defaults:
            limit = None
        if limit is None:
            fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
            norm = optim.global_norm(turn.parameters)
        else:
            norm = fabric.clip_gradients(self.module, optimizer, max_norm=limit, error_if_nonfinite=False)
        assert norm is not None
        for group in optimizer.param_groups:  # element by element, where a group asks for it
            if group.get("clip_value") is not None:
                torch.nn.utils.clip_grad_value_(group["params"], group["clip_value"])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # ------------------------------------------------------------------------------------------------------- states

    def state(self) -> dict[str, Any]:
        """All that later steps depend on; where the model is sharded, every process must call it."""
        raw = [optimizer.optimizer for optimizer in self.optimizers]
        states = [self.shell.optimizer_state(o) if self.shell is not None else o.state_dict() for o in raw]
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {**self.result(), "optimizers": states, "scaler": scaler}

    def result(self) -> dict[str, Any]:
        """The objective's weights and buffers, and those of the moving average."""
        model = self.shell.model_state() if self.shell is not None else self.objective.state_dict()
        return {"model": model, "ema": None if self.ema is None else self.ema.module.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a :meth:`state`.

        Raises:
            RuntimeError, ValueError, KeyError: it is another objective's or another optimiser's.
        """
        self.load_result(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if self.shell is not None:
                self.shell.load_optimizer_state(optimizer.optimizer, saved)
            else:
                optimizer.optimizer.load_state_dict(saved)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])

    def load_result(self, state: dict[str, Any]) -> None:
        """Take the weights and the moving average of a state, and nothing else of it."""
        if self.shell is not None:
            self.shell.load_model_state(state["model"])
        else:
            self.objective.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])

    def evaluate(self, function: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
        """Call a function with the objective in evaluation mode."""
        self.objective.eval()
        with torch.no_grad(), self.shell.whole() if self.shell is not None else contextlib.nullcontext():
            values = function(self.objective)
        self.objective.train()
        return {name: float(value) for name, value in values.items()}

    def release(self) -> nn.Module:
        """The objective as it was given, trained, in evaluation mode."""
        for parent, name, original in self._synced:
            setattr(parent, name, original)
        if self.shell is not None:
            self.shell.dissolve()
        self.objective._compiled_call_impl = None
        return self.objective.eval()


def _synchronise_batch_norm(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace plain batch norms by synchronised ones that share their tensors; returns what was replaced.

    Subclasses with a meaning of their own (norms over visible pixels) are left to themselves.
    """
    from timm.layers import convert_sync_batchnorm

    found = _plain_batch_norms(model)
    for parent, name, child in found:
        setattr(parent, name, convert_sync_batchnorm(child))
    return found


def _plain_batch_norms(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    from timm.layers import BatchNormAct2d

    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
    return [(m, n, child) for m in model.modules() for n, child in m.named_children() if type(child) in plain]
