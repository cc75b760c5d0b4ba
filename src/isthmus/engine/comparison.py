"""Networks that differ in one thing: all made before the first is trained, the same start and the same budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from isthmus.codec import UserError
from isthmus.engine.run import Run
from isthmus.report import figures


@dataclass
class Trained:
    """A network after training: the moving average of its weights where the training asked for one."""

    model: nn.Module
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


@dataclass
class Arm:
    """One network of a comparison, trained and measured."""

    name: str
    model: nn.Module
    metrics: dict[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]


class Comparison:
    """Trains and measures networks one after the other and keeps what was found.

    Every arm is built on the meta device first, so that what cannot be built is told before hours of training; then
    each starts from the same random state. ``run.metric`` gets ``METRIC_ARM`` for every metric, and
    ``parameters_ARM`` where that is none of them.

    Args:
        run: which run records.
        makers: the arms, name to ``make() -> nn.Module``.
        train: ``train(name, model) -> Trained``, the same for all.
        measure: ``measure(model) -> {metric: value}``.
        published: the paper's figures, by the name of the metric, ``METRIC_ARM``.
        start: key of the random state that every arm starts from.

    Raises:
        UserError: no arm, or one that cannot be built.
    """

    def __init__(
        self,
        run: Run,
        makers: Mapping[str, Callable[[], nn.Module]],
        train: Callable[[str, nn.Module], Trained],
        measure: Callable[[nn.Module], Mapping[str, float]],
        published: Mapping[str, str] | None = None,
        start: str = "network",
    ) -> None:
        check_arms(makers)
        self.run, self.arms = run, dict[str, Arm]()
        for name, make in makers.items():
            run.seed_everything(start)
            trained = train(name, make())
            found = dict(measure(trained.model))
            for metric, value in found.items():
                run.metric(f"{metric}_{name}", value, published=(published or {}).get(f"{metric}_{name}"))
            if "parameters" not in found:
                run.metric(f"parameters_{name}", count_parameters(trained.model), unit="parameters")
            self.arms[name] = Arm(name, trained.model, found, trained.curves)

    def __getitem__(self, name: str) -> Arm:
        return self.arms[name]

    def __contains__(self, name: object) -> bool:
        return name in self.arms

    @property
    def first(self) -> Arm:
        """The arm that was named first: the one that is kept for use."""
        return next(iter(self.arms.values()))

    def values(self, metric: str) -> dict[str, float]:
        """One metric of every arm that has it."""
        return {name: arm.metrics[metric] for name, arm in self.arms.items() if metric in arm.metrics}

    def over(self, ours: str, metric: str) -> dict[str, float]:
        """How much larger a metric of ``ours`` is than that of every other arm; recorded as ``METRIC_over_ARM``."""
        values = self.values(metric)
        if ours not in values:
            return {}
        margins = {name: values[ours] - value for name, value in values.items() if name != ours}
        for name, margin in margins.items():
            self.run.metric(f"{metric}_over_{name}", margin)
        return margins

    def bars(self, metric: str, caption: str, grey: str = "untrained", name: str = "") -> None:
        """Draw one metric of every arm; arms whose name contains ``grey`` stand back."""
        self.run.figure(name or f"{metric}_by_arm", figures.bars(self.values(metric), metric, grey=grey), caption)

    def lines(self, curve: str) -> dict[str, list[tuple[float, float]]]:
        """One curve of training of every arm that has it, for :func:`isthmus.report.figures.lines`."""
        found = {name: arm.curves.get(curve, ()) for name, arm in self.arms.items()}
        return {name: [(float(step), value) for step, value in points] for name, points in found.items() if points}


def check_arms(makers: Mapping[str, Callable[[], Any]]) -> None:
    """Build every arm without memory and without drawing a weight.

    Raises:
        UserError: no arm; or what its constructor refuses, with the arm's name.
    """
    if not makers:
        raise UserError("nothing to compare: name at least one network.")
    for name, make in makers.items():
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                make()
        except ValueError as error:  # a constructor's sentence about what it was given
            raise UserError(str(error) if name in str(error) else f"{name}: {error}") from error
        except (NotImplementedError, RuntimeError):
            continue  # it looks at its own weights while it is made; what is wrong with it comes out in its turn


def count_parameters(model: nn.Module) -> int:
    """All parameters of a network, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())
