"""Options that every run takes, whatever its recipe. Imports no torch, so that help texts are quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class RunOptions:
    """Where a run is kept, on which devices it runs, and how it goes on after an interruption.

    Raises:
        ValueError: a number is out of range.
    """

    out: Path | None = None
    """Folder of the run; runs/NAME-seedN without it, numbered where that holds a finished run."""
    seed: int = 0
    """Seed of everything random: data order, augmentation, initial weights, masks."""
    resume: bool = False
    """Go on with an interrupted run (and start one where there is none)."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: int | Literal["auto"] = 1
    """Devices of this machine; under torchrun or SLURM the number of processes that they started."""
    num_nodes: int = 1
    """Machines that share the run."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: ddp copies the model, fsdp leaves each a share of it, to save memory."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic; weights and optimiser stay in 32 bits."""
    max_steps: int | None = None
    """Cap on the steps of every phase, to try out a long setting."""
    threads: int | None = None
    """CPU threads; PyTorch's own choice without it."""
    deterministic: bool = False
    """Use deterministic GPU kernels only, so that a resumed run gives the same bits there too."""
    log_every: int = 10
    """Steps between two logged scalars."""
    save_every: int | None = None
    """Steps between two checkpoints; by time alone without it."""
    save_seconds: float = 30.0
    """Least time between two checkpoints in seconds; more where writing one is slow (2 % of the time at most)."""
    tensorboard: bool = True
    """Write scalars for TensorBoard as well as CSV."""
    quiet: bool = False
    """No progress bar and no log lines."""

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes", "max_steps", "threads", "log_every", "save_every"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}.")
