"""How every benchmark here measures: side by side in one process, in turn, median of several rounds.

A script makes closures that do the same work with the same weights and inputs, and calls :func:`compare`; what comes
out goes to ``results/benchmarks/<name>.json`` through :func:`record` with date, hardware, versions and commit.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from isthmus.codec import write_atomically
from isthmus.report.environment import environment

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def compare(
    cases: Mapping[str, Callable[[], Any]], *, rounds: int = 5, warmup: int = 1, memory: bool = True
) -> dict[str, dict[str, float]]:
    """Time every case once per round, in turn, so that a drift of the machine meets all of them alike.

    Returns, for every case, ``seconds`` (median), ``fastest`` and ``slowest`` round, and ``peak_mib``: the memory that
    one call needs beyond what was resident before it.
    """
    for _ in range(warmup):
        for run in cases.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            _synchronise()
            start = time.perf_counter()
            run()
            _synchronise()
            times[name].append(time.perf_counter() - start)
    rows = {n: {"seconds": statistics.median(t), "fastest": min(t), "slowest": max(t)} for n, t in times.items()}
    if memory:
        for name, run in cases.items():
            rows[name]["peak_mib"] = peak_memory(run) / 2**20
    return rows


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that one call needs at its peak: of the GPU where there is one, else of the process (Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier cases gave back must not be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def record(name: str, rows: Any, **facts: Any) -> Path:
    """Write ``results/benchmarks/<name>.json``: the rows, and everything needed to judge them."""
    document = {
        "name": name,
        **facts,
        "rows": rows,
        "when": _now(),
        "threads": torch.get_num_threads(),
        **environment(),
    }
    path = RESULTS / f"{name}.json"
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    return path


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows as aligned text for the terminal."""
    heads = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{head:>17}" for head in heads)]
    lines += [f"{name:<{width}}" + "".join(f"{row[head]:>17.4g}" for head in heads) for name, row in rows.items()]
    return "\n".join(lines)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
