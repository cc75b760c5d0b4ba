"""Checkpoints that are whole or absent, checked when read, and never code.

A file is what ``torch.save`` writes (so ``torch.load(path, weights_only=True)`` reads it) followed by a digest of it.
Written beside its place, flushed to the disk and renamed, it survives a kill or a full disk at any moment.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus.codec import UserError

_MAGIC = b"ISTHMUS1"
_DIGEST = 32
State = dict[str, Any]


class _Hashing:
    """A file opened for writing that keeps a digest of what passes."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.blake2b(digest_size=_DIGEST)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, state: State) -> None:
    """Write a state of tensors, numbers, strings, lists and dictionaries.

    Raises:
        UserError: the disk is full or cannot be written to; an older file of that name is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            hashing = _Hashing(file)
            torch.save(state, hashing)  # type: ignore[arg-type] - all it needs is write
            file.write(hashing.digest.digest() + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if isinstance(reason, OSError):
            raise UserError(f"{path} could not be written: {disk_sentence(reason)}") from error
        raise


def disk_sentence(error: OSError) -> str:
    """What a person can do about a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and go on with --resume."
    return f"{error.strerror or error}; see to it and go on with --resume."


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> State:
    """Read what :func:`write` wrote, onto the CPU.

    Raises:
        UserError: the file is missing, cut short, changed, or not one of ours.
    """
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size - _DIGEST - len(_MAGIC)
            digest, left = hashlib.blake2b(digest_size=_DIGEST), max(0, length)
            while left and (block := file.read(min(left, 1 << 22))):
                digest.update(block)
                left -= len(block)
            trailer = file.read()
        if length < 0 or trailer[_DIGEST:] != _MAGIC:
            raise UserError(f"{path} is cut short or not a checkpoint of isthmus.")
        if trailer[:_DIGEST] != digest.digest():
            raise UserError(f"{path} was damaged after it was written.")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is not a checkpoint of isthmus ({error}).") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint of isthmus.")
    return state


class Checkpoints:
    """The files of one phase: the two newest states while it runs, its result once it is over.

    Args:
        folder: of all checkpoints of the run.
        phase: name of the phase, a plain word.
    """

    def __init__(self, folder: Path, phase: str) -> None:
        self.folder, self.phase = folder, phase
        self.result = folder / f"{phase}.result.pt"

    def _files(self) -> list[Path]:
        """States, newest first."""
        return sorted(self.folder.glob(f"{self.phase}.step*.pt"), reverse=True)

    def newest(self) -> Path | None:
        """The newest state's file."""
        return next(iter(self._files()), None)

    def save(self, step: int, state: State) -> None:
        """Keep a state after ``step`` steps, and the one before it."""
        write(self.folder / f"{self.phase}.step{step:09d}.pt", state)
        for old in self._files()[2:]:
            old.unlink()

    def finish(self, state: State) -> None:
        """Keep the phase's result; the states on the way to it are dropped."""
        write(self.result, state)
        for old in self._files():
            old.unlink()

    def load(self, say: Callable[[str], None]) -> State | None:
        """The newest state that is whole; ``None`` where the phase never began.

        Raises:
            UserError: there are states and none is whole.
        """
        files, first = self._files(), None
        for path in files:
            try:
                state = read(path)
            except UserError as error:
                first = first or error
                continue
            if first is not None:
                say(f"{first} Going on from {path.name} instead.")
            return state
        if first is None:
            return None
        names = ", ".join(path.name for path in files)
        raise UserError(f"{first} Delete {names} to train this phase again from its start.") from first

    def load_result(self) -> State | None:
        """The result of a phase that is over; ``None`` where it is not."""
        if not self.result.exists():
            return None
        try:
            return read(self.result)
        except UserError as error:
            raise UserError(f"{error} Delete {self.result.name} to train this phase again.") from error


class Clock:
    """Decides when a checkpoint is due: every so many steps or seconds, and never for more than 2 % of the time.

    Args:
        steps: between two checkpoints; ``None`` goes by time alone.
        seconds: least time between two that are due by time.
    """

    def __init__(self, steps: int | None, seconds: float) -> None:
        self.steps, self.seconds, self.wait = steps, seconds, seconds
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after ``step`` steps."""
        if self.steps is not None and step % self.steps == 0:
            return True
        return time.monotonic() - self.last >= self.wait

    def saved(self, took: float) -> None:
        """Start anew after a checkpoint that took so many seconds to write."""
        self.last, self.wait = time.monotonic(), max(self.seconds, 50 * took)
