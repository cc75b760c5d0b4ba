"""A run of two seconds that uses what a checkpoint has to bring back: two phases, running means, dropout, averages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus import saved
from isthmus.codec import Loss
from isthmus.data import Memory
from isthmus.data.inputs import Inputs
from isthmus.decoders.probes import LinearProbe
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit


class Restore(nn.Module):
    """Pictures from noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(6, 3, 3, padding=1)
        )

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """Mean square error."""
        image = batch["image"]
        noise = torch.randn(image.shape, generator=generator)
        return Loss((self.net(image + 0.1 * noise) - image).square().mean())


def work(folder: Path, resume: bool) -> None:
    """The run in ``folder / "run"``."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = Memory("pictures", {"image": torch.randint(0, 256, (48, 3, 8, 8), generator=generator).byte()})
    options = {"resume": resume, "save_every": 2, "save_seconds": 0.0, "log_every": 2}
    with Run.quick(folder, name="tiny", **options) as run:
        run.seed_everything("network")
        for phase, ema in (("first", 0.9), ("second", None)):
            objective = Restore()
            result: Any = fit(run, phase, objective, data, Training(steps=12, batch_size=8, lr=1e-2, ema=ema))
            run.metric(f"{phase}_sum", float(sum(p.detach().double().sum() for p in result.objective.parameters())))
            torch.manual_seed(0)
            head = LinearProbe(result.objective.net[0].weight.detach().flatten().shape[0], 2)
            if run.is_first:
                inputs = Inputs("image", size=(8, 8))
                saved.save(run.dir / saved.KEPT / phase, head, inputs, ["a", "b"], {"phase": phase})


def digest(folder: Path) -> str:
    """Of the weights that a finished run came to."""
    found = hashlib.blake2b()
    for path in sorted((folder / "run" / "checkpoints").glob("*.result.pt")):
        state = torch.load(path, weights_only=True)
        _feed(found, state)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(str(key).encode())
            _feed(found, value[key])
    elif torch.is_tensor(value):
        found.update(value.detach().contiguous().numpy().tobytes())
