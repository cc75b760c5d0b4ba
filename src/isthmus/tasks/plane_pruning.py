"""The plane sets of relevance pruning: one small network a set, a third of its units cut in one shot."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.compression.filter_scores import Criterion, filter_scores
from isthmus.compression.ranking import lowest
from isthmus.compression.surgery import Surgery
from isthmus.data import load
from isthmus.encoders.signals.plane_net import PlaneNet
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.objectives.classification import Classification
from isthmus.report import figures

SETS = ("moon", "circle", "spiral")
#: Taylor three ways: signs dropped over all samples and layers normalised or not, and signs dropped for each sample.
CRITERIA: dict[str, dict[str, Any]] = {
    "relevance": {"name": "relevance"},
    "taylor": {"name": "taylor"},
    "taylor_plain": {"name": "taylor", "normalize": "none"},
    "taylor_sample": {"name": "taylor", "absolute": "sample"},
    "gradient": {"name": "gradient"},
    "weight": {"name": "weight"},
    "random": {"name": "random"},
}
TAYLORS = ("taylor", "taylor_plain", "taylor_sample")


@dataclass
class Table:
    """Accuracies by set, references a class and criterion, one for every draw of references."""

    full: dict[str, float] = field(default_factory=dict)
    found: dict[tuple[str, int, str, bool], list[float]] = field(default_factory=dict)
    lost: float = 0.0  # largest difference between cut and silenced networks

    def mean(self, shots: int, criterion: str, equal: bool = False, sets: Sequence[str] = SETS) -> float:
        values = [self.found[kind, shots, criterion, equal] for kind in sets]
        return sum(sum(v) / len(v) for v in values) / len(values)


def compare(
    run: Run,
    training: Training,
    width: int,
    last: bool,
    composite: str,
    share: float,
    shots: Sequence[int],
    draws: int,
) -> None:
    """Train on every set, prune by every criterion; record accuracies and gains, and draw what is left.

    Args:
        run: gets metrics and figures.
        training: of every network.
        width: units of a hidden layer.
        last: see :class:`PlaneNet`.
        composite: rules of relevance.
        share: of the units that are cut.
        shots: references a class.
        draws: of references.
    """
    table, figure = _measured(run, training, width, last, composite, share, shots, draws)
    for kind, value in table.full.items():
        run.metric(f"plane_accuracy_{kind}_full", value)
    for few in shots:
        for criterion in CRITERIA:
            for kind in SETS:
                run.metric(f"plane_accuracy_{kind}_{criterion}_{few}", table.mean(few, criterion, sets=[kind]))
            run.metric(f"plane_accuracy_{criterion}_{few}", table.mean(few, criterion))
            run.metric(f"plane_equal_accuracy_{criterion}_{few}", table.mean(few, criterion, equal=True))
        ours = table.mean(few, "relevance")
        run.metric(f"plane_gain_over_taylor_{few}", ours - max(table.mean(few, name) for name in TAYLORS))
        run.metric(f"plane_gain_over_gradient_{few}", ours - table.mean(few, "gradient"))
        run.metric(f"plane_gain_over_random_{few}", ours - table.mean(few, "random"))
    run.metric("plane_cut_difference", table.lost)
    lines = {c.replace("_", " "): [(few, table.mean(few, c)) for few in sorted(shots)] for c in CRITERIA}
    drawn = figures.lines(lines, "references a class", "accuracy, mean of three sets", log_x=True)
    run.figure("plane", drawn, f"A share of {share:.0%} of the units cut in one shot, ranked over all layers.")
    run.figure("decisions", figure, "What networks predict in the plane, whole and with units cut.")


def _measured(
    run: Run,
    training: Training,
    width: int,
    last: bool,
    composite: str,
    share: float,
    shots: Sequence[int],
    draws: int,
) -> tuple[Table, Figure]:
    table = Table()
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    panels = figure.subplots(3, 4)
    for row, kind in enumerate(SETS):
        train = load(f"planar:{kind}", "train", ("signal", "label"), run.seed)
        test: Any = load(f"planar:{kind}", "test", ("signal", "label"), run.seed)
        x, label = train.data["signal"], train.data["label"]  # type: ignore[attr-defined]
        classes = len(train.classes or ())
        run.seed_everything("network", kind)
        network: nn.Module = PlaneNet(classes, width, last)
        result: Any = fit(run, kind, Classification(network, key="signal"), train, training)
        network = (result.objective if result.ema is None else result.ema).model.cpu().eval()
        table.full[kind] = _accuracy(network, test)
        layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][:-1]
        number = round(share * len(layers) * width)
        example: dict[str, nn.Module] = {"all units": network}
        for few in shots:
            for draw in range(draws):
                chosen = _references(label, few, classes, run.generator("references", kind, few, draw))
                batch = [(x[chosen], label[chosen])]
                for criterion, settings in CRITERIA.items():
                    ranked = Criterion(composite=composite, **settings)
                    scores = filter_scores(network, batch, ranked, layers, run.generator(kind, few, draw))
                    for equal in (False, True):
                        plan = lowest(scores, number, equal=equal)
                        silent = _silenced(network, plan)
                        table.found.setdefault((kind, few, criterion, equal), []).append(_accuracy(silent, test))
                        if draw == 0 and few == sorted(shots)[len(shots) // 2] and not equal:
                            if criterion == "relevance":
                                table.lost = max(table.lost, _difference(network, silent, plan, x))
                            if criterion in ("relevance", "taylor", "weight"):
                                example[criterion] = silent
        for axis, (name, shown) in zip(panels[row], example.items(), strict=True):
            _decisions(axis, shown, test, f"{kind}, {name}" if name == "all units" else name)
        run.log(f"{kind}: {table.full[kind]:.3f} with all units.")
    return table, figure


# -------------------------------------------------------------------------------------------------------------- parts


def _references(label: Tensor, few: int, classes: int, generator: torch.Generator) -> Tensor:
    """Numbers of ``few`` samples of each class."""
    order = torch.randperm(len(label), generator=generator)
    return torch.cat([order[label[order] == one][:few] for one in range(classes)])


def _silenced(network: nn.Module, plan: Sequence[tuple[str, int]]) -> nn.Module:
    """A copy whose units of the plan answer zero: the numbers of the cut network, without cutting every time."""
    silent = copy.deepcopy(network)
    with torch.no_grad():
        for layer in {layer for layer, _ in plan}:
            units = [unit for name, unit in plan if name == layer]
            module: Any = silent.get_submodule(layer)
            module.weight[units] = 0
            module.bias[units] = 0
    return silent


@torch.no_grad()
def _difference(network: nn.Module, silent: nn.Module, plan: Sequence[tuple[str, int]], x: Tensor) -> float:
    """Between the network that was really cut and the silenced one."""
    cut = copy.deepcopy(network)
    layers = {layer: [unit for name, unit in plan if name == layer] for layer, _ in plan}
    Surgery(cut, x[:1]).remove(layers)
    return float((cut(x) - silent(x)).abs().max())


@torch.no_grad()
def _accuracy(network: nn.Module, test: Any) -> float:
    return float((network(test.data["signal"]).argmax(1) == test.data["label"]).float().mean())


@torch.no_grad()
def _decisions(axis: Any, network: nn.Module, test: Any, title: str) -> None:
    """What the network predicts everywhere, with the test points on it."""
    line = torch.linspace(-1.8, 1.8, 90)
    places = torch.cartesian_prod(line, line)
    predicted = network(places).argmax(1).view(90, 90).T.numpy()
    axis.imshow(predicted, origin="lower", extent=(-1.8, 1.8, -1.8, 1.8), cmap="Pastel1", vmin=0, vmax=8)
    points, label = test.data["signal"][:300], test.data["label"][:300]
    axis.scatter(*points.T.numpy(), c=label.numpy(), cmap="Set1", vmin=0, vmax=8, s=4, linewidths=0)
    axis.set_title(f"{title}: {_accuracy(network, test):.3f}", fontsize=9)
    axis.axis("off")
