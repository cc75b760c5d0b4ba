"""What the training loop costs: ``fit`` against the same steps written out by hand, same weights, data and optimiser.

    python -m benchmarks.engine_overhead

Both clip gradients, average the loss and read it every ten steps. ``fit`` also seeds every step, checks it for numbers
that are not finite, writes curves and keeps the result; that is part of its time, as are opening and closing the phase.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import compare, record
from isthmus.codec import Loss
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit


class Classify(nn.Module):
    """Cross entropy of a network's logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = timm.create_model(name, num_classes=10)

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> Loss:
        return Loss(nn.functional.cross_entropy(self.network(batch["image"]), batch["label"]))


def cases(name: str, size: int, batch: int, steps: int) -> dict[str, Any]:
    """The same training, by hand and by ``fit``."""
    drawn = {"image": torch.rand(batch, 3, size, size), "label": torch.arange(batch) % 10, "index": torch.arange(batch)}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def stream(start: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield drawn

    def by_hand() -> None:
        torch.manual_seed(0)
        model = Classify(name).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        data, total = stream(0, 0, 1), torch.zeros((), device=device)
        for step in range(steps):
            loss = model({key: value.to(device) for key, value in next(data).items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            if (step + 1) % 10 == 0:
                total.item()

    def by_fit() -> None:
        torch.manual_seed(0)
        model = Classify(name)
        training = Training(steps=steps, batch_size=batch, lr=1e-3, clip=1.0)
        with tempfile.TemporaryDirectory() as folder, Run.quick(Path(folder), accelerator="auto") as run:
            fit(run, "train", model, None, training, batches=stream)

    return {"by hand": by_hand, "fit": by_fit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    steps, rounds = parser.parse_args().steps, parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for name, size, batch in (("resnet18", 64, 16), ("resnet50", 96, 8)):
        timed = compare(cases(name, size, batch, steps), rounds=rounds, memory=False)
        hand, ours = (timed[case]["seconds"] / steps for case in ("by hand", "fit"))
        share = ours / hand - 1
        rows.append({"network": name, "size": size, "batch": batch, "seconds": timed, "overhead": share})
        print(f"{name}, {size} px, batch {batch}: {1e3 * hand:.1f} ms by hand, {1e3 * ours:.1f} ms fit, {share:+.1%}")
    print(record("engine_overhead", rows, steps=steps, rounds=rounds, threads=1))


if __name__ == "__main__":
    main()
