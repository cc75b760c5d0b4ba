"""15-linearscope: frozen affine maps of three networks, built densely from the published rules by the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.lenses.linear_scope import LinearScope
from tests.parity.case import Case, UnknownCase


class _SuperResolution(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv4 = nn.Conv2d(channels, 4 * inputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.conv1(x).relu_()
        y = F.silu(self.conv3(F.leaky_relu(self.conv2(kept), 0.2)))
        return F.pixel_shuffle(self.conv4(y + kept), 2)


class _Classifier(nn.Module):
    def __init__(self, inputs: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, classes, 3)
        self.bn = nn.BatchNorm2d(classes)
        self.fc = nn.Linear(classes, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        return self.fc(self.bn(self.conv2(x)).relu().mean((2, 3)))


class _ImageToImage(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.norm = nn.InstanceNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(channels, inputs, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(torch.sigmoid(self.conv2(self.norm(self.conv1(x)).relu()))))


def outputs(case: Case) -> dict[str, Tensor]:
    config = case.config
    networks = {
        "sr": lambda: _SuperResolution(config["in_ch"], config["channels"]),
        "cls": lambda: _Classifier(config["in_ch"], config["channels"], config["extra"]),
        "i2i": lambda: _ImageToImage(config["in_ch"], config["channels"]),
    }
    if case.object != "frozen affine map" or config["kind"] not in networks:
        raise UnknownCase(case.object)
    network = networks[config["kind"]]().eval()
    missing = network.load_state_dict(case.params, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    scope = LinearScope(network.double(), case.inputs["x"].double())
    column, row = scope.x.numel() // 2, scope.y.numel() // 2
    count = len(case.expected["singular_values"])
    svd = scope.svd(count, sweeps=200)
    rank1 = svd.s[0] * svd.u[0].reshape(-1, 1) * svd.v[0].reshape(1, -1)
    return {
        "y": scope.y,
        "F": scope.matrix(),
        "r": scope.residual.flatten(),
        "singular_values": svd.s,
        "column_mid": scope.columns([column])[0].reshape(case.expected["column_mid"].shape),
        "row_mid": scope.rows([row])[0],
        "contribution": scope.contribution(row),
        "rank1": rank1[: len(case.expected["rank1"])],
    }
