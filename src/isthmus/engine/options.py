"""Options that every run takes, whatever its recipe. Imports no torch, so that help texts are quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from isthmus.bounds import Count, Natural, at_least, check_made


@dataclass(frozen=True)
class RunOptions:
    """Where a run is kept, on which devices it runs, and how it goes on after an interruption.

    Raises:
        UserError: a number is out of range.
    """

    out: Path | None = None
    """Folder of the run; runs/NAME-seedN without it, numbered where that holds a finished run."""
    seed: Natural = 0
    """Seed of everything random: data order, augmentation, initial weights, masks."""
    resume: bool = False
    """Go on with an interrupted run, with its own settings."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: Count | Literal["auto"] = 1
    """Devices of this machine; under torchrun or SLURM the number of processes that they started."""
    num_nodes: Count = 1
    """Machines that share the run."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: ddp copies the model, fsdp leaves each a share of it, to save memory."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic; weights and optimiser stay in 32 bits."""
    max_steps: Count | None = None
    """Cap on the steps of every phase, to try out a long setting."""
    threads: Count | None = None
    """CPU threads; PyTorch's own choice without it."""
    deterministic: bool = False
    """Use deterministic GPU kernels only, so that a resumed run gives the same bits there too."""
    log_every: Count = 10
    """Steps between two logged scalars."""
    save_every: Count | None = None
    """Steps between two checkpoints; by time alone without it."""
    save_seconds: Annotated[float, at_least(0)] = 30.0
    """Least time between two checkpoints in seconds; more where writing one is slow (2 % of the time at most)."""
    tensorboard: bool = True
    """Write scalars for TensorBoard as well as CSV."""
    quiet: bool = False
    """No progress bar and no log lines."""

    def __post_init__(self) -> None:
        check_made(self)
