"""Speed and memory of SparK: only visible cells (tiles) beside the published masked-dense algorithm.

    python -m benchmarks.spark_speed
    python -m benchmarks.spark_speed --encoders resnet50 --batch 4 --rounds 3

Every case has the same weights, images and visible cells and takes its turn in every round. The published algorithm is
timed with contiguous and with channels-last weights, and ``ratio`` is against the faster of the two; so is ours. The
plain encoder, which masks nothing and therefore leaks, is there for orientation. ``limit`` is the inverse of the
visible share: what one gains if nothing but the published arithmetic cost time. A ratio beyond it is possible, since
tiles also spare the masking, the gathering of batch norm, and torch's slow gradient of depthwise kernels.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import compare, record, table
from isthmus.encoders.backbone import Backbone
from isthmus.layers.sparse_conv import sparse_features

CASES = {
    "masked": ("masked", torch.contiguous_format),
    "masked, channels last": ("masked", torch.channels_last),
    "tiled": ("tiled", torch.contiguous_format),
    "tiled, channels last": ("tiled", torch.channels_last),
    "dense": ("dense", torch.contiguous_format),
    "dense, channels last": ("dense", torch.channels_last),
}


def inputs(batch: int, size: int, ratio: float, device: str) -> tuple[Tensor, Tensor]:
    """Images, and visible cells of 32 pixels, as many in every image."""
    generator = torch.Generator().manual_seed(0)
    grid = size // 32
    keep = round(grid * grid * (1 - ratio))
    x = torch.randn(batch, 3, size, size, generator=generator)
    order = torch.rand(batch, grid * grid, generator=generator).argsort(1).argsort(1)
    return x.to(device), (order < keep).view(-1, grid, grid).to(device)


def random_encoder(name: str, device: str) -> Backbone:
    """A timm encoder in training mode. Scales that start at zero are opened, so that every layer counts."""
    torch.manual_seed(0)
    encoder = Backbone(name)
    for parameter in encoder.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return encoder.to(device).train()


def features(encoder: Backbone, x: Tensor, visible: Tensor, mode: str) -> list[Tensor]:
    """The maps of one case."""
    return encoder(x) if mode == "dense" else sparse_features(encoder, x, visible, mode)


def forward(encoder: Backbone, x: Tensor, visible: Tensor, mode: str) -> list[Tensor]:
    """The forward pass alone."""
    with torch.no_grad():
        return features(encoder, x, visible, mode)


def forward_backward(encoder: Backbone, x: Tensor, visible: Tensor, mode: str) -> list[Tensor]:
    """Both passes, from a fixed gradient of every map."""
    encoder.zero_grad(set_to_none=True)
    maps = features(encoder, x, visible, mode)
    torch.autograd.backward(maps, [torch.ones_like(m) for m in maps])
    return [m.detach() for m in maps]


PASSES: dict[str, Callable[..., list[Tensor]]] = {"forward": forward, "forward and backward": forward_backward}


def encoder_rows(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both passes of one encoder in every case."""
    x, visible = inputs(options.batch, options.size, options.ratio, options.device)
    encoder = random_encoder(name, options.device)
    layouts = {layout for _, layout in CASES.values()}
    encoders = {layout: copy.deepcopy(encoder).to(memory_format=layout) for layout in layouts}  # type: ignore[call-overload]
    images = {layout: x.contiguous(memory_format=layout) for layout in layouts}
    differences = agreement(encoder, x, visible)
    rows = []
    for kind, run in PASSES.items():
        calls = {
            case: lambda r=run, m=mode, f=layout: r(encoders[f], images[f], visible, m)
            for case, (mode, layout) in CASES.items()
        }
        measured = compare(calls, rounds=options.rounds)
        rows.append(
            {
                "encoder": name,
                "pass": kind,
                "ratio": ratio(measured, "masked", "tiled"),
                "ratio_to_dense": ratio(measured, "dense", "tiled"),
                "limit": visible.numel() / int(visible.sum()),
                **differences[kind],
                "cases": measured,
            }
        )
        print(f"{name}, {kind}: {rows[-1]['ratio']:.2f} times as fast, limit {rows[-1]['limit']:.2f}")
        print(table(measured))
    return rows


def ratio(measured: Mapping[str, Mapping[str, float]], slow: str, fast: str) -> float:
    """How many times as fast, the better memory layout of each."""
    best = {
        mode: min(row["seconds"] for case, row in measured.items() if case.split(",")[0] == mode)
        for mode in (slow, fast)
    }
    return best[slow] / best[fast]


def agreement(encoder: Backbone, x: Tensor, visible: Tensor) -> dict[str, dict[str, float]]:
    """The largest difference of values and of gradients between the two ways, and the largest value."""
    start = copy.deepcopy(encoder.state_dict())
    found: dict[str, list[list[Tensor]]] = {kind: [] for kind in PASSES}
    for mode in ("masked", "tiled"):
        encoder.load_state_dict(start)
        found["forward"].append(forward_backward(encoder, x, visible, mode))
        gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        found["forward and backward"].append(gradients)
    return {
        kind: {
            "largest_difference": max(float((a - b).abs().max()) for a, b in zip(masked, tiled, strict=True)),
            "largest_value": max(float(a.abs().max()) for a in masked),
        }
        for kind, (masked, tiled) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["resnet50", "convnext_small"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--ratio", type=float, default=0.6, help="hidden share")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for name in options.encoders for row in encoder_rows(name, options)]
    settings = {key: getattr(options, key) for key in ("batch", "size", "ratio", "rounds", "device")}
    print(record("spark_speed" if options.device == "cpu" else "spark_speed_gpu", {"encoder": rows}, settings=settings))


if __name__ == "__main__":
    main()
