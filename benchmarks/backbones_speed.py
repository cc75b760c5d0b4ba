"""Every backbone in one table: images a second and peak memory, forward and training step, at 224 pixels.

``python -m benchmarks.backbones_speed`` takes about half an hour on one quiet thread and writes
``results/benchmarks/backbones_speed.json``. Each network of ours stands beside a plain transcription of its published
equations, or beside timm's own where timm has it (``plain``), with the same weights and the same numbers out, for
batches of 1, 8 and 32. The forms are called in turn, and the fastest of 5, 3 and 2 calls counts. ``--only
transnext_tiny``, ``--batches``, ``--rounds`` and ``--no-record`` are for a quick look; the scripts of the single
systems measure their layers as well.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the sizes with timm
from benchmarks import (
    convit_speed,
    hornet_speed,
    inceptionnext_speed,
    large_kernel_speed,
    metamixer_speed,
    transnext_speed,
)
from benchmarks.common import peak_memory, record, table
from benchmarks.transcription import Case, Settings, difference, forward, step, warmed
from isthmus.encoders.images.replknet import convert_official

FAMILIAR = ("resnet50", "convnext_tiny")
MANY = 32  # images from which a call takes so long that a few rounds must do


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks by name, such as transnext_tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5, help="calls with a batch of 1; larger ones have fewer")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = Settings(options.rounds, options.size, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows: dict[str, dict[str, float]] = {}
    for case in cases(settings):
        if options.only and case.title not in options.only:
            continue
        found = measure(case, options.batches, settings)
        print(f"\n{table(found)}", flush=True)
        rows |= found
        if not options.no_record:
            record("backbones_speed", rows, size=options.size, rounds=options.rounds)
    if not rows:
        raise SystemExit(f"no network of the names {', '.join(options.only)}.")


def cases(settings: Settings) -> Iterator[Case]:
    """The pairs of the systems' own scripts, then timm's familiar networks; one at a time is in memory."""
    pairs = (
        replknet,
        large_kernel_speed.networks,
        transnext_speed.networks,
        inceptionnext_speed.networks,
        lambda batch, settings: itertools.islice(convit_speed.networks(batch, settings), 1),
        hornet_speed.networks,
        metamixer_speed.networks,
    )
    for make in pairs:
        for case in make(1, settings):
            (plain, *rest) = case.same.items()
            yield replace(case, same={"plain": plain[1], **dict(rest)}, others={})
    for name in FAMILIAR:
        yield Case(name, {"timm": timm.create_model(name)}, settings.images(1))


def measure(case: Case, batches: list[int], settings: Settings) -> dict[str, dict[str, float]]:
    """Rows of one network: every form, pass and batch.

    Raises:
        SystemExit: the forms give different numbers.
    """
    modules = {name: module.to(settings.device).eval() for name, module in case.same.items()}
    first, *others = modules
    with torch.no_grad():
        x = settings.images(1)
        wanted = modules[first](x)
        gap = max((difference(name, modules[name](x), wanted) for name in others), default=0.0)
    if gap > case.bound:
        raise SystemExit(f"{case.title}: the outputs differ by {gap:.1e} of the largest, more than {case.bound:.0e}.")
    rows: dict[str, dict[str, float]] = {}
    for batch in batches:
        x = settings.images(batch)
        rounds = settings.rounds if batch == 1 else 3 if batch < MANY else 2
        runs = {name: forward(module.eval(), x) for name, module in modules.items()}
        rows |= _titled(in_turn(runs, batch, rounds, settings), f"{case.title}, {{}}, batch {batch}, forward")
        trained = {name: module.train() for name, module in modules.items() if name not in case.forward_only}
        runs = {name: step(module, x) for name, module in trained.items()}
        rows |= _titled(in_turn(runs, batch, rounds, settings), f"{case.title}, {{}}, batch {batch}, training step")
        for module in trained.values():
            module.zero_grad(set_to_none=True)
    return rows


def in_turn(
    runs: Mapping[str, Callable[[], Any]], batch: int, rounds: int, settings: Settings
) -> dict[str, dict[str, float]]:
    """Every form once a round: seconds of the fastest call, images a second, and the memory that a call needs."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = dict.fromkeys(runs, 0)

    def timed(name: str) -> Callable[[], None]:
        def once() -> None:
            began = time.perf_counter()
            runs[name]()
            if settings.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)

        return once

    for _, name in itertools.product(range(rounds), runs):
        peaks[name] = max(peaks[name], peak_memory(timed(name)))
    return {
        name: {"seconds": min(times), "images_a_second": batch / min(times), "peak_mib": peaks[name] / 2**20}
        for name, times in seconds.items()
    }


def _titled(rows: dict[str, dict[str, float]], title: str) -> dict[str, dict[str, float]]:
    return {title.format(name): row for name, row in rows.items()}


# ----------------------------------------------------------------------------------------------------------- RepLKNet


def replknet(batch: int, settings: Settings) -> Iterator[Case]:
    """RepLKNet-31B."""
    plain = warmed(PlainRepLKNet())
    ours: Any = timm.create_model("replknet_31b")
    ours.load_state_dict(convert_official(plain.state_dict()))
    merged: Any = timm.create_model("replknet_31b")
    merged.load_state_dict(ours.state_dict())
    merged.eval().reparameterize()
    same = {"plain": plain, "ours": ours, "ours, merged": merged}
    yield Case("replknet_31b", same, settings.images(batch), forward_only=("ours, merged",))


def conv_norm(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = False) -> Any:
    """Convolution, batch norm, and ReLU where asked for, under the published names."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts: dict[str, nn.Module] = {"conv": conv, "bn": nn.BatchNorm2d(c_out)}
    return nn.Sequential(OrderedDict(parts | ({"nonlinear": nn.ReLU()} if relu else {})))


class PlainLargeKernel(nn.Module):
    """A large and a small depthwise convolution, each with its norm, summed."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.lkb_origin = conv_norm(dim, dim, kernel, groups=dim)
        self.small_conv = conv_norm(dim, dim, 5, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lkb_origin(x) + self.small_conv(x)


class PlainLargeBlock(nn.Module):
    """x + pw2(ReLU(LK(pw1(BN(x)))))."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.prelkb_bn, self.large_kernel = nn.BatchNorm2d(dim), PlainLargeKernel(dim, kernel)
        self.pw1, self.pw2 = conv_norm(dim, dim, relu=True), conv_norm(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(self.large_kernel(self.pw1(self.prelkb_bn(x))).relu())


class PlainFeedForward(nn.Module):
    """x + pw2(GELU(pw1(BN(x))))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(dim)
        self.pw1, self.pw2 = conv_norm(dim, 4 * dim), conv_norm(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(F.gelu(self.pw1(self.preffn_bn(x))))


class PlainRepLKNet(nn.Module):
    """RepLKNet-31B written down from the published equations, in the published layout of names."""

    def __init__(self) -> None:
        super().__init__()
        dims, depths, kernels = (128, 256, 512, 1024), (2, 2, 18, 2), (31, 29, 27, 13)
        c = dims[0]
        stem = [conv_norm(3, c, 3, 2, relu=True), conv_norm(c, c, 3, groups=c, relu=True)]
        self.stem = nn.ModuleList([*stem, conv_norm(c, c, relu=True), conv_norm(c, c, 3, 2, groups=c, relu=True)])
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, (dim, depth, kernel) in enumerate(zip(dims, depths, kernels, strict=True)):
            blocks = [block for _ in range(depth) for block in (PlainLargeBlock(dim, kernel), PlainFeedForward(dim))]
            self.stages.append(nn.ModuleDict({"blocks": nn.Sequential(*blocks)}))
            if i + 1 < len(dims):
                out = dims[i + 1]
                halved = conv_norm(out, out, 3, 2, groups=out, relu=True)
                self.transitions.append(nn.Sequential(conv_norm(dim, out, relu=True), halved))
        self.norm, self.head = nn.BatchNorm2d(dims[-1]), nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stem:
            x = layer(x)
        for i, stage in enumerate(self.stages):
            x = stage["blocks"](x)  # type: ignore[index]
            x = self.transitions[i](x) if i < len(self.transitions) else x
        return self.head(self.norm(x).mean((2, 3)))


if __name__ == "__main__":
    main()
