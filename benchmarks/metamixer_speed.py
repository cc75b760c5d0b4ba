"""FFNet, trained form and merged, beside a plain transcription of the published equations.

    python -m benchmarks.metamixer_speed                           # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.metamixer_speed --only mixers --batches 8 --no-record
    python -m benchmarks.metamixer_speed --only networks --batches 1 --rounds 3

*Mixers*: FFNified attention with 7x7 kernels on the maps of FFNet-2's last two stages, plain, ours, ours merged, and
self-attention of the same width for orientation. *Networks*: FFNet-1 and -2, with the same weights and the same
numbers out. *Forecasters*: the ETTh1 network, 51-tap kernels in time.

The limit: FFNet-2 takes 6.0e9 multiply-adds at 256 pixels (4.6e9 at 224), nine tenths of them in 1x1 convolutions,
which run at the speed of a matrix product. What merging saves is the rest: of every 7x7 unit two normalisations, one
3x3 convolution and one sum, each of which reads and writes the whole map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.transcription import Case, Settings, familiar, run, warmed
from isthmus.encoders.images import metamixer
from isthmus.encoders.signals import metamixer_forecaster
from isthmus.encoders.signals.metamixer_forecaster import MetaMixerForecaster
from isthmus.layers.metamixer import convert_blocks, ffnified_attention, reparameterize, self_attention

OPERATORS = (3, 3, 7, 7)
#: Depths, widths, and the kernel of the channel mixers.
SIZES = {1: ((2, 2, 8, 2), (80, 160, 320, 640), 3), 2: ((3, 3, 15, 3), (88, 176, 352, 704), 7)}


def conv_bn(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    part = nn.Sequential()
    part.add_module("c", nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False))
    part.add_module("bn", nn.BatchNorm2d(c_out))
    return part


class PlainUnit(nn.Module):
    """7x7 + BN and 3x3 + BN, added."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv_bn(c_in, c_out, 7, stride, c_in)
        self.conv1 = conv_bn(c_in, c_out, 3, stride, c_in)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv1(x)


class PlainToken(nn.Module):
    """Query, key, GELU, value."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.fc = conv_bn(dim, dim)
        self.conv1, self.conv2 = (
            PlainUnit(dim, dim) if kernel == 7 else nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(nn.functional.gelu(self.conv1(self.fc(x))))


class PlainChannel(nn.Module):
    """Depthwise unit, or 3x3 and BN, then 1x1, GELU, 1x1."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = PlainUnit(dim, dim) if kernel == 7 else conv_bn(dim, dim, kernel, groups=dim)
        self.fc1, self.fc2 = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(3 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.conv(x))))


class PlainResidual(nn.Module):
    """x + main(x)."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class PlainBlock(nn.Module):
    """Token mixer, channel mixer."""

    def __init__(self, dim: int, kernel: int, channel_kernel: int) -> None:
        super().__init__()
        self.token_mixer = nn.Sequential(PlainResidual(PlainToken(dim, kernel)))
        self.channel_mixer = PlainResidual(PlainChannel(dim, channel_kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class PlainDown(nn.Module):
    """A strided unit, then x + W·BN(x)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        skip = nn.Sequential()
        skip.add_module("bn", nn.BatchNorm2d(c_out))
        skip.add_module("c", nn.Conv2d(c_out, c_out, 1, bias=False))
        second = nn.Module()
        second.add_module("conv", skip)
        self.proj = nn.ModuleList([PlainUnit(c_in, c_out, 2), second])

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj[0](x)
        return x + self.proj[1].conv(x)  # type: ignore[operator]


class PlainFFNet(nn.Module):
    """FFNet-1 or FFNet-2, names as published."""

    def __init__(self, size: int) -> None:
        super().__init__()
        depths, dims, channel = SIZES[size]
        self.patch_embed = nn.Sequential(conv_bn(3, 64, 3, 2), nn.GELU(), conv_bn(64, dims[0], 3, 2))
        self.stages = nn.ModuleList()
        for i, (depth, dim, kernel) in enumerate(zip(depths, dims, OPERATORS, strict=True)):
            down = [PlainDown(dims[i - 1], dim)] if i else []
            self.stages.append(nn.Sequential(*down, *(PlainBlock(dim, kernel, channel) for _ in range(depth))))
        self.norm, self.head = nn.BatchNorm2d(dims[-1]), nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).mean((2, 3)))


def mixers(batch: int, settings: Settings) -> Iterator[Case]:
    """FFNified attention alone."""
    for dim, side in ((352, settings.size // 16), (704, settings.size // 32)):
        plain = warmed(PlainToken(dim, 7))
        ours = ffnified_attention(dim, 7)
        named = {f"x.token_mixer.main.{key}": value for key, value in plain.state_dict().items()}
        ours.load_state_dict({k.removeprefix("x.token_mixer.main."): v for k, v in convert_blocks(named).items()})
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, dim, side, side, generator=generator).to(settings.device).requires_grad_()
        yield Case(
            f"FFNified attention, {dim} channels of {side}x{side}",
            {"plain": plain, "ours": ours, "ours, merged": merged(ours)},
            x,
            {"self-attention, 8 heads": self_attention(dim, 8)},
            forward_only={"ours, merged"},
        )


def networks(batch: int, settings: Settings) -> Iterator[Case]:
    """FFNet-1 and FFNet-2."""
    for size in SIZES:
        plain = warmed(PlainFFNet(size))
        ours: Any = timm.create_model(f"metamixer_ffnet_{size}")
        ours.load_state_dict(metamixer.convert_official(plain.state_dict()))
        yield Case(
            f"FFNet-{size}",
            {"plain": plain, "ours": ours, "ours, merged": merged(ours)},
            settings.images(batch),
            familiar(),
            forward_only={"ours, merged"},
        )


class PlainForecastBlock(nn.Module):
    """The block of the ETTh1 network on ``(B, M, D, N)`` with one-dimensional convolutions."""

    def __init__(self, m: int, d: int) -> None:
        super().__init__()
        c = m * d
        token, channel = nn.Module(), nn.Module()
        token.ffnpw1 = nn.Conv1d(c, 2 * c, 1, groups=d)
        token.ffnpw2 = nn.Conv1d(2 * c, c, 1, groups=m)
        token.norm = nn.BatchNorm1d(d)
        token.dw1, token.dw2 = (nn.Conv1d(c, c, 51, padding=25, groups=c) for _ in range(2))
        dw = nn.Module()
        for name, kernel in (("lkb_origin", 51), ("small_conv", 5)):
            part = nn.Sequential()
            part.add_module("conv", nn.Conv1d(c, c, kernel, padding=kernel // 2, groups=c, bias=False))
            part.add_module("bn", nn.BatchNorm1d(c))
            dw.add_module(name, part)
        channel.dw, channel.norm = dw, nn.BatchNorm1d(d)
        channel.ffnpw1 = nn.Conv1d(c, 2 * c, 1, groups=m)
        channel.ffnpw2 = nn.Conv1d(2 * c, c, 1, groups=d)
        self.token_mixer: Any = token
        self.channel_mixer: Any = channel

    def forward(self, x: Tensor) -> Tensor:
        b, m, d, n = x.shape
        t, c, gelu = self.token_mixer, self.channel_mixer, nn.functional.gelu
        y = gelu(t.ffnpw1(x.permute(0, 2, 1, 3).reshape(b, d * m, n))).reshape(b, d, 2 * m, n)
        y = t.ffnpw2(y.permute(0, 2, 1, 3).reshape(b, 2 * m * d, n)).reshape(b * m, d, n)
        y = t.norm(y).reshape(b, m * d, n)
        x = x + t.dw2(gelu(t.dw1(y))).reshape(b, m, d, n)
        y = x.reshape(b, m * d, n)
        y = c.norm((c.dw.lkb_origin(y) + c.dw.small_conv(y)).reshape(b * m, d, n)).reshape(b, m * d, n)
        y = gelu(c.ffnpw1(y)).reshape(b, m, 2 * d, n).permute(0, 2, 1, 3).reshape(b, 2 * d * m, n)
        return x + c.ffnpw2(y).reshape(b, d, m, n).permute(0, 2, 1, 3)


def forecasters(batch: int, settings: Settings) -> Iterator[Case]:
    """One block of the ETTh1 network, 7 variables of 64 features at 48 times, without dropout."""
    plain = warmed(PlainForecastBlock(7, 64))
    ours: Any = MetaMixerForecaster(7).encoder.stages[0][0]  # type: ignore[index]
    names = {f"stages.0.blocks.0.{key}": value for key, value in plain.state_dict().items()}
    names |= {"head.linear.weight": torch.zeros(1), "head.linear.bias": torch.zeros(1)}
    state = metamixer_forecaster.convert_official(names)
    ours.load_state_dict(
        {k.removeprefix("encoder.stages.0.0."): v for k, v in state.items() if k.startswith("encoder.")}
    )
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    once: Any = copy.deepcopy(ours).eval()
    once.channel_mixer.query[0].conv.reparameterize()
    x = torch.randn(batch, 7, 64, 48, generator=torch.Generator().manual_seed(0)).to(settings.device).requires_grad_()
    same = {"plain": plain, "ours": ours, "ours, merged": once}
    yield Case("block of the ETTh1 network", same, x, forward_only={"ours, merged"})


def merged(model: nn.Module) -> nn.Module:
    """A merged copy."""
    other = copy.deepcopy(model).eval()
    reparameterize(other)
    return other


if __name__ == "__main__":
    run("metamixer_speed", __doc__, {"mixers": mixers, "networks": networks, "forecasters": forecasters})
