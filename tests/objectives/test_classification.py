"""Classification: the loss is the one the papers write, and frozen encoders stay as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.objectives.classification import Classification


def _batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"image": torch.randn(6, 3, 4, 4, generator=g), "label": torch.arange(6) % 3}


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten())


def test_smoothing_gives_every_class_its_share() -> None:
    objective, batch = Classification(_network(), nn.Linear(20, 3), smoothing=0.3).eval(), _batch()
    soft = F.one_hot(batch["label"], 3) * 0.7 + 0.1
    hard, softened = objective(batch, torch.Generator()), objective({**batch, "label": soft}, torch.Generator())
    torch.testing.assert_close(hard.loss, softened.loss)
    assert hard.metrics["accuracy"] == softened.metrics["accuracy"]


def test_binary_loss_asks_every_class_by_itself() -> None:
    objective, batch = Classification(_network(), nn.Linear(20, 3), binary=True, smoothing=0.3).eval(), _batch()
    probability = objective.logits(batch["image"]).sigmoid()
    target = F.one_hot(batch["label"], 3) * 0.7 + 0.1
    by_hand = -(target * probability.log() + (1 - target) * (1 - probability).log()).mean()
    torch.testing.assert_close(objective(batch, torch.Generator()).loss, by_hand)


def test_frozen_encoder_keeps_weights_statistics_and_mode() -> None:
    encoder = _network()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    objective = Classification(encoder, nn.Linear(20, 3), frozen=True).train()
    assert objective.head.training
    assert not encoder.training
    result = objective(_batch(), torch.Generator())
    result.loss.backward()
    torch.optim.SGD(objective.parameters(), 0.1).step()
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert objective.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.parameters())


def test_whole_classifier_learns_and_moves_its_statistics() -> None:
    network = nn.Sequential(*_network(), nn.Linear(20, 3))
    objective, batch = Classification(network), _batch()
    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    for _ in range(30):
        optimizer.zero_grad()
        result = objective(batch, torch.Generator())
        result.loss.backward()
        optimizer.step()
    assert result.metrics["accuracy"] == 1
    assert network[1].running_mean.abs().sum() > 0


def test_labels_that_are_no_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[0, 3\), got 0 to 3"):
        Classification(_network(), nn.Linear(20, 3))({**_batch(), "label": torch.tensor([0, 1, 2, 3, 0, 0])}, None)
