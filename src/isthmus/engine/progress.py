"""A progress bar for people, a line now and then for log files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isthmus.engine.run import Run


class Bar:
    """Step, loss, samples a second and time left of one phase.

    Args:
        run: whose console to draw on, unless it is quiet or not the first process.
        phase: name shown.
        start, steps: steps done before, and in all.
        batch_size: samples a step.
    """

    def __init__(self, run: Run, phase: str, start: int, steps: int, batch_size: int) -> None:
        self.console, self.phase, self.start, self.steps, self.batch_size = run.console, phase, start, steps, batch_size
        self.quiet = run.options.quiet or not run.is_first
        self.live = not self.quiet and run.console.is_terminal
        self.began = self.told = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=run.console, refresh_per_second=2)
        self.task = self.bar.add_task(phase, total=steps, completed=start, text="")

    def __enter__(self) -> Self:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.bar.stop()

    def rate(self, step: int) -> float:
        """Samples a second since the phase began or went on."""
        return (step - self.start) * self.batch_size / max(1e-9, time.monotonic() - self.began)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show how far it is, with the newest scalars."""
        if self.quiet:
            return
        loss = f"loss {values['loss']:.4g}, " if "loss" in values else ""
        text = f"{loss}{self.rate(step):.3g} samples/s"
        if self.live:
            self.bar.update(self.task, completed=step, text=text)
        elif step == self.steps or time.monotonic() - self.told > 20:
            self.told = time.monotonic()
            self.console.print(f"{self.phase}: step {step} of {self.steps}, {text}", highlight=False, soft_wrap=True)
