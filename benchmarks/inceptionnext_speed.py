"""InceptionNeXt's mixer and network: forward pass and training step, beside chunk-and-concat and depthwise 7x7.

    python -m benchmarks.inceptionnext_speed                       # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.inceptionnext_speed --only mixers --batches 8
    python -m benchmarks.inceptionnext_speed --only networks --batches 1 --rounds 3

*Mixers*: ours, the published way (chunk, convolve, concatenate, with ``torch.nn.Conv2d``), and a depthwise 7x7, on the
maps that a 224 px image has in the four stages of InceptionNeXt-T.

*Networks*: timm's InceptionNeXt-T as it is, with our
mixers, and with our mixers and merged norms (forward only), with the same weights and the same numbers coming out; and
timm's ConvNeXt-T and ResNet-50 for orientation.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import compare, record, table
from isthmus.encoders.inceptionnext import InceptionDWConv2d, accelerate
from isthmus.encoders.metanext import reparameterize
from isthmus.layers.large_kernel import DepthwiseConv

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))


class ChunkAndConcat(nn.Module):
    """The mixer written down from the paper: channels in four groups, three plain convolutions, one concatenation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        g = dim // 8
        self.dwconv_hw = nn.Conv2d(g, g, 3, padding=1, groups=g)
        self.dwconv_w = nn.Conv2d(g, g, (1, 11), padding=(0, 5), groups=g)
        self.dwconv_h = nn.Conv2d(g, g, (11, 1), padding=(5, 0), groups=g)
        self.sizes = [dim - 3 * g, g, g, g]

    def forward(self, x: Tensor) -> Tensor:
        same, square, wide, high = x.split(self.sizes, 1)
        return torch.cat([same, self.dwconv_hw(square), self.dwconv_w(wide), self.dwconv_h(high)], 1)


def mixers(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Rows of every stage's map."""
    rows = {}
    for dim, side in STAGES:
        ours, plain = InceptionDWConv2d(dim), ChunkAndConcat(dim)
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(batch, dim, side, side, requires_grad=True)
        torch.testing.assert_close(ours(x), plain(x))
        parts = {
            "ours": ours,
            "chunk and concat": plain,
            "depthwise 7x7, ours": DepthwiseConv(dim, 7),
            "depthwise 7x7, Conv2d": nn.Conv2d(dim, dim, 7, padding=3, groups=dim),
        }
        g = torch.randn_like(x)
        cases: dict[str, Callable[[], Any]] = {}
        for name, part in parts.items():
            where = f"{name}, {dim} channels of {side}x{side}, batch {batch}"
            cases[f"{where}, forward"] = lambda part=part, x=x: _forward(part, x)
            cases[f"{where}, step"] = lambda part=part, x=x, g=g: part(x).backward(g)
        rows |= compare(cases, rounds=rounds)
    return rows


def networks(batch: int, rounds: int, size: int = 224) -> dict[str, dict[str, float]]:
    """Rows of whole networks."""
    theirs = timm.create_model("inception_next_tiny")
    x, label = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    with torch.no_grad():  # statistics that are not those of a new network
        theirs.train()(x[:2])
    ours = accelerate(copy.deepcopy(theirs))
    merged = copy.deepcopy(ours).eval()
    reparameterize(merged)
    wanted = _forward(theirs.eval(), x)
    for model in (ours.eval(), merged):
        bound = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(_forward(model, x), wanted, atol=bound, rtol=0)
    models: dict[str, nn.Module] = {"chunk and concat (timm)": theirs, "ours": ours, "ours, merged": merged}
    models |= {name: timm.create_model(name) for name in ("convnext_tiny", "resnet50")}
    cases: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        cases[f"{name}, batch {batch}, forward"] = lambda model=model: _forward(model.eval(), x)
        if name != "ours, merged":
            cases[f"{name}, batch {batch}, step"] = lambda model=model: _step(model.train(), x, label)
    return compare(cases, rounds=rounds)


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _step(model: nn.Module, x: Tensor, label: Tensor) -> None:
    F.cross_entropy(model(x), label).backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("mixers", "networks"))
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
            rows |= mixers(batch, arguments.rounds)
        if arguments.only != "mixers":
            rows |= networks(batch, arguments.rounds)
    print(table(rows))
    if not arguments.dry:
        print(record("inceptionnext_speed", rows, size=224))


if __name__ == "__main__":
    main()
