"""How long calls take, one beside the other: in turns, after a warm-up, on a quiet number of threads."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def seconds(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | None = None,
    warm_up: int = 2,
    threads: int | None = 1,
) -> dict[str, list[float]]:
    """Seconds of every call in every round; all calls take their turn within a round, so that drifts hit them alike.

    Args:
        calls: what is timed, by name.
        rounds: timings of each that are kept.
        device: waited for before and after a call, where it works ahead of Python.
        warm_up: rounds before those.
        threads: of the CPU while timing; ``None`` leaves them as they are.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with _threads(threads):
        for turn in range(rounds + warm_up):
            for name, call in calls.items():
                _wait(device)
                began = time.perf_counter()
                call()
                _wait(device)
                if turn >= warm_up:
                    times[name].append(time.perf_counter() - began)
    return times


def median_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int, **options: Any) -> dict[str, float]:
    """The median of :func:`seconds` for every call."""
    return {name: statistics.median(values) for name, values in seconds(calls, rounds, **options).items()}


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()
