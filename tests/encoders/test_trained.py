"""Weights that people have: levels, prefixes, published names, other sizes, files that are none."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import isthmus.encoders  # noqa: F401 - registers the CIFAR networks
from isthmus.codec import UserError
from isthmus.encoders.images.resnet_cifar import CifarResNet
from isthmus.encoders.trained import trained
from tests.conftest import shared_folder


def published(network: CifarResNet) -> dict[str, torch.Tensor]:
    """The state dict under akamaster's names."""
    names = {}
    for key, tensor in network.state_dict().items():
        if key.startswith("stages.conv1."):
            key = {"0": "conv1", "1": "bn1"}[key.split(".")[2]] + "." + key.split(".")[3]
        elif key.startswith("stages.conv"):
            key = f"layer{int(key[11]) - 1}{key[12:]}"
        else:
            key = key.replace("head.classifier", "linear")
        if not key.endswith("num_batches_tracked"):
            names[key] = tensor.clone()
    return names


def test_published_names_levels_and_prefixes_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet20", num_classes=7).eval()
    images = torch.rand(2, 3, 32, 32)
    under_published_names = published(network)
    save_file(under_published_names, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in under_published_names.items()}}, tmp_path / "b.pth")
    save_file(network.state_dict(), tmp_path / "c.safetensors")
    for file in ("a.safetensors", "b.pth", "c.safetensors"):
        loaded = trained("cifar_resnet20", tmp_path / file)
        assert not loaded.training
        assert torch.equal(loaded(images), network(images)), "seven classes are read off the file"


def test_what_training_scripts_of_timm_write_loads_and_is_said(tmp_path: Path) -> None:
    """A moving average beside the weights, arguments, an optimiser; counters of batch norm that are not there."""
    torch.manual_seed(0)
    plain, averaged = (timm.create_model("resnet10t", num_classes=4).eval() for _ in range(2))
    content = {
        "state_dict": {f"module.{n}": t for n, t in plain.state_dict().items() if "num_batches" not in n},
        "state_dict_ema": averaged.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "metric": np.float64(81.2),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
    }
    torch.save(content, tmp_path / "last.pth.tar")
    images, told = torch.rand(1, 3, 64, 64), []
    with torch.no_grad():
        assert torch.equal(trained("resnet10t", tmp_path / "last.pth.tar", log=told.append)(images), plain(images))
        assert torch.equal(trained("resnet10t", tmp_path / "last.pth.tar", ema=True)(images), averaged(images))
    assert "took 'state_dict'" in told[0]
    assert "left out state_dict_ema (a moving average), args, metric, optimizer" in told[0]


def test_archives_of_numpy_go_through_timm(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="does not fit vit_tiny_patch16_224"):
        trained("vit_tiny_patch16_224", tmp_path / "a.npz", depth=1)
    with pytest.raises(UserError, match="resnet10t reads no archives of NumPy"):
        trained("resnet10t", tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is no archive of NumPy"):
        trained("vit_tiny_patch16_224", tmp_path / "b.npz")


def test_one_tensor_too_many_is_named(tmp_path: Path) -> None:
    state = {**timm.create_model("resnet10t").state_dict(), "aux.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"does not fit resnet10t: it has aux.bias, which the model does not have\."):
        trained("resnet10t", tmp_path / "c.pth")


def test_says_what_does_not_fit(tmp_path: Path) -> None:
    save_file(timm.create_model("cifar_resnet20").state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(UserError, match=r"does not fit cifar_resnet32: it lacks"):
        trained("cifar_resnet32", tmp_path / "small.safetensors")
    with pytest.raises(UserError, match=r"head.classifier.weight is \(10, 64\), the model's is \(3, 64\)"):
        trained("cifar_resnet20", tmp_path / "small.safetensors", num_classes=3)
    with pytest.raises(UserError, match="there is no checkpoint"):
        trained("cifar_resnet20", tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(UserError, match="read safely"):
        trained("cifar_resnet20", tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no network"):
        trained("cifar_resnet20", tmp_path / "empty.pth")


def test_sizes_and_published_weights() -> None:
    counts = {"cifar_resnet20": 269_722, "cifar_resnet56": 853_018, "cifar_resnet110": 1_727_962}
    for name, count in counts.items():
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == count
    shared = shared_folder()
    if shared is None or not (shared / "weights").is_dir():
        pytest.skip("no published weights here")
    for depth in (20, 56):
        trained(f"cifar_resnet{depth}", shared / "weights" / f"cifar10-resnet{depth}.safetensors")


def test_odd_maps_halve_as_the_shortcut_does() -> None:
    network = timm.create_model("cifar_resnet20").eval()
    assert network(torch.rand(1, 3, 33, 31)).shape == (1, 10)
    features = network.forward_intermediates(torch.rand(1, 3, 33, 31), intermediates_only=True)
    assert [tuple(f.shape[1:]) for f in features] == [(16, 33, 31), (32, 17, 16), (64, 9, 8)]
    with pytest.raises(ValueError, match="at least 1"):
        CifarResNet(blocks=0)
