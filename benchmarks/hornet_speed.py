"""HorNet: forward pass and training step, beside a plain transcription of the published equations.

    python -m benchmarks.hornet_speed                          # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.hornet_speed --only layers --batches 8
    python -m benchmarks.hornet_speed --only networks --batches 1 --rounds 3

*Layers*: g^n Conv of the four stages of HorNet-T with 7x7 kernels, and of its last two with global filters, on the maps
of a 224 px image. *Networks*: HorNet-T 7x7 and GF, with the same weights and the same numbers coming out; and timm's
ConvNeXt-T and ResNet-50 for orientation.

The limit: HorNet-T has 3.97 billion multiply-adds at 224 px (GF 3.89 without its transforms), 96 % of them in matrix
products that the transcription computes with the same library, so a forward pass can win little. What ours leaves out
is memory traffic (maps stay channels last, so that norms and linear layers need no copies; s is in the kernel, γ in the
sum) and, in training, the slow gradient of depthwise kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from benchmarks.transcription import Case, Settings, familiar, run, warmed
from isthmus.encoders.images.hornet import convert_official
from isthmus.layers.gnconv import GnConv

DEPTHS, WIDTH, SCALE = (2, 3, 18, 2), 64, 1 / 3
SIDES: tuple[int | None, ...] = (None, None, 14, 7)  # of stored global filters


class PlainNorm(nn.Module):
    """Layer norm over the channels of ``(B, C, H, W)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight.view(-1, 1, 1) * x + self.bias.view(-1, 1, 1)


class PlainFilter(nn.Module):
    """Local and global half between two norms."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.pre_norm, self.post_norm = PlainNorm(dim), PlainNorm(dim)
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2, bias=False)
        self.complex_weight = nn.Parameter(torch.zeros(dim // 2, side, side // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        local, whole = self.pre_norm(x).chunk(2, 1)
        spectrum = torch.fft.rfft2(whole, norm="ortho") * torch.view_as_complex(self.complex_weight)
        whole = torch.fft.irfft2(spectrum, s=whole.shape[-2:], norm="ortho")
        return self.post_norm(torch.stack((self.dw(local), whole), 2).flatten(1, 2))


class PlainGnConv(nn.Module):
    """Equations 3.2 to 3.5, one after another."""

    def __init__(self, dim: int, order: int, side: int | None) -> None:
        super().__init__()
        self.dims = [dim // 2 ** (order - 1 - k) for k in range(order)]
        total = sum(self.dims)
        self.proj_in, self.proj_out = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.dwconv = nn.Conv2d(total, total, 7, padding=3, groups=total) if side is None else PlainFilter(total, side)
        self.pws = nn.ModuleList(nn.Conv2d(self.dims[k], self.dims[k + 1], 1) for k in range(order - 1))

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.proj_in(x).split((self.dims[0], sum(self.dims)), 1)
        factors = (self.dwconv(q) * SCALE).split(self.dims, 1)
        p = p * factors[0]
        for pointwise, factor in zip(self.pws, factors[1:], strict=True):
            p = pointwise(p) * factor
        return self.proj_out(p)


class PlainBlock(nn.Module):
    """g^n Conv and feed-forward layer, each with norm, weight and residual."""

    def __init__(self, dim: int, order: int, side: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = PlainNorm(dim), nn.LayerNorm(dim, 1e-6)
        self.gnconv = PlainGnConv(dim, order, side)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1.view(-1, 1, 1) * self.gnconv(self.norm1(x))
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm2(x.permute(0, 2, 3, 1)))))
        return x + (self.gamma2 * y).permute(0, 3, 1, 2)


class PlainHorNet(nn.Module):
    """HorNet-T written down from the paper, in the published layout of names."""

    def __init__(self, filters: bool) -> None:
        super().__init__()
        dims = [WIDTH * 2**i for i in range(4)]
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), PlainNorm(dims[0]))]
        layers += [nn.Sequential(PlainNorm(a), nn.Conv2d(a, 2 * a, 2, 2)) for a in dims[:3]]
        self.downsample_layers = nn.ModuleList(layers)
        self.stages = nn.ModuleList(
            nn.Sequential(*(PlainBlock(dim, i + 2, SIDES[i] if filters else None) for _ in range(DEPTHS[i])))
            for i, dim in enumerate(dims)
        )
        self.norm, self.head = nn.LayerNorm(dims[-1], 1e-6), nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x.mean((2, 3))))


def layers(batch: int, settings: Settings) -> Iterator[Case]:
    """Every stage's layer, in the memory format in which the network runs it."""
    for i, side in ((0, None), (1, None), (2, None), (3, None), (2, 14), (3, 7)):
        dim, cells = WIDTH * 2**i, 56 // 2**i
        ours = warmed(GnConv(dim, order=i + 2, filter=None if side is None else (side, side // 2 + 1)))
        plain = PlainGnConv(dim, i + 2, side)
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(batch, dim, cells, cells, device=settings.device, requires_grad=True)
        kind = "7x7" if side is None else "global filter"
        yield Case(f"order {i + 2}, {kind}, {dim} channels of {cells}x{cells}", {"plain": plain, "ours": ours}, x)


def networks(batch: int, settings: Settings) -> Iterator[Case]:
    """Whole networks."""
    for name in ("hornet_tiny_7x7", "hornet_tiny_gf"):
        plain = warmed(PlainHorNet(filters=name.endswith("gf")))
        ours: Any = timm.create_model(name)
        ours.load_state_dict(convert_official(plain.state_dict()))
        yield Case(name, {"plain": plain, "ours": ours}, settings.images(batch), familiar())


if __name__ == "__main__":
    run("hornet_speed", __doc__, {"layers": layers, "networks": networks})
