"""Large depthwise kernels and the networks made of them: forward pass and training step, beside the plain way.

    python -m benchmarks.large_kernel_speed                      # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.large_kernel_speed --only convolutions --batches 8
    python -m benchmarks.large_kernel_speed --only networks --batches 1 --rounds 3

*Convolutions*: ``DepthwiseConv`` against ``torch.nn.Conv2d`` in either memory format and against the FFT, for the maps
that a 224 px image has in the four stages of UniRepLKNet-T. *Networks*: UniRepLKNet-T, ours in training form and
merged, against a plain transcription of the published equations (un-merged branches, ``Conv2d``, NCHW) with the same
weights and the same numbers coming out, and timm's ConvNeXt-T and ResNet-50 for orientation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from benchmarks.common import compare, record, table
from isthmus.encoders.unireplknet import BRANCHES, convert_official, default_kernels
from isthmus.layers.large_kernel import DepthwiseConv

STAGES = ((80, 56), (160, 28), (320, 14), (640, 7))
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


def warmed(model: nn.Module) -> nn.Module:
    """Random weights of ordinary size everywhere, batch statistics included."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if name.endswith("running_var") or tensor.ndim == 1 else (-0.05, 0.05)
            tensor.uniform_(low, high, generator=generator)
    return model


def agree(name: str, a: Tensor, b: Tensor, bound: float) -> float:
    """Largest difference over the largest magnitude, which must be small."""
    gap = float((a - b).detach().abs().max() / b.detach().abs().max())
    if gap > bound:
        raise SystemExit(f"{name}: the outputs differ by {gap:.1e}, more than {bound:.0e}")
    return gap


def step(model: nn.Module, x: Tensor, label: Tensor) -> Callable[[], Any]:
    """One training step without the optimiser, which is the same for all."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), label)
        loss.backward()
        return loss.detach()

    return run


def forward(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A forward pass without a graph."""

    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def time_convolutions(batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of forward pass and of forward and backward pass, for every map, kernel and way."""
    found = {}
    for channels, side in STAGES:
        for kernel, dilation in KERNELS:
            x = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))
            last = x.contiguous(memory_format=torch.channels_last)
            module = DepthwiseConv(channels, kernel, "direct", dilation=dilation, bias=False)
            cases: dict[str, tuple[DepthwiseConv, Tensor]] = {}
            ways = [("conv2d", "direct", x), ("conv2d, channels last", "direct", last)]
            ways += [("ours", "auto", x), ("ours, channels last", "auto", last)]
            if dilation == 1:
                ways.append(("fft", "fft", x))
            want = module(x)
            for name, backend, given in ways:
                conv = DepthwiseConv(channels, kernel, backend, dilation=dilation, bias=False)
                conv.load_state_dict(module.state_dict())
                agree(name, conv(given), want, 1e-4)
                cases[name] = (conv, given)
            passes = {}
            runs = {name: forward(conv, given) for name, (conv, given) in cases.items()}
            passes["forward"] = compare(runs, rounds=rounds, memory=False)

            def both(conv: DepthwiseConv, given: Tensor) -> Callable[[], Any]:
                given = given.detach().requires_grad_()
                sent = torch.ones_like(given)

                def run() -> None:
                    given.grad = conv.weight.grad = None
                    conv(given).backward(sent)

                return run

            runs = {name: both(conv, given) for name, (conv, given) in cases.items()}
            passes["forward and backward"] = compare(runs, rounds=rounds, memory=False)
            title = f"{channels} x {side} x {side}, kernel {kernel}, dilation {dilation}, batch {batch}"
            found[title] = passes
            for kind, rows in passes.items():
                plain = min(rows["conv2d"]["seconds"], rows["conv2d, channels last"]["seconds"])
                ours = min(rows["ours"]["seconds"], rows["ours, channels last"]["seconds"])
                print(
                    f"{title:<52}{kind:<22}conv2d {plain * 1e3:9.2f} ms   ours {ours * 1e3:9.2f} ms   "
                    f"x{plain / ours:.1f}"
                )
    return found


def time_networks(batch: int, rounds: int, size: int) -> dict[str, Any]:
    """Seconds and memory of UniRepLKNet-T, ours and plain, and of two well-known networks."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size)
    label = torch.arange(batch) % 1000
    plain = warmed(PlainUniRepLKNet()).eval()
    ours = timm.create_model("unireplknet_t").eval()
    ours.load_state_dict(convert_official(plain.state_dict()))
    merged = timm.create_model("unireplknet_t", deploy=True).eval()
    copy = timm.create_model("unireplknet_t").eval()
    copy.load_state_dict(ours.state_dict())
    copy.reparameterize()
    merged.load_state_dict(copy.state_dict())
    with torch.no_grad():
        want = plain(x)
        gaps = {"training form": agree("ours", ours(x), want, 1e-4), "merged": agree("merged", merged(x), want, 1e-4)}
    others = {"ConvNeXt-T (timm)": "convnext_tiny", "ResNet-50 (timm)": "resnet50"}
    nets = {"plain": plain, "ours": ours, "ours, merged": merged}
    nets |= {title: timm.create_model(name).eval() for title, name in others.items()}
    inference = compare({name: forward(net, x) for name, net in nets.items()}, rounds=rounds)
    del nets["ours, merged"]
    training = compare({name: step(net.train(), x, label) for name, net in nets.items()}, rounds=rounds)
    for title, rows in (("forward", inference), ("training step", training)):
        for row in rows.values():
            row["images_a_second"] = batch / row["seconds"]
        print(f"\n{title}, batch {batch}, {size} px\n{table(rows)}")
    return {"forward": inference, "training step": training, "largest relative difference to plain": gaps}


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", choices=("convolutions", "networks"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, Any] = {}
    for batch in options.batches:
        if options.only != "networks":
            rows.setdefault("convolutions", {}).update(time_convolutions(batch, options.rounds))
        if options.only != "convolutions":
            rows.setdefault("networks", {})[f"batch {batch}"] = time_networks(batch, options.rounds, options.size)
    if not options.no_record:
        print(record("large_kernel_speed", rows, size=options.size, rounds=options.rounds))


if __name__ == "__main__":
    main()
