"""Worker processes whose items are whole batches, so that what a batch holds never depends on who prepared it."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset


def helped(items: TorchDataset, workers: int, order: Iterable[int] | None = None) -> DataLoader:
    """``items`` prepared by ``workers`` processes and handed over as they are, in the order of ``order``."""
    return DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_quietly_on_one_thread,
    )


def _unchanged(item: Any) -> Any:
    return item


def _quietly_on_one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers
