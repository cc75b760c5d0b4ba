"""Worker processes whose items are whole batches, so that what a batch holds never depends on who prepared it."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from isthmus.codec import UserError


def helped(items: TorchDataset, workers: int, order: Iterable[int] | None = None) -> Iterator[Any]:
    """``items`` prepared by ``workers`` processes and handed over as they are, in the order of ``order``.

    Raises:
        UserError: a process died, as the system's watch over memory or a crash in a decoder ends it.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_quietly_on_one_thread,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"one of {workers} processes that prepare batches died ({reason}). Memory may have run out: try fewer "
            "workers or smaller batches; with workers 0 the error itself is shown."
        ) from error


def _unchanged(item: Any) -> Any:
    return item


def _quietly_on_one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers
