"""A whole training step of SparK, forwards and backwards: ours beside the published algorithm, and the knobs.

    python -m benchmarks.spark_step
    python -m benchmarks.spark_step --encoders resnet50 --batch 4 --rounds 3

Same weights, images and visible patches in every case of one width. *published* is the masked-dense encoder, the
densify convolutions over the filled map, and the decoder as written. *ours* runs the encoder on visible tiles,
densify over visible rows, and composed kernels in the decoder: the same loss and gradients. The knobs are another
model: a narrower decoder, or one that stops at stride 4 and predicts 4 x 4 pixels a cell.

``macs`` are multiply-accumulates of one forward pass per image, in G, by counting; their ratio is what could be gained
if nothing but arithmetic cost time. A composed block does 13.5 C² an output pixel in place of 17.5 C², and costs 144 C³
a step for its kernel, so small batches compose fewer blocks (see ``composition_pays``).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import compare, record, table
from benchmarks.spark_speed import inputs, random_encoder
from isthmus.decoders.spark_unet import ROWS_PAY, SparKUNet, composition_pays
from isthmus.objectives.spark import SparK

KNOBS = {
    "ours, width 384": {"width": 384},
    "ours, stride 4": {"output_stride": 4},
    "ours, width 384, stride 4": {"width": 384, "output_stride": 4},
    "ours, width 256, stride 4": {"width": 256, "output_stride": 4},
}


def step(objective: SparK, x: Tensor, visible: Tensor) -> float:
    """Both passes; the loss."""
    objective.zero_grad(set_to_none=True)
    result = objective.loss(x, visible)
    result.loss.backward()
    return float(result.loss.detach())


def build(encoder: nn.Module, norm: str, mode: str, width: int, output_stride: int, fused: bool, device: str) -> SparK:
    """An objective with its own copy of the encoder; decoders of one width and stride have the same weights."""
    torch.manual_seed(1)
    decoder = SparKUNet(encoder.feature_info, width, norm, output_stride, fused=fused)
    return SparK(copy.deepcopy(encoder), decoder, mode=mode).to(device).train()


def gradients(objective: SparK) -> list[Tensor]:
    return [p.grad for p in objective.parameters() if p.grad is not None]


def count_macs(objective: SparK, size: int, visible_share: float, batch: int) -> dict[str, float]:
    """G multiply-accumulates of a forward pass per image, counted on shapes: encoder, densify, decoder."""
    encoder, decoder = copy.deepcopy(objective.encoder).to("meta"), copy.deepcopy(objective.decoder).to("meta")
    with torch.device("meta"):
        x = torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            maps = encoder(x)
        encoder_macs = counter.get_total_flops() / 2
        densify_macs, fused = 0.0, decoder.densify.fused
        for feature, projection in zip(maps, decoder.densify.projections, strict=True):
            if isinstance(projection, nn.Conv2d):
                dense = projection.weight.numel() * feature.shape[2] * feature.shape[3]
                on_rows = fused and (projection.kernel_size == (1, 1) or projection.in_channels >= ROWS_PAY)
                densify_macs += dense * (visible_share if on_rows else 1)
        decoder_macs, side = decoder.proj.weight.numel() * (size / decoder.output_stride) ** 2, maps[-1].shape[2]
        for block in decoder.blocks:
            channels = block.up_sample.in_channels
            composed = fused and composition_pays(torch.empty(batch, channels, side, side))
            pixels = (2 * side) ** 2
            decoder_macs += (13.5 if composed else 17.5) * channels**2 * pixels
            if composed:
                decoder_macs += 20 * channels**2 * 2 * side + 144 * channels**3 / batch
            side *= 2
    share = visible_share if objective.mode == "tiled" else 1.0
    parts = {"encoder": encoder_macs * share, "densify": densify_macs, "decoder": decoder_macs}
    return {name: value / 1e9 for name, value in {**parts, "all": sum(parts.values())}.items()}


def rows_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of one encoder."""
    x, visible = inputs(options.batch, options.size, options.ratio, options.device)
    encoder = random_encoder(name, options.device)
    norm = "batch" if any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules()) else "layer"
    faithful = {"width": options.width, "output_stride": 1}
    cases = {
        "published": build(encoder, norm, "masked", **faithful, fused=False, device=options.device),
        "tiled encoder only": build(encoder, norm, "tiled", **faithful, fused=False, device=options.device),
        "ours": build(encoder, norm, "tiled", **faithful, fused=True, device=options.device),
    }
    losses = {case: step(objective, x, visible) for case, objective in cases.items()}
    pairs = zip(gradients(cases["published"]), gradients(cases["ours"]), strict=True)
    difference = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)
    if options.knobs:
        cases |= {
            case: build(encoder, norm, "tiled", **{**faithful, **knob}, fused=True, device=options.device)
            for case, knob in KNOBS.items()
        }
    calls = {case: lambda o=objective: step(o, x, visible) for case, objective in cases.items()}
    measured: dict[str, dict[str, Any]] = {**compare(calls, rounds=options.rounds)}
    share = float(visible.float().mean())
    counts = {case: count_macs(o, options.size, share, options.batch) for case, o in cases.items()}
    for case, row in measured.items():
        row["speedup"] = measured["published"]["seconds"] / row["seconds"]
        row["macs"] = counts[case]["all"]
        row["macs_ratio"] = counts["published"]["all"] / counts[case]["all"]
    print(f"{name}, batch {options.batch}:")
    print(table(measured))
    return {
        "encoder": name,
        "loss_published": losses["published"],
        "loss_ours": losses["ours"],
        "largest_relative_gradient_difference": difference,
        "macs": counts,
        "cases": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["resnet50", "convnext_small"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--ratio", type=float, default=0.6, help="hidden share")
    parser.add_argument("--width", type=int, default=768, help="of the faithful decoder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--knobs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [rows_of(name, options) for name in options.encoders]
    settings = {key: getattr(options, key) for key in ("batch", "size", "ratio", "width", "rounds", "device")}
    print(record("spark_step" if options.device == "cpu" else "spark_step_gpu", rows, settings=settings))


if __name__ == "__main__":
    main()
