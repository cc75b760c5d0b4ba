"""Large depthwise kernels and the networks made of them: forward pass and training step, beside the plain way.

    python -m benchmarks.large_kernel_speed                      # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.large_kernel_speed --only convolutions --batches 8
    python -m benchmarks.large_kernel_speed --only networks --batches 1 --rounds 3

*Convolutions*: ``DepthwiseConv`` against ``torch.nn.Conv2d`` in either memory format and against the FFT, for the maps
that a 224 px image has in the four stages of UniRepLKNet-T, and for maps smaller than the kernels. The limit is the
core's peak, of which the direct way reaches two thirds (see :mod:`isthmus.layers.large_kernel`). *Networks*:
UniRepLKNet-T, ours in training form and merged, against a plain transcription of the published equations (un-merged
branches, ``Conv2d``, NCHW) with the same weights and the same numbers coming out, and timm's ConvNeXt-T and ResNet-50
for orientation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from benchmarks.transcription import Case, Settings, familiar, run, warmed
from isthmus.encoders.images.unireplknet import BRANCHES, convert_official, default_kernels
from isthmus.layers.large_kernel import DepthwiseConv

STAGES = ((80, 56), (160, 28), (320, 14), (640, 7))  # channels, side of the map
SMALL = ((320, 4), (640, 2))  # what is left of a 64 px image in the last stages
KERNELS = ((7, 1), (13, 1), (31, 1), (7, 2), (3, 5))  # side, dilation
DEPTHS, DIMS = (3, 3, 18, 3), (80, 160, 320, 640)


class PlainBranches(nn.Module):
    """The dilated re-param block as published: every branch a convolution and a batch norm, summed."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.lk_origin = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.origin_bn = nn.BatchNorm2d(dim)
        self.branches = BRANCHES[kernel]
        for k, r in self.branches:
            conv = nn.Conv2d(dim, dim, k, padding=r * (k // 2), dilation=r, groups=dim, bias=False)
            self.add_module(f"dil_conv_k{k}_{r}", conv)
            self.add_module(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.origin_bn(self.lk_origin(x))
        for k, r in self.branches:
            y = y + getattr(self, f"dil_bn_k{k}_{r}")(getattr(self, f"dil_conv_k{k}_{r}")(x))
        return y


class PlainNorm(nn.LayerNorm):
    """Layer norm over the channels of ``(B, C, H, W)``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class PlainResponse(nn.Module):
    """Global response normalisation as published."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        n = g / (g.mean(-1, keepdim=True) + 1e-6)
        return (self.gamma * n + 1) * x + self.beta


class PlainSqueeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(dim, dim // 4, 1), nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class PlainBlock(nn.Module):
    """One block of UniRepLKNet as published."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        large = kernel >= 7
        self.dwconv = (
            PlainBranches(dim, kernel) if large else nn.Conv2d(dim, dim, kernel, 1, kernel // 2, 1, dim, bias=False)
        )
        self.norm = nn.BatchNorm2d(dim)
        self.se = PlainSqueeze(dim)
        self.pwconv1 = nn.Sequential(nn.Identity(), nn.Linear(dim, 4 * dim))
        self.act = nn.Sequential(nn.GELU(), PlainResponse(4 * dim))
        self.pwconv2 = nn.Sequential(nn.Linear(4 * dim, dim, bias=False), nn.Identity(), nn.BatchNorm2d(dim))
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x))).permute(0, 2, 3, 1)
        y = self.pwconv2[0](self.act(self.pwconv1(y))).permute(0, 3, 1, 2).contiguous()
        return x + self.pwconv2[2](y) * self.gamma.view(1, -1, 1, 1)


class PlainUniRepLKNet(nn.Module):
    """UniRepLKNet-T written down from the published equations, in the published layout of names."""

    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, DIMS[0] // 2, 3, 2, 1), PlainNorm(DIMS[0] // 2, 1e-6), nn.GELU()]
        stem += [nn.Conv2d(DIMS[0] // 2, DIMS[0], 3, 2, 1), PlainNorm(DIMS[0], 1e-6)]
        downs = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), PlainNorm(b, 1e-6)) for a, b in pairwise(DIMS)]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem), *downs])
        self.stages = nn.ModuleList(
            nn.Sequential(*(PlainBlock(dim, kernel) for kernel in kernels))
            for dim, kernels in zip(DIMS, default_kernels(DEPTHS), strict=True)
        )
        self.norm, self.head = nn.LayerNorm(DIMS[-1], 1e-6), nn.Linear(DIMS[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x.mean((2, 3))))


def convolutions(batch: int, settings: Settings) -> Iterator[Case]:
    """Every map, kernel and way."""
    for channels, side in STAGES + SMALL:
        for kernel, dilation in KERNELS:
            x = torch.randn(batch, channels, side, side, device=settings.device)
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x.contiguous(memory_format=layout).requires_grad_()
                ways: dict[str, Any] = {"conv2d": "direct", "ours": "auto"} | ({"fft": "fft"} if dilation == 1 else {})
                modules = {
                    name: DepthwiseConv(channels, kernel, backend, dilation=dilation, bias=False)
                    for name, backend in ways.items()
                }
                for module in modules.values():
                    module.load_state_dict(modules["conv2d"].state_dict())
                last = ", channels last" if layout == torch.channels_last else ""
                yield Case(f"{channels}x{side}x{side}, kernel {kernel}, dilation {dilation}{last}", modules, given)


def networks(batch: int, settings: Settings) -> Iterator[Case]:
    """UniRepLKNet-T."""
    plain = warmed(PlainUniRepLKNet()).eval()
    ours, merged = timm.create_model("unireplknet_t").eval(), timm.create_model("unireplknet_t", deploy=True).eval()
    ours.load_state_dict(convert_official(plain.state_dict()))
    deployed: Any = copy.deepcopy(ours)
    deployed.reparameterize()
    merged.load_state_dict(deployed.state_dict())
    same = {"plain": plain, "ours": ours, "ours, merged": merged}
    yield Case("unireplknet_t", same, settings.images(batch), familiar(), forward_only=("ours, merged",))


if __name__ == "__main__":
    run("large_kernel_speed", __doc__, {"convolutions": convolutions, "networks": networks})
