"""What a narrower decoder or a coarser output costs in the claim: held-out loss and the gain of hierarchy, per knob.

    python -m benchmarks.spark_knobs
    python -m benchmarks.spark_knobs --steps 100 --seeds 0

Every knob pre-trains the encoder of the recipe's default settings from the same weights on the same batches, once with
all scales and once with the coarsest alone. ``heldout_loss`` is in units of patch variance, ``hierarchy_gain`` is how
much lower it is with all scales, ``seconds`` the time of a training step. Stride 1 is published.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import record
from isthmus.data.transforms import Compose, Flip, RandomResizedCrop
from isthmus.encoders.backbone import reductions_within
from isthmus.engine.run import Run
from isthmus.objectives.spark import visible_cells
from isthmus.recipes import spark
from isthmus.recipes.spark import Config
from isthmus.tasks import pretraining

KNOBS = [(128, 1), (128, 2), (128, 4), (64, 2), (64, 4), (32, 4)]


def measure(config: Config, seed: int) -> dict[str, float]:
    """Loss with all scales and with one, and seconds a step."""
    with tempfile.TemporaryDirectory() as folder, Run.quick(Path(folder), seed, "spark", config) as run:
        task = pretraining.open(config, run, most=224)
        levels = reductions_within(config.encoder, task.size)
        transform = Compose([RandomResizedCrop(task.size, (config.crop, 1)), Flip()])
        losses, seconds = [], []
        for phase, scales in (("all", levels), ("coarsest", levels[-1:])):
            objective = spark._objective(config, task, scales)
            start = time.perf_counter()
            objective = task.pretrain(phase, objective, transform)
            seconds.append((time.perf_counter() - start) / (config.pretrain.steps or 1))
            batches = task.masked(objective.grid, partial(visible_cells, ratio=config.ratio))
            losses.append(spark._mean_loss(objective, batches))
    return {"heldout_loss": losses[0], "hierarchy_gain": 1 - losses[0] / losses[1], "seconds": seconds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Config().pretrain.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for width, stride in KNOBS:
        training = dataclasses.replace(Config().pretrain, steps=options.steps)
        config = Config(width=width, output_stride=stride, pretrain=training)
        found = [measure(config, seed) for seed in options.seeds]
        means = {key: statistics.mean(one[key] for one in found) for key in found[0]}
        rows.append({"width": width, "output_stride": stride, **means})
        print(", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    print(record("spark_knobs", rows, settings={"steps": options.steps, "seeds": options.seeds}))


if __name__ == "__main__":
    main()
