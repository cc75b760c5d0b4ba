"""What may end a phase before its last step: numbers that are not finite, and people (or schedulers) who ask."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from torch import Tensor

from isthmus.errors import RunFailed

PATIENCE = 100
"""Steps in a row that the scaler may skip; it halves its scale every time, so that more cannot help."""


class Interrupted(SystemExit):
    """A phase stopped on request, after a checkpoint; the process ends with exit code 130."""

    def __init__(self) -> None:
        super().__init__(130)


class Diverged(RunFailed):
    """Loss or gradient is not finite."""


class Finite:
    """Watches loss and gradient norm without making the device wait: each step is judged when the next one is queued.

    Args:
        phase: what is trained, for the message.
        lag: judge a step later (accelerators) or at once (CPU).
        good: finds the last good checkpoint, for the message.
        scaled: gradients are scaled for 16 bits and the scaler skips steps whose gradients overflow, which is no error.
    """

    def __init__(self, phase: str, good: Callable[[], Path | None], lag: bool, scaled: bool) -> None:
        self.phase, self.good, self.lag, self.scaled = phase, good, lag, scaled
        self._open: tuple[int, Any, Tensor, Tensor] | None = None
        self._skipped = 0

    def watch(self, step: int, index: Any, loss: Tensor, norm: Tensor) -> None:
        """Note a step, and judge the one before it (or, without lag, itself).

        Raises:
            Diverged: the judged step was not finite; tells step, samples and the last good checkpoint.
        """
        if self.lag:
            self.judge()
        self._open = (step, index, loss.detach(), norm.detach())
        if not self.lag:
            self.judge()

    def judge(self) -> None:
        """Judge the step that is still open; called before anything is saved."""
        if self._open is None:
            return
        step, index, loss, norm = self._open
        self._open = None
        finite_loss, finite_norm = math.isfinite(loss.item()), math.isfinite(norm.item())
        self._skipped = 0 if finite_norm else self._skipped + 1
        if self._skipped == PATIENCE:
            raise Diverged(
                f"{self.phase}: gradients overflowed in {PATIENCE} steps in a row; use bf16-mixed or 32-true."
            )
        if finite_loss and (self.scaled or finite_norm):
            return
        what = f"the loss is {loss.item()}" if not finite_loss else f"the gradient norm is {norm.item()}"
        ids = index.flatten().tolist() if isinstance(index, Tensor) else []
        some = f" (samples {', '.join(map(str, ids[:8]))}{', …' if len(ids) > 8 else ''})" if ids else ""
        good = self.good()
        kept = f"the last good checkpoint is {good}" if good is not None else "this phase has no checkpoint yet"
        raise Diverged(f"{self.phase}: {what} at step {step}{some}; {kept}. Lower the learning rate or clip gradients.")


class Signals:
    """While entered, Ctrl-C and SIGTERM set ``stop`` instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.stop = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True
