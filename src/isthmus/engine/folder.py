"""The folder of a run: which one it is, whether it is free, and who works in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from isthmus.codec import UserError, write_atomically
from isthmus.codec.files import read_object
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
    """``{"name", "seed", "config", "options", "scale", "command"}`` of the run in a folder.

    Raises:
        UserError: the folder holds no run, or its file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no run of isthmus (no {CONFIG}).")
    found = read_object(path, "the folder of a run")
    kinds = {"name": str, "seed": int, "config": (dict, type(None)), "options": dict}
    wrong = [key for key, kind in kinds.items() if key not in found or not isinstance(found[key], kind)]
    if wrong:
        raise UserError(f"{path} is damaged: {wrong[0]} is {found.get(wrong[0], 'missing')!r}; start anew elsewhere.")
    scale = found.get("scale") or _scale_of(folder)  # runs before version 0.2 say it in their record alone
    return {"command": "", **found, "config": found["config"] or {}, "scale": scale}


def _scale_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / "report.json").read_text(encoding="utf-8"))["scale"])
    except (OSError, ValueError, LookupError, TypeError):
        return "laptop"


def choose(name: str, options: RunOptions) -> Path:
    """The folder that a run of these options belongs in; nothing is written yet.

    Raises:
        UserError: the folder holds something that would be lost, or no run to go on with.
    """
    if options.out is not None:
        _check_free(options.out, options.resume)
        return options.out
    newest, folder = _numbered(name, options.seed)
    if newest is not None and (options.resume or not (newest / FINISHED).exists()):
        folder = newest
    _check_free(folder, options.resume)
    return folder


def newest(name: str, seed: int) -> Path | None:
    """The last of the numbered folders under ``runs/`` that holds a run, an unfinished one first."""
    return _numbered(name, seed)[0]


def _numbered(name: str, seed: int) -> tuple[Path | None, Path]:
    """The folder of the run to go on with, and the next free one."""
    base, number = Path("runs") / f"{name}-seed{seed}", 1
    found, folder = None, base
    while (folder / CONFIG).exists():
        if not (folder / FINISHED).exists():
            return folder, folder
        found, number = folder, number + 1
        folder = base.with_name(f"{base.name}-{number}")
    return found, folder


def _check_free(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --out.")
    if (folder / CONFIG).exists():
        if resume:
            return
        if (folder / FINISHED).exists():
            raise UserError(f"{folder} holds a finished run; choose another --out, or delete it.")
        if _is_mistake(folder):
            return
        raise UserError(f"{folder} holds an unfinished run; go on with --resume, or choose another --out.")
    inside = list(folder.iterdir()) if folder.exists() else []
    if any(path.name != LOCK and not is_leftover(path, CONFIG) for path in inside):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out.")
    if resume and not inside:
        raise UserError(f"there is no run in {folder} to go on with; leave out --resume to start one.")


def _is_mistake(folder: Path) -> bool:
    """Whether a run ended at once for a mistake in its settings: the corrected command may have the folder."""
    written = {CONFIG, LOCK, "environment.json", "report.json", "report.html", "log.txt"}
    if not {path.name for path in folder.iterdir() if not is_leftover(path)} <= written:
        return False
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))["mistake"] is True
    except (OSError, ValueError, LookupError, TypeError):
        return False


#: Endings of what a run writes beside its place first.
_WRITTEN = r"json|html|txt|csv|png|pt|safetensors|npy|npz|pcz|wav|jpg"


def is_leftover(path: Path, name: str | None = None) -> bool:
    """Whether a file was left by a process of ours that died while it wrote (one of this name, or any)."""
    return bool(re.fullmatch(rf"\.({re.escape(name) if name else rf'.+[.]({_WRITTEN})'})\.\w+(\.part)?", path.name))


def clean(folder: Path) -> None:
    """Remove what killed processes left half-written in a run's folder; nobody else may be writing there."""
    for path in folder.rglob(".*"):
        if path.is_file() and not path.is_symlink() and is_leftover(path):
            path.unlink(missing_ok=True)


def enter(folder: Path, name: str, config: Any, options: RunOptions, scale: str = "", command: str = "") -> Before:
    """Write a new run's config, or check that an old one's is the same. Returns what the folder held before.

    Raises:
        UserError: the folder belongs to a run of another name, seed or config, or one whose weights other options
            would change; the first difference is told.
    """
    now = {"name": name, "seed": options.seed, "config": plain(config), "options": plain(options)}
    now |= {"scale": scale, "command": command}
    if not options.resume or not (folder / CONFIG).exists():
        write_atomically(folder / CONFIG, json.dumps(now, indent=1).encode())
        return Before(False, command, "")
    before = read_config(folder)
    for label, old, new in _differences(before, now):
        raise UserError(
            f"{folder} was started with {label} {old!r}, now it is {new!r}; "
            "resume with the same, or choose another --out."
        )
    pairs = [(key, before["options"].get(key, now["options"][key]), now["options"][key]) for key in ROUNDING]
    changed = [f"{key} {new} in place of {old}" for key, old, new in pairs if old != new]
    remark = f"Resumed with {', '.join(changed)}: rounding may differ from that point on." if changed else ""
    return Before(True, before["command"], remark)


class Before(NamedTuple):
    """What a folder held before a run entered it.

    Attributes:
        resumed: this run.
        command: that started it.
        remark: options that are others now.
    """

    resumed: bool
    command: str
    remark: str


#: Options that change how sums are rounded; those in ``_differences`` change more than that.
ROUNDING = ("accelerator", "devices", "num_nodes", "strategy", "deterministic", "threads")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What must not change within a run, and did."""
    pairs = [(key, before[key], now[key]) for key in ("name", "seed")]
    old, new = before["config"] or {}, now["config"] or {}
    pairs += [(key, old.get(key), new.get(key)) for key in {**old, **new}]
    old, new = before["options"], now["options"]
    pairs += [("max_steps", old.get("max_steps"), new["max_steps"])]
    pairs += [("precision", old.get("precision", new["precision"]), new["precision"])]
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

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Whether a process works in a folder; also where this cannot be found out."""
        try:
            import fcntl

            with open(folder / LOCK, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except (ImportError, OSError):
            return True
        return False

    def release(self) -> None:
        """Let the next process in."""
        with contextlib.suppress(OSError):  # what a full disk left in the buffer
            self._file.close()
