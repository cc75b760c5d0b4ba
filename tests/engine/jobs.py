"""Small objectives and a small run that the engine's tests train, here or in processes of their own.

``python -m tests.engine.jobs OUT [--devices 2] [--resume] [--norm group] …`` trains the run of :func:`job`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.codec import Loss, Turn
from isthmus.data import Memory
from isthmus.data.transforms import RandomCrop
from isthmus.engine import Run, RunOptions, Training
from isthmus.engine.fit import fit
from isthmus.layers.random import rows


class Denoise(nn.Module):
    """Restore pictures from noise; draws from the generator and the global state (dropout), keeps running means."""

    def __init__(self, norm: str = "batch", dropout: float = 0.1) -> None:
        super().__init__()
        normalise = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), normalise, nn.GELU(), nn.Dropout(dropout), nn.Conv2d(8, 3, 3, padding=1)
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.unused = nn.Linear(3, 3)  # like the classifier of a backbone: there, and not trained

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        image = batch["image"]
        shape = image.shape[1:]
        noise = rows(lambda n: torch.randn(n, *shape, generator=generator), len(image), generator).to(image.device)
        restored = self.net(torch.where(noise > 1, self.mask_token, image + 0.1 * noise))
        error = (restored - image).square()
        return Loss(error.mean(), {"worst": error.amax()})


class Duel(nn.Module):
    """Two players on one loss: one goes down, the other, every second step, up."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 1), nn.Linear(4, 1)

    @property
    def turns(self) -> list[Turn]:
        return [Turn("down", list(self.down.parameters())), Turn("up", list(self.up.parameters()), every=2)]

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator, turn: str | None = None) -> Loss:
        value = (self.down(batch["signal"]) - self.up(batch["signal"])).square().mean()
        return Loss(value if turn == "down" else -value)


def pictures(count: int = 96) -> Memory:
    generator = torch.Generator().manual_seed(0)
    return Memory("pictures", {"image": torch.randint(0, 256, (count, 3, 12, 12), generator=generator).byte()})


def job(
    out: Path,
    steps: int = 120,
    norm: str = "batch",
    dropout: float = 0.1,
    optimizer: str = "lamb",
    ema: float | None = 0.95,
    **options: Any,
) -> None:
    """Two phases that together use everything a checkpoint has to bring back."""
    first = Training(
        steps=steps,
        batch_size=16,
        optimizer=optimizer,
        lr=0.02,
        weight_decay=0.05,
        weight_decay_end=0.2,
        warmup_steps=8,
        clip=1.0,
        ema=ema,
    )
    second = Training(steps=steps // 2, batch_size=16, optimizer="adamw", lr=0.01, accumulate=2, clip=0.5)
    settings = {"accelerator": "cpu", "quiet": True, "tensorboard": False, "log_every": 7, **options}
    with Run("job", {"steps": steps}, RunOptions(out=out, **settings)) as run:
        crop = RandomCrop(10, padding=1)
        result = fit(run, "first", Denoise(norm, dropout), pictures(), first, transform=crop)
        # A model made between phases draws its weights from the global generator.
        objective = Denoise(norm, dropout)
        objective.net[0].load_state_dict(result.objective.net[0].state_dict())
        fit(run, "second", objective, pictures(), second, transform=crop)


def outcome(out: Path) -> dict[str, Any]:
    """What both phases left: weights, moving averages, curves."""
    files = sorted((out / "checkpoints").glob("*.result.pt"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def same(one: Any, other: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--norm", default="batch")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--optimizer", default="lamb")
    parser.add_argument("--ema", type=float, default=None)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--save-every", type=int, default=None)
    torch.set_num_threads(1)
    job(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
