"""ConViT: forward pass and training step, beside the published way of positional attention.

    python -m benchmarks.convit_speed                     # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.convit_speed --only layers --batches 8
    python -m benchmarks.convit_speed --only networks --batches 1 --rounds 3

*Layers*: one gated positional attention of ConViT-S on 14x14 and 28x28 tokens, ours against a transcription of the
published equations (relative offsets for every sample, two softmaxes over N x N, one product with the values).

*Networks*:
timm's ConViT-Ti and -S, as they are and taken over, with the same weights and the same numbers coming out; and timm's
DeiT of the same sizes, ConvNeXt-T and ResNet-50 for orientation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import compare, record, table
from isthmus.encoders.convit import GPSA, ConViT, relative_offsets


class PlainGPSA(nn.Module):
    """Gated positional self-attention written down from the paper, with all attention maps of all samples formed."""

    def __init__(self, layer: GPSA) -> None:
        super().__init__()
        self.heads = layer.num_heads
        self.qk, self.v, self.proj, self.pos_proj = layer.qk, layer.v, layer.proj, layer.pos_proj
        self.gate = layer.gating_param

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, count, dim = x.shape
        offsets = relative_offsets(grid, x.device).expand(batch, -1, -1, -1)
        q, k = self.qk(x).view(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        v = self.v(x).view(batch, count, self.heads, -1).transpose(1, 2)
        content = (q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5).softmax(-1)
        position = self.pos_proj(offsets).permute(0, 3, 1, 2).softmax(-1)
        gate = self.gate.sigmoid().view(-1, 1, 1)
        attention = (1 - gate) * content + gate * position
        attention = attention / attention.sum(-1, keepdim=True)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, count, dim))


def layers(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Rows of a layer on two grids."""
    rows = {}
    for side in (14, 28):
        ours = GPSA(432, 9)
        plain, grid = PlainGPSA(ours), (side, side)
        x = torch.randn(batch, side * side, 432, requires_grad=True)
        torch.testing.assert_close(ours(x, grid), plain(x, grid), atol=1e-5, rtol=1e-4)
        g = torch.randn_like(x)
        cases: dict[str, Callable[[], Any]] = {}
        for name, part in {"ours": ours, "published equations": plain}.items():
            where = f"{name}, {side}x{side} tokens, batch {batch}"
            cases[f"{where}, forward"] = lambda part=part, x=x, grid=grid: _forward(part, x, grid)
            cases[f"{where}, step"] = lambda part=part, x=x, g=g, grid=grid: part(x, grid).backward(g)
        rows |= compare(cases, rounds=rounds)
    return rows


def networks(batch: int, rounds: int, size: int = 224) -> dict[str, dict[str, float]]:
    """Rows of whole networks."""
    x, label = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    models: dict[str, nn.Module] = {}
    for name in ("convit_tiny", "convit_small"):
        theirs: Any = timm.create_model(name)
        ours = ConViT.from_timm(theirs)
        wanted = _forward(theirs.eval(), x)
        bound = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(_forward(ours.eval(), x), wanted, atol=bound, rtol=0)
        models |= {f"{name}, ours": ours, f"{name}, timm": theirs}
    models |= {
        name: timm.create_model(name)
        for name in ("deit_tiny_patch16_224", "deit_small_patch16_224", "convnext_tiny", "resnet50")
    }
    cases: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        cases[f"{name}, batch {batch}, forward"] = lambda model=model: _forward(model.eval(), x)
        cases[f"{name}, batch {batch}, step"] = lambda model=model: _step(model.train(), x, label)
    return compare(cases, rounds=rounds)


@torch.no_grad()
def _forward(model: nn.Module, *inputs: Any) -> Tensor:
    return model(*inputs)


def _step(model: nn.Module, x: Tensor, label: Tensor) -> None:
    F.cross_entropy(model(x), label).backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("layers", "networks"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    for batch in arguments.batches:
        if arguments.only != "networks":
            rows |= layers(batch, arguments.rounds)
        if arguments.only != "layers":
            rows |= networks(batch, arguments.rounds)
    print(table(rows))
    if not arguments.dry:
        print(record("convit_speed", rows, size=224))


if __name__ == "__main__":
    main()
