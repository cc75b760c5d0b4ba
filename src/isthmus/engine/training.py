"""What a phase of training is told: how long, how fast, with which optimiser. Plain data, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from isthmus.bounds import Count, Natural, Positive, Range, Share, at_least, check_made
from isthmus.codec import UserError
from isthmus.engine.optim import Schedule


@dataclass(frozen=True)
class Training:
    """Settings of one phase.

    Raises:
        UserError: a value is out of range; the sentence names the field and what it may be.
    """

    steps: Count | None = None
    """Length in optimiser steps; give this or ``epochs``."""
    epochs: Positive | None = None
    """Length in passes over the data (the rest of a pass that fills no batch is left out)."""
    batch_size: Count = 64
    """Samples that one optimiser step sees, over all devices and accumulated parts together."""
    optimizer: str = "adamw"
    """Any optimiser name of timm: adamw, lamb, sgd (with Nesterov's momentum), momentum (without), …"""
    lr: Positive = 1e-3
    """Peak learning rate, for this batch size."""
    betas: tuple[Annotated[float, Range(0, 1, most_open=True)], ...] | None = None
    """Averaging factors of Adam-like optimisers; None is the optimiser's own."""
    eps: Annotated[float, at_least(0)] | None = None
    """Term in the denominator of Adam-like optimisers; None is the optimiser's own."""
    momentum: Annotated[float, Range(0, 1, most_open=True)] = 0.9
    """Momentum of SGD-like optimisers."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Weight decay at the first step, for parameters that decay."""
    weight_decay_end: Annotated[float, at_least(0)] | None = None
    """Weight decay at the last step, reached along a cosine; None keeps it constant."""
    decay_all: bool = False
    """Decay norms, biases and tokens as well (older convnet recipes do)."""
    schedule: Literal["cosine", "linear", "multistep", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up; give this or ``warmup_epochs``."""
    warmup_epochs: Annotated[float, at_least(0)] = 0.0
    """Epochs of linear warm-up."""
    warmup_from: Share = 0.005
    """Learning rate at the first step, as a share of the peak."""
    final_lr_ratio: Share = 0.001
    """Learning rate at the last step of the cosine and linear schedules, as a share of the peak."""
    milestones: tuple[Positive, ...] = ()
    """Where "multistep" lowers the learning rate: in epochs where the length is in epochs, in steps otherwise."""
    gamma: Positive = 0.1
    """Factor that "multistep" lowers it by at every milestone."""
    clip: Positive | None = None
    """Largest global gradient norm; LAMB clips inside itself, with this value."""
    accumulate: Count = 1
    """Parts that a batch is cut into, to save memory; for mean losses the step is that of the whole batch."""
    ema: Annotated[float, Range(0, 1, True, True)] | None = None
    """Decay of the exponential moving average of the weights, such as 0.9999; None keeps none."""
    layer_decay: Annotated[float, Range(0, 1, least_open=True)] = 1.0
    """Factor on the learning rate for every layer further from the output."""
    compile: bool = False
    """Run the objective through torch.compile."""
    workers: Natural = 0
    """Processes that decode samples ahead of the loop."""
    evaluate_every: Count | None = None
    """Steps between two evaluations during training; only after the last step without it."""
    patience: Count | None = None
    """Evaluations without a lower loss after which training ends with its best weights; None trains to the end."""
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the optimiser, such as {"always_adapt": True}."""

    def __post_init__(self) -> None:
        check_made(self)
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"give either steps or epochs, got steps={self.steps} and epochs={self.epochs}.")
        if self.warmup_steps and self.warmup_epochs:
            raise UserError(f"give warmup_steps or warmup_epochs, got {self.warmup_steps} and {self.warmup_epochs}.")
        if self.schedule not in ("cosine", "linear", "multistep", "constant"):
            raise UserError(f"schedule must be cosine, linear, multistep or constant, got {self.schedule!r}.")
        if bool(self.milestones) != (self.schedule == "multistep"):
            raise UserError(f'milestones go with schedule="multistep", got {self.milestones} and {self.schedule!r}.')
        if self.accumulate > 0 and self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} cannot be cut into {self.accumulate} equal parts.")

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after ``step`` steps."""
        return self.evaluate_every is not None and step % self.evaluate_every == 0

    def length(self, samples: int | None, flag: str = "") -> int:
        """Optimiser steps over a source of so many samples; ``flag`` such as ``--pretrain`` makes errors name flags.

        Raises:
            UserError: the length is in epochs and the source has no length, or less than a batch.
        """
        if self.steps is not None:
            return self.steps
        if samples is None:
            told = f"give {named('steps', flag)} instead"
            raise UserError(f"this source has no length, so epochs mean nothing for it; {told}.")
        assert self.epochs is not None
        return max(1, round(self.epochs * self.steps_per_epoch(samples, flag)))

    def steps_per_epoch(self, samples: int | None, flag: str = "") -> int:
        """Whole batches in one pass over so many samples."""
        if samples is None:
            return 1
        if samples < self.batch_size:
            raise UserError(
                f"the source has {samples} samples, fewer than one batch of {self.batch_size}; "
                f"lower {named('batch_size', flag)}."
            )
        return samples // self.batch_size

    def schedule_for(self, samples: int | None, steps: int, flag: str = "") -> Schedule:
        """Learning rate and weight decay over ``steps`` steps; a capped run passes through the whole shape, faster."""
        full, epoch = self.length(samples, flag), self.steps_per_epoch(samples, flag)
        warmup = self.warmup_steps or self.warmup_epochs * epoch
        unit = 1 if self.epochs is None else epoch
        if warmup >= full:
            raise UserError(
                f"the warm-up of {warmup:g} steps must be shorter than the phase of {full} steps; lower "
                f"{named('warmup_steps', flag)} or {named('warmup_epochs', flag)}, or train longer."
            )
        return Schedule(
            lr=self.lr,
            steps=steps,
            weight_decay=self.weight_decay,
            weight_decay_end=self.weight_decay_end,
            shape=self.schedule,
            warmup_steps=round(warmup * steps / full),
            warmup_from=self.warmup_from,
            final_lr_ratio=self.final_lr_ratio,
            milestones=tuple(round(m * unit * steps / full) for m in self.milestones),
            gamma=self.gamma,
        )


def named(field: str, flag: str) -> str:
    """A field of ``Training`` as a person sets it: ``--pretrain.batch-size``, or its name where there is no flag."""
    return f"{flag}.{field.replace('_', '-')}" if flag else field


def flag_of(config: Any, training: Training) -> str:
    """The flag of the settings that a recipe's config has for a phase; empty where it has none such."""
    if not is_dataclass(config) or isinstance(config, type):
        return ""
    given = {f"--{field.name.replace('_', '-')}": getattr(config, field.name) for field in fields(config)}
    same = [flag for flag, value in given.items() if value is training]
    equal = [flag for flag, value in given.items() if isinstance(value, Training) and value == training]
    return next(iter(same or equal), "")
