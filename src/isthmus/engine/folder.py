"""The folder of a run: which one it is, whether it is free, and who works in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.codec import UserError, write_atomically
from isthmus.engine.options import RunOptions

CONFIG, FINISHED = "config.json", "finished.json"


def plain(value: Any) -> Any:
    """A JSON form of a config: dataclasses and mappings become objects, paths and other values strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def read_config(folder: Path) -> dict[str, Any]:
    """``{"name", "seed", "config", "options"}`` of the run in a folder.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no run of isthmus (no readable {CONFIG}).") from error
    if not isinstance(found, dict) or not {"name", "seed", "config", "options"} <= found.keys():
        raise UserError(f"{folder / CONFIG} is not that of a run of isthmus.")
    return found


def choose(name: str, options: RunOptions) -> Path:
    """The folder that a run of these options belongs in; nothing is written yet.

    Raises:
        UserError: the folder holds something that would be lost.
    """
    if options.out is not None:
        _check_free(options.out, options.resume)
        return options.out
    base, number = Path("runs") / f"{name}-seed{options.seed}", 1
    newest = folder = base
    while (folder / CONFIG).exists():
        if not (folder / FINISHED).exists():
            _check_free(folder, options.resume)
            return folder
        newest, number = folder, number + 1
        folder = base.with_name(f"{base.name}-{number}")
    folder = newest if options.resume else folder
    _check_free(folder, options.resume)
    return folder


def _check_free(folder: Path, resume: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --out.")
    if (folder / CONFIG).exists():
        if resume:
            return
        if (folder / FINISHED).exists():
            raise UserError(f"{folder} holds a finished run; choose another --out, or delete it.")
        raise UserError(f"{folder} holds an unfinished run; go on with --resume, or choose another --out.")
    if any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out.")


def enter(folder: Path, name: str, config: Any, options: RunOptions) -> bool:
    """Write a new run's config, or check that an old one's is the same. Returns whether the run existed before.

    Raises:
        UserError: the folder belongs to a run of another name, seed or config; the first difference is told.
    """
    now = {"name": name, "seed": options.seed, "config": plain(config), "options": plain(options)}
    if not (folder / CONFIG).exists():
        write_atomically(folder / CONFIG, json.dumps(now, indent=1).encode())
        return False
    before = read_config(folder)
    for label, old, new in _differences(before, now):
        raise UserError(
            f"{folder} was started with {label} {old!r}, now it is {new!r}; "
            "resume with the same, or choose another --out."
        )
    return True


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What must not change within a run, and did."""
    pairs = [(key, before[key], now[key]) for key in ("name", "seed")]
    old, new = before["config"] or {}, now["config"] or {}
    pairs += [(key, old.get(key), new.get(key)) for key in {**old, **new}]
    pairs += [("max_steps", before["options"].get("max_steps"), now["options"]["max_steps"])]
    return [pair for pair in pairs if pair[1] != pair[2]]


LOCK = "run.lock"


class Lock:
    """Held while a process works in a folder; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / LOCK, "a+")  # noqa: SIM115 - open as long as the lock is held
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return  # no such locks on this system
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise UserError(f"process {holder} is working in {folder}; wait for it or end it.") from error
        except OSError:
            return  # a file system without locks
        self._file.truncate(0)
        try:
            self._file.write(str(os.getpid()))
            self._file.flush()
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let the next process in."""
        with contextlib.suppress(OSError):  # what a full disk left in the buffer
            self._file.close()
