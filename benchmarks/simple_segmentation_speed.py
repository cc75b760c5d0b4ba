"""FFNets beside torchvision's segmentation networks: forward pass and training step on one picture.

    python -m benchmarks.simple_segmentation_speed

Peers are DeepLabV3 and FCN on ResNet-50 from torchvision (dilated, bottleneck blocks), the networks that the paper sets
itself against. One process, one thread, 256×512 pixels, 19 classes; multiply-adds by PyTorch's own counter say how far
each is from what it has to compute. The numbers of ours are those of the published networks (tests/parity).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

from benchmarks.common import compare, record, table
from isthmus.decoders.ffnet_head import released

SIZE = (256, 512)
OURS = ("ffnet86S_dBBB_mobile", "ffnet46NS_CCC_mobile", "ffnet50_AAA", "ffnet34_ABB", "ffnet56_ABB")


def macs(network: nn.Module, x: Tensor) -> float:
    """Multiply-adds of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops() / 2


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.rand(1, 3, *SIZE)
    networks: dict[str, tuple[nn.Module, Callable[[Any], Tensor]]] = {
        name: (released(name), lambda out: out.prediction) for name in OURS
    }
    for name, make in (("fcn_resnet50", fcn_resnet50), ("deeplabv3_resnet50", deeplabv3_resnet50)):
        made = make(weights=None, weights_backbone=None, num_classes=19)
        networks[f"torchvision {name}"] = (made, lambda out: out["out"])
    rows: dict[str, dict[str, float]] = {}
    for name, (network, pick) in networks.items():
        network.eval()

        def forward(network: nn.Module = network, pick: Any = pick) -> Tensor:
            with torch.inference_mode():
                return pick(network(x))

        def step(network: nn.Module = network, pick: Any = pick) -> None:
            network.zero_grad()
            pick(network(x)).float().logsumexp(1).mean().backward()

        work = macs(network, x)
        counted = compare({"forward": forward, "step": step}, rounds=2)
        rows[name] = {
            "gmacs": work / 1e9,
            "forward_s": counted["forward"]["seconds"],
            "step_s": counted["step"]["seconds"],
            "forward_mib": counted["forward"]["peak_mib"],
            "step_mib": counted["step"]["peak_mib"],
            "gmac_per_s": work / 1e9 / counted["forward"]["seconds"],
            "million_parameters": sum(p.numel() for p in network.parameters()) / 1e6,
        }
    print(table(rows))
    record("simple_segmentation_speed", rows, size=SIZE, classes=19)


if __name__ == "__main__":
    main()
