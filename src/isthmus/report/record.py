"""``report.json``: what a run has found so far, kept up to date so that an interrupted run shows what it has.

The file is one object::

    format, version   "isthmus-report", 1
    system, scale, seed, command
    status            "running", "finished", "interrupted" or "failed"; error: a sentence or null; mistake: a person's
    started, updated  ISO 8601 in UTC; seconds: spent in this run, resumed parts included
    config, options   the recipe's and the engine's settings
    hardware, versions, commit
    code              digest of the source that can change the numbers
    metrics           {name: {value, unit, published}}; a value that is not finite is null
    claims            [{name, text, metric, bar, rule, published, value, holds}], indicative: one seed is no verdict
    figures           [{name, file, caption}], files relative to the folder
    artifacts         [{name, path, text}], paths relative to the folder where they are inside it
    notes             [text]
    curves            {name: {x: [step], y: [value]}}; in names such as "pretrain/loss" the first part is the phase

Further keys may be added within version 1; none is taken away or changes its meaning.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isthmus.catalog import Claim
from isthmus.errors import UserError
from isthmus.report.environment import code, environment
from isthmus.report.judge import finite, judge
from isthmus.report.png import png
from isthmus.report.shape import fault

FILE = "report.json"
FORMAT, VERSION = "isthmus-report", 1
CURVE_POINTS = 2000  # a curve longer than this is thinned; a screen shows no more


class Record:
    """Collects what a run finds and keeps ``report.json`` in its folder up to date.

    Args:
        folder: the run's folder.
        system: the system's name.
        seed: the run's seed.
        scale: ``"laptop"`` or ``"paper"``.
        config: the recipe's settings, a dataclass or a mapping.
        options: the engine's settings, likewise.
        claims: what to judge as metrics come in; none where the data is the user's own.
        command: the command line that started the run.
        resume: keep the starting time and the seconds spent of a record that is already in the folder.
        write: ``False`` on every process but the first.
    """

    def __init__(
        self,
        folder: Path,
        system: str,
        *,
        seed: int = 0,
        scale: str = "laptop",
        config: Any = None,
        options: Any = None,
        claims: Sequence[Claim] = (),
        command: str = "",
        resume: bool = False,
        write: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.claims = tuple(claims)
        self._write = write
        self._clock = time.monotonic()
        self._before = 0.0
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "system": system,
            "scale": scale,
            "seed": seed,
            "command": command,
            "status": "running",
            "error": None,
            "mistake": False,
            "started": _now(),
            "updated": _now(),
            "seconds": 0.0,
            "config": plain(config or {}),
            "options": plain(options or {}),
            **environment(),
            "code": code(system),
            "metrics": {},
            "claims": [],
            "figures": [],
            "artifacts": [],
            "notes": [],
            "curves": {},
        }
        if resume and (self.folder / FILE).is_file():
            self._go_on()
        self._judge()
        self.save()

    def _go_on(self) -> None:
        """Take over what an earlier part of this run knew; a damaged file costs no more than that."""
        try:
            earlier = read(self.folder)
        except ValueError as error:
            self.note(f"The times count from the last start, for {error}")
            return
        self.data["started"], self._before = earlier["started"], earlier["seconds"]
        self.data["notes"] = [note for note in earlier["notes"] if note.startswith("Resumed with")]

    def metric(self, name: str, value: float, published: str | float | None = None, unit: str = "") -> None:
        """Record a number; ``published`` is what the paper reports for it, ``unit`` such as ``%`` or ``ms``."""
        number = float(value)
        published = None if published is None else str(published)
        self.data["metrics"][name] = {"value": finite(number), "unit": unit, "published": published}
        self._judge()
        self.save()

    def figure(self, name: str, figure: Any, caption: str = "") -> Path:
        """Keep a picture as ``figures/NAME.png``: a matplotlib figure, a PIL image, or a tensor ``(3, H, W)``.

        Tensors are uint8, or floats in [0, 1]; ``(1, H, W)`` and ``(H, W)`` are grey.
        """
        path = self.folder / "figures" / f"{_file_name(name)}.png"
        if self._write:
            _write(path, png(figure))
        entry = {"name": name, "file": path.relative_to(self.folder).as_posix(), "caption": caption}
        _replace(self.data["figures"], entry)
        self.save()
        return path

    def artifact(self, name: str, path: Path, text: str = "") -> None:
        """Mention a file that the run wrote, with a sentence on what it is good for."""
        path = Path(path)
        shown = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        _replace(self.data["artifacts"], {"name": name, "path": shown.as_posix(), "text": text})
        self.save()

    def note(self, text: str) -> None:
        """Say something that a reader of the numbers should know; the same note is kept once."""
        if text not in self.data["notes"]:
            self.data["notes"].append(text)
            self.save()

    def curve(self, name: str, x: Sequence[float], y: Sequence[float]) -> None:
        """Keep a curve, such as ``pretrain/loss`` over steps; a later one of the same name takes its place."""
        if len(x) != len(y):
            raise ValueError(f"curve {name!r} has {len(x)} places and {len(y)} values.")
        step = -(-len(x) // CURVE_POINTS) or 1
        kept = [*range(0, len(x), step)]
        if kept and kept[-1] != len(x) - 1:
            kept.append(len(x) - 1)
        self.data["curves"][name] = {"x": [float(x[i]) for i in kept], "y": [finite(float(y[i])) for i in kept]}
        self.save()

    def finish(self, status: str = "finished", error: str | None = None, mistake: bool = False) -> None:
        """Close the record as ``"finished"``, ``"interrupted"`` or ``"failed"``, with the sentence that says why.

        ``mistake`` says that the settings or the input were at fault.
        """
        if status not in ("finished", "interrupted", "failed"):
            raise ValueError(f"a run ends finished, interrupted or failed, not {status!r}.")
        self.data |= {"status": status, "error": error, "mistake": mistake}
        self.save()

    def save(self) -> None:
        """Write ``report.json``; the old file stays until the new one is complete."""
        self.data["updated"] = _now()
        self.data["seconds"] = round(self._before + time.monotonic() - self._clock, 2)
        if self._write:
            _write(self.folder / FILE, (json.dumps(self.data, indent=1, allow_nan=False) + "\n").encode())

    def _judge(self) -> None:
        metrics, seed = self.data["metrics"], self.data["seed"]
        self.data["claims"] = []
        for claim in self.claims:
            entry = {key: getattr(claim, key) for key in ("name", "text", "metric", "bar", "rule", "published")}
            value = metrics.get(claim.metric, {}).get("value")
            holds = judge(claim, {seed: value}).holds if value is not None else None
            if claim.metric in metrics and value is None:
                holds = False  # measured, and not a finite number
            self.data["claims"].append(entry | {"value": value, "holds": holds})


def read(folder: Path) -> dict[str, Any]:
    """The record of a run, given by its folder or by its ``report.json``.

    A run that says "running" in a folder where no process works was killed; it is told as "interrupted".

    Raises:
        UserError: there is no record, it is not one of ours, or a part of it is missing or damaged.
    """
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{folder} holds no {FILE}; give the folder of a run.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}).") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} was not written by a run of isthmus.")
    if found.get("version") != VERSION:
        raise UserError(f"{path} has version {found.get('version')}; this isthmus reads version {VERSION}.")
    if (wrong := fault(found)) is not None:
        raise UserError(f"{path} is damaged: {wrong}.")
    if found["status"] == "running" and not _is_open(path.parent):
        told = "the process of this run ended without a word; go on with --resume."
        found |= {"status": "interrupted", "error": told}
    return found


def abandon(folder: Path, sentence: str) -> None:
    """Close the record of a run whose first process is gone."""
    data = read(folder)
    if data["status"] in ("running", "interrupted"):
        data |= {"status": "failed", "error": sentence}
        _write(Path(folder) / FILE, (json.dumps(data, indent=1) + "\n").encode())


def _is_open(folder: Path) -> bool:
    from isthmus.engine.folder import LOCK, Lock

    return not (folder / LOCK).exists() or Lock.is_held(folder)


def plain(value: Any) -> Any:
    """A setting as JSON: dataclasses become objects, tuples lists, paths strings; what else there is, its ``repr``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if finite(value) is not None else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else repr(value)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "figure"


def _replace(entries: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Put an entry in the place of one of the same name, else at the end."""
    for index, old in enumerate(entries):
        if old["name"] == entry["name"]:
            entries[index] = entry
            return
    entries.append(entry)


def _write(path: Path, data: bytes) -> None:
    from isthmus.codec import write_atomically

    write_atomically(path, data)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
