"""A network's affine map at one image by products alone, beside forming the whole Jacobian.

    python -m benchmarks.linearscope_speed

The peer is ``torch.func.jacrev`` and a dense SVD. On piecewise linear networks both give the same F, which is checked;
the limit of a product is one forward pass, of an adjoint one forward and one backward pass.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import compare, record, table
from isthmus.lenses.linear_scope import LinearScope

TRIPLETS = 4


class _Upscaler(nn.Module):
    """Super-resolution of ReLUs, whose Jacobian is F."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv3(self.conv2(self.conv1(x).relu()).relu()), 2)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    facts: dict[str, Any] = {}
    cases = {
        "resnet18, 64 px": (timm.create_model("resnet18", num_classes=10).eval(), torch.rand(1, 3, 64, 64)),
        "upscaler, 24 px": (_Upscaler().eval(), torch.rand(1, 3, 24, 24)),
    }
    for name, (network, x) in cases.items():
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        scope = LinearScope(network, x)
        outputs, inputs = scope.y[0].numel(), x[0].numel()

        def jacobian(network: nn.Module = network, x: Tensor = x, shape: tuple[int, int] = (outputs, inputs)) -> Tensor:
            whole: Any = torch.func.jacrev(lambda z: network(z[None])[0], chunk_size=64)(x[0])
            return whole.reshape(shape)

        dense = jacobian()
        row = scope.rows([outputs // 2]).flatten()
        assert torch.allclose(row, dense[outputs // 2], atol=1e-5 * float(dense.abs().max()) + 1e-7)
        exact, found = torch.linalg.svdvals(dense)[:TRIPLETS], scope.svd(TRIPLETS).s
        assert torch.allclose(found, exact, rtol=1e-2), (found, exact)
        other, u = torch.rand_like(x), torch.rand_like(scope.y)
        rows |= {
            f"{name}: {case}": values
            for case, values in compare(
                {
                    "forward pass": lambda network=network, x=x: network(x),
                    "freezing at x": lambda network=network, x=x: LinearScope(network, x, tolerance=None),
                    "product": lambda scope=scope, other=other: scope.product(other),
                    "adjoint, one row": lambda scope=scope, u=u: scope.adjoint(u),
                    f"{TRIPLETS} singular triplets": lambda scope=scope: scope.svd(TRIPLETS),
                    "Jacobian and dense SVD": lambda jacobian=jacobian: torch.linalg.svd(
                        jacobian(), full_matrices=False
                    ),
                },
                rounds=3,
            ).items()
        }
        triplets, brute = rows[f"{name}: {TRIPLETS} singular triplets"], rows[f"{name}: Jacobian and dense SVD"]
        facts[name] = {
            "F": [outputs, inputs],
            "svd_time_ratio": brute["seconds"] / triplets["seconds"],
            "svd_memory_ratio": brute["peak_mib"] / max(triplets["peak_mib"], 1e-3),
            "product_over_forward": rows[f"{name}: product"]["seconds"] / rows[f"{name}: forward pass"]["seconds"],
        }
    print(table(rows))
    print(facts)
    record("linearscope_speed", rows, triplets=TRIPLETS, ratios=facts)


if __name__ == "__main__":
    main()
