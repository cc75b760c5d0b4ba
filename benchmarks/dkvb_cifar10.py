"""The key-value bottleneck on CIFAR-10: two classes at a time, over the features of a published CIFAR ResNet-20.

    python -m benchmarks.dkvb_cifar10                 # 2,000 photographs stream by; some minutes
    python -m benchmarks.dkvb_cifar10 --run FOLDER    # record a finished run of the command below instead

    isthmus run dkvb --data parquet:CIFAR?limit=2000 --encoder cifar_resnet20 --weights FILE --no-toy \\
        --baselines probe slow_probe mlp --codebooks 64 --pairs 512 --fewer-pairs 32 128

Needs ``cifar10`` and the network's weights among the data at hand (isthmus/data/readers/local.py). Read them with
care: the network was trained on all ten classes together, so that its features part them before the stream begins, and
one seed is one order of classes. ``own_classifier`` is what it says itself of the same held-out pictures, which are
JPEG copies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import isthmus
from benchmarks.common import record, table
from isthmus import data
from isthmus.data import evaluation_batches
from isthmus.data.readers.local import local
from isthmus.encoders.trained import trained
from isthmus.engine import Run
from isthmus.recipes import dkvb

LEARNERS = {"bottleneck": "dkvb", "linear probe": "probe", "slow linear probe": "slow_probe", "MLP": "mlp"}


def settings(source: str, weights: Path) -> dkvb.Config:
    """Those of the command above."""
    return dkvb.Config(
        data=source,
        encoder="cifar_resnet20",
        weights=str(weights),
        toy=False,
        baselines=("probe", "slow_probe", "mlp"),
        codebooks=64,
        pairs=512,
        fewer_pairs=(32, 128),
    )


@torch.no_grad()
def own_accuracy(source: str, weights: Path, folder: Path) -> float:
    """What the network's own classifier gets right of the held-out pictures, prepared as the run prepared them."""
    network, inputs = trained("cifar_resnet20", weights), isthmus.load(folder).inputs
    held_out = data.load(source, "val+test", ("image", "label"))
    right = [
        (network(batch["image"]).argmax(1) == batch["label"]).float()
        for batch in evaluation_batches(held_out, 200, transform=inputs.transform())
    ]
    return float(torch.cat(right).mean())


def main() -> None:
    """Run or read, print, record."""
    parser = argparse.ArgumentParser(description="The key-value bottleneck on CIFAR-10.")
    parser.add_argument("--limit", type=int, default=2000, help="photographs of each part")
    parser.add_argument("--run", type=Path, help="a finished run with these settings")
    arguments = parser.parse_args()
    cifar, weights = local("cifar10"), local("../weights/cifar10-resnet20.safetensors")
    if cifar is None or weights is None:
        print("needs cifar10 and the weights of ResNet-20 in $ISTHMUS_SHARED; nothing was measured.")
        return
    torch.set_num_threads(1)
    source = f"parquet:{cifar}?limit={arguments.limit}"
    config = settings(source, weights)
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.run
        if folder is None:
            with Run.quick(Path(made), name="dkvb", config=config) as run:
                dkvb.run(config, run)
            folder = run.dir
        found = json.loads((folder / "report.json").read_text())
        own = own_accuracy(source, weights, folder)
    metric: dict[str, float] = {name: entry["value"] for name, entry in found["metrics"].items()}
    rows: dict[str, dict[str, float]] = {
        name: {"accuracy": metric[f"accuracy_{key}"], "forgotten": metric[f"forgotten_{key}"]}
        for name, key in LEARNERS.items()
    }
    others: dict[str, Any] = {
        "shuffled": {"bottleneck": metric["accuracy_dkvb_shuffled"], "linear probe": metric["accuracy_probe_shuffled"]},
        "by_pairs": {
            **{str(pairs): metric[f"accuracy_dkvb_{pairs}_pairs"] for pairs in config.fewer_pairs},
            str(config.pairs): metric["accuracy_dkvb"],
        },
        "own_classifier": own,
    }
    print(table(rows), others, sep="\n")
    sizes = {"images": arguments.limit, "codebooks": config.codebooks, "pairs": config.pairs, "seed": found["seed"]}
    caution = "The network was trained on all ten classes together; the pictures are JPEG copies; one seed."
    record("dkvb_cifar10", rows, **others, **sizes, caution=caution)


if __name__ == "__main__":
    main()
