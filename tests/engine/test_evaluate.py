"""Evaluation counts every sample once, whatever the batch; a try-out looks at one batch."""

import pytest
import torch
from torch import nn

from isthmus.data import load
from isthmus.engine import Run
from isthmus.engine.evaluate import accuracy, confusion_matrix, evaluate


class Constant(nn.Module):
    """Predicts one class for every picture."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.eye(10)[label])

    def forward(self, x):
        return self.scores.expand(len(x), -1)


@pytest.fixture
def digits():
    return load("digits", "test", ("image", "label"))


def test_the_confusion_matrix_has_every_sample_in_its_true_row(tmp_path, digits):
    with Run.quick(tmp_path) as run:
        table = confusion_matrix(run, Constant(3), digits, 10)
    labels = torch.stack([digits[i]["label"] for i in range(len(digits))])
    assert table[:, 3].tolist() == labels.bincount(minlength=10).tolist()
    assert table.sum() == len(digits)
    assert accuracy(table) == pytest.approx(float((labels == 3).float().mean()))


@pytest.mark.parametrize("batch_size", [7, 256])
def test_a_function_is_averaged_over_samples_and_not_over_batches(tmp_path, digits, batch_size):
    right = {"right": lambda predicted, batch: (predicted.argmax(1) == batch["label"]).float()}
    with Run.quick(tmp_path) as run:
        found = evaluate(run, Constant(3), digits, right, batch_size=batch_size)
        table = confusion_matrix(run, Constant(3), digits, 10)
    assert float(found["right"]) == pytest.approx(accuracy(table), abs=1e-7)


def test_a_metric_of_torchmetrics_is_updated_and_computed(tmp_path, digits):
    from torchmetrics.classification import MulticlassAccuracy

    with Run.quick(tmp_path) as run:
        found = evaluate(run, Constant(3), digits, {"accuracy": MulticlassAccuracy(10, average="micro")})
        table = confusion_matrix(run, Constant(3), digits, 10)
    assert float(found["accuracy"]) == pytest.approx(accuracy(table), abs=1e-6)


def test_a_try_out_measures_a_few_samples(tmp_path, digits):
    with Run.quick(tmp_path, max_steps=2) as run:
        assert confusion_matrix(run, Constant(3), digits, 10).sum() == 64
