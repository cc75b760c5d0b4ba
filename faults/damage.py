"""A file of a run or of a kept model is damaged: a sentence or the right result, never a raw error."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import children, kills, tiny

LEAVES = {"run.lock"}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one kind of damage."""
    kind = chance.randrange(7)
    if kind == 0 or not data:
        return b"" if data else b"\0"
    at = chance.randrange(len(data))
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data + bytes(chance.randrange(256) for _ in range(chance.randint(1, 40)))
    if kind == 3:
        return bytes(chance.randrange(256) for _ in range(chance.randint(1, 200)))
    if kind == 4:
        return data[:at] + data[at + chance.randint(1, 20) :]
    changed = bytearray(data)
    for _ in range(1 if kind == 5 else chance.randint(2, 20)):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def runs(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """One file of an unfinished run is damaged, and the run taken up."""
    weights, seconds, _ = kills.reference(kills._fresh(scratch / "reference"))
    stopped = []
    for number in range(6):
        folder = kills._fresh(scratch / f"stopped{number}")
        children.run(lambda folder=folder: tiny.work(folder, False), kill_after=seconds * (0.3 + 0.1 * number))
        if (folder / "run" / "config.json").exists():
            stopped.append(folder)
    while True:
        folder = _copy(chance.choice(stopped), scratch / "run")
        path = _damage(folder, chance)
        ended = children.run(lambda folder=folder: tiny.work(folder, True))
        told = f"{path.name} damaged, taken up: "
        if ended.code == 0:
            yield None if tiny.digest(folder) == weights else f"{told}other weights"
        else:
            yield None if ended.code == children.REFUSED else told + kills._last(ended.said)


def models(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """One file of a finished run is damaged, and its model and its page are asked for."""
    from isthmus import saved
    from isthmus.report import render

    kills.reference(kills._fresh(scratch / "reference"))
    asked: dict[str, Callable[[Path], object]] = {"load": saved.load, "report": lambda run: render([run], None)}
    while True:
        folder = _copy(scratch / "reference", scratch / "run")
        path = _damage(folder, chance)
        for name, ask in asked.items():
            try:
                ask(folder / "run")
            except ValueError as error:
                yield None if type(error).__name__ == "UserError" else f"{name}, {path.name} damaged: {_told(error)}"
            except FileNotFoundError:
                yield None
            except Exception as error:  # any other is a raw one
                yield f"{name}, {path.name} damaged: {_told(error)}"
            else:
                yield None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def _damage(folder: Path, chance: random.Random) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LEAVES)
    path = chance.choice(files)
    if chance.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(mutated(path.read_bytes(), chance))
    return path
