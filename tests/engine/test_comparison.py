"""Arms of a comparison are made before the first is trained, from one random state, and recorded by name."""

import json

import pytest
import torch
from torch import nn

from isthmus.codec import UserError
from isthmus.engine import Run
from isthmus.engine.comparison import Comparison, Trained


def _record(run):
    return json.loads((run.dir / "report.json").read_text())["metrics"]


def test_every_arm_starts_from_the_same_weights(tmp_path):
    starts = {}

    def train(name, model):
        starts[name] = model.weight.detach().clone()
        torch.rand(len(name))  # training draws a different amount in every arm
        return Trained(model)

    with Run.quick(tmp_path) as run:
        Comparison(run, {"a": lambda: nn.Linear(3, 2), "bcd": lambda: nn.Linear(3, 2)}, train, lambda model: {})
    assert torch.equal(starts["a"], starts["bcd"])


def test_an_arm_that_cannot_be_built_is_told_before_the_first_is_trained(tmp_path):
    def refuse():
        raise UserError("width 0 is too small.")

    def train(name, model):
        raise AssertionError("trained too early")

    with Run.quick(tmp_path) as run, pytest.raises(UserError, match="wide: width 0 is too small"):
        Comparison(run, {"good": lambda: nn.Linear(3, 2), "wide": refuse}, train, lambda model: {})


def test_metrics_are_recorded_by_arm_with_their_margins(tmp_path):
    values = iter([{"accuracy": 0.9}, {"accuracy": 0.7}])
    with Run.quick(tmp_path) as run:
        arms = Comparison(
            run,
            {"ours": lambda: nn.Linear(3, 2), "twin": lambda: nn.Linear(3, 1)},
            lambda name, model: Trained(model, {"loss": [(1, 0.5)]}),
            lambda model: next(values),
            published={"accuracy_ours": "0.95"},
        )
        margins = arms.over("ours", "accuracy")
        metrics = _record(run)
    assert margins == {"twin": pytest.approx(0.2)}
    assert metrics["accuracy_over_twin"]["value"] == pytest.approx(0.2)
    assert metrics["accuracy_ours"]["published"] == "0.95"
    assert metrics["parameters_twin"]["value"] == 4
    assert arms.first.name == "ours"
    assert arms.lines("loss") == {"ours": [(1.0, 0.5)], "twin": [(1.0, 0.5)]}


def test_an_architecture_that_looks_at_its_own_weights_can_be_an_arm(tmp_path):
    def make():
        layer = nn.Linear(2, 2)
        assert isinstance(layer.weight.sum().item(), float)
        return layer

    with Run.quick(tmp_path) as run:
        assert "odd" in Comparison(run, {"odd": make}, lambda name, model: Trained(model), lambda model: {})
