"""Probes on frozen features: the same with and without keeping them, and the encoder is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from isthmus.data import Memory
from isthmus.data.transforms import Flip, Normalize
from isthmus.decoders.probes import PooledProbe
from isthmus.engine import Run, Training, probing
from isthmus.objectives.classification import Classification


def _images(count: int = 40) -> Memory:
    """Two classes: bright on the left or on the right."""
    label = torch.arange(count) % 2
    g = torch.Generator().manual_seed(0)
    image = (255 * 0.3 * torch.rand(count, 3, 16, 16, generator=g)).to(torch.uint8)
    for i in range(count):
        image[i, :, :, 8 * int(label[i]) : 8 * int(label[i]) + 8] += 150
    return Memory("halves", {"image": image, "label": label}, classes=("left", "right"))


def _head(level: torch.Tensor) -> PooledProbe:
    torch.manual_seed(1)
    return PooledProbe(level.shape[1], 2, grid=2, average=True)


def _accuracy(classifier: Classification) -> float:
    images = _images()
    with torch.no_grad():
        logits = classifier.eval().logits(Normalize()(images.fetch(range(len(images))), torch.Generator())["image"])
    return float((logits.argmax(1) == images.data["label"]).float().mean())


def test_the_first_image_may_be_unreadable(tmp_path: Path) -> None:
    images = Memory("halves", _images().data, bad={0: ("first.png", "it is empty")})
    network, training = timm.create_model("nin_cifar_tiny"), Training(steps=1, batch_size=20)
    with Run.quick(tmp_path) as run:
        probing.probe(run, "probe", probing.Level(network, 1), _head, images, training, Normalize())


def test_probe_learns_without_touching_the_encoder_whether_features_are_kept_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = timm.create_model("nin_cifar_tiny")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training, found = Training(steps=20, batch_size=20, optimizer="sgd", lr=0.1), []
    with Run.quick(tmp_path) as run:
        for kept in (probing._KEPT, 0):
            monkeypatch.setattr(probing, "_KEPT", kept)
            run.phases.clear()  # the same phase again, so that the batches are the same
            classifier = probing.probe(run, "probe", probing.Level(network, 1), _head, _images(), training, Normalize())
            found.append(classifier.head.fc.weight.detach().clone())
            assert _accuracy(classifier) == 1
        run.phases.clear()
        probing.probe(run, "probe", probing.Level(network, 1), _head, _images(), training, Normalize(), Flip())
    torch.testing.assert_close(*found)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_level_tells_levels_of_one_reduction_apart() -> None:
    network = timm.create_model("nin_cifar_tiny", num_classes=0).eval()
    images = torch.rand(2, 3, 16, 16)
    named = network.named_features(images, ["conv2", "conv3"])
    for index, name in ((1, "conv2"), (2, "conv3")):
        (level,) = probing.Level(network, index)(images)
        assert torch.equal(level, named[name])


def test_first_per_class_keeps_the_order_of_the_source() -> None:
    labels = np.array([2, 0, 0, 1, 2, 0, 1, 1])
    assert probing.first_per_class(labels, 2).tolist() == [0, 1, 2, 3, 4, 6]
    assert probing.first_per_class(labels, 100).tolist() == list(range(8))
    assert probing.first_per_class(labels, 0).tolist() == list(range(8))
