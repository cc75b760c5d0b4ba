"""Key lookup of the key-value bottleneck at its published size: 256 codebooks of 4,096 keys of 14 numbers.

    python -m benchmarks.dkvb_speed                       # batches of 32 and 256, one thread
    python -m benchmarks.dkvb_speed --batches 16 --rounds 3 --dry

*Lookups*: ours beside vector-quantize-pytorch's multi-head quantiser (what discrete-key-value-bottleneck-pytorch
calls), ``torch.cdist`` and ``argmin``, and the published code's three sums, all with the same keys and queries; every
rival has to find the same keys but for ties in rounding. Limits: the product alone, cut as ours is, and what a large
square product reaches on this machine.

*Layers*: a training step of the whole bottleneck (fetching, gradient of the values) beside
discrete-key-value-bottleneck-pytorch's way of fetching, on the same lookups.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import compare, record, table
from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.bottlenecks.splitters import Chunk
from isthmus.layers.codebook import nearest


def with_cdist(x: Tensor, keys: Tensor) -> Tensor:
    """All distances, then the least."""
    return torch.cdist(x, keys).argmin(-1)


def with_sums(x: Tensor, keys: Tensor) -> Tensor:
    """The published equation: |q|² - 2 q·k + |k|² for every pair."""
    score = -(
        x.square().sum(-1)[..., None] - 2 * torch.einsum("cid,cjd->cij", x, keys) + keys.square().sum(-1)[:, None]
    )
    return score.argmax(-1)


def quantiser(keys: Tensor) -> Any:
    """vector-quantize-pytorch with a codebook a head, holding these keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vector_quantize_pytorch import VectorQuantize

    books, pairs, dim = keys.shape
    vq = VectorQuantize(
        dim=books * dim, codebook_dim=dim, codebook_size=pairs, heads=books, separate_codebook_per_head=True
    )
    with torch.no_grad():
        vq._codebook.embed.copy_(keys)
    return vq.eval()


def product_alone(x: Tensor, keys: Tensor, columns: int) -> None:
    """The multiplications of a lookup, cut as ours is, and nothing else."""
    buffer = torch.empty(keys.shape[1], min(columns, x.shape[1]))
    for codes, queries in zip(keys, x, strict=True):
        for part in queries.split(columns):
            torch.mm(codes, part.T, out=buffer[:, : len(part)])


def lookups(x: Tensor, keys: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Rows of ``x (C, B, K)`` against ``keys (C, J, K)``."""
    batch = x.shape[1]
    vq = quantiser(keys)
    flat = x.permute(1, 0, 2).reshape(batch, 1, -1)
    cases: dict[str, Callable[[], Any]] = {
        "ours": lambda: nearest(x, keys)[0],
        "torch.cdist": lambda: with_cdist(x, keys),
        "published equation": lambda: with_sums(x, keys),
        "vector-quantize-pytorch": lambda: vq(flat)[1],
    }
    with torch.no_grad():
        want = cases["ours"]()
        agreeing = {
            "torch.cdist": cases["torch.cdist"](),
            "published equation": cases["published equation"](),
            "vector-quantize-pytorch": cases["vector-quantize-pytorch"]()[:, 0].T,
        }
        for name, found in agreeing.items():
            share = float((found == want).float().mean())
            assert share > 0.9995, f"{name} finds other keys than ours: {1 - share:.2%}"
        del agreeing
        columns = max(16, 2**18 // keys.shape[1])
        timed = {f"{name}, batch {batch}": case for name, case in cases.items()}
        timed[f"the product alone, batch {batch}"] = lambda: product_alone(x, keys, columns)
        timed[f"ours, three nearest, batch {batch}"] = lambda: nearest(x, keys, 3)
        rows = compare(timed, rounds=rounds)
    operations = 2 * x.numel() * keys.shape[1]
    for row in rows.values():
        row["gflops"] = operations / row["seconds"] / 1e9
    return rows


def steps(x: Tensor, keys: Tensor, rounds: int, width: int = 10) -> dict[str, dict[str, float]]:
    """Rows of a training step, gradient of the values included."""
    books, batch, dim = x.shape
    ours = KeyValueBottleneck(Chunk(books * dim, books), keys.shape[1], width).place_keys(keys)
    values = torch.nn.Parameter(torch.zeros_like(ours.values))
    vq, flat = quantiser(keys), x.permute(1, 0, 2).reshape(batch, -1)

    def step() -> None:
        ours([flat]).features[0].sum().backward()
        ours.values.grad = None

    def theirs() -> None:
        with torch.no_grad():
            index = vq(flat[:, None])[1].permute(0, 2, 1)  # (B, C, 1)
        spread = values[None].expand(batch, -1, -1, -1)
        spread.gather(2, index[..., None].expand(-1, -1, -1, width)).sum().backward()
        values.grad = None

    name = f"training step, batch {batch}"
    rows = compare({f"ours, {name}": step, f"as discrete-key-value-bottleneck-pytorch, {name}": theirs}, rounds=rounds)
    for row in rows.values():
        row["gflops"] = 2 * x.numel() * keys.shape[1] / row["seconds"] / 1e9
    return rows


def square_product(size: int = 2048) -> float:
    """GFLOP/s of a large product, the most that this machine does."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Key lookup of the key-value bottleneck, beside its peers.")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--codebooks", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keys = torch.randn(arguments.codebooks, arguments.pairs, arguments.dim)
    rows: dict[str, dict[str, float]] = {}
    for batch in arguments.batches:
        x = torch.randn(arguments.codebooks, batch, arguments.dim)
        rows |= lookups(x, keys, arguments.rounds)
        rows |= steps(x, keys, arguments.rounds)
    reached = square_product()
    print(table(rows))
    print(f"a square product reaches {reached:.0f} GFLOP/s here")
    if not arguments.dry:
        sizes = {"codebooks": arguments.codebooks, "pairs": arguments.pairs, "dim": arguments.dim}
        print(record("dkvb_speed", rows, **sizes, square_product_gflops=round(reached, 1)))


if __name__ == "__main__":
    main()
