"""A run that is killed at random moments, or finds the disk full, and is taken up again, ends with the same weights."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from faults import children, tiny


def reference(folder: Path) -> tuple[str, float, int]:
    """Weights of an uninterrupted run, its seconds, and the bytes of its largest file."""
    begin = time.monotonic()
    ended = children.run(lambda: tiny.work(folder, False))
    if ended.code:
        raise RuntimeError(f"the run fails without any fault: {ended.said}")
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return tiny.digest(folder), time.monotonic() - begin, largest


def kills(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """SIGKILL at a random moment, again and again until the run is through; one outcome a kill."""
    weights, seconds, _ = reference(_fresh(scratch / "reference"))
    while True:
        folder, count = _fresh(scratch / "run"), 0
        while True:
            ended = _go_on(folder, kill_after=chance.uniform(0, 1.3 * seconds))
            if ended.code != children.KILLED:
                break
            count += 1
            if count > 1:
                yield None
        if count:
            yield _verdict(folder, ended, weights)


def full_disks(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """No file grows beyond a random size; afterwards there is room again."""
    weights, _, largest = reference(_fresh(scratch / "reference"))
    while True:
        folder = _fresh(scratch / "run")
        for _ in range(chance.choice((1, 1, 2))):
            ended = _go_on(folder, most_bytes=int(largest ** chance.uniform(0, 1.02)))
            if ended.code == children.BROKEN or ended.code < 0:
                break
        if ended.code not in (0, children.REFUSED):
            yield f"with a full disk it ended in {_last(ended.said)}"
            continue
        yield _verdict(folder, ended if ended.code == 0 else _go_on(folder), weights)


def _go_on(folder: Path, kill_after: float | None = None, most_bytes: int | None = None) -> children.Ended:
    """As a person would: --resume where there is a run, and without it where it says that there is none."""
    resume = (folder / "run" / "config.json").exists()
    return children.run(lambda: tiny.work(folder, resume), kill_after, most_bytes)


def _verdict(folder: Path, ended: children.Ended, weights: str) -> str | None:
    if ended.code and "finished run" in ended.said:  # killed between its last write and its end
        ended = children.Ended(0, "")
    if ended.code:
        return f"it could not be taken up: {_last(ended.said)}"
    return None if tiny.digest(folder) == weights else "it ended with other weights"


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _last(said: str) -> str:
    return (said.strip().splitlines() or ["silence"])[-1][:200]
