"""``isthmus run NAME``: every field of the recipe's ``Config`` and of ``RunOptions`` is a flag."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isthmus import catalog, recipes
from isthmus.catalog import Claim, System
from isthmus.cli.flags import parse
from isthmus.cli.listing import MARKS
from isthmus.errors import UserError


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a recipe with the settings given as flags; print what it measured and where the report is."""
    if name.startswith("-"):
        raise UserError("name the system first: isthmus run NAME [flags]; `isthmus list --ready` shows the names.")
    system = catalog.find(name)
    given = list(arguments)
    as_json = "--json" in given
    given = [argument for argument in given if argument != "--json"]
    recipe = recipes.load(system.name)
    scale, config, options = parse(system, recipe, given)
    report = execute(system, recipe, scale, config, options, command=_command(system, given))
    if report is None:  # another process than the first tells
        return 0
    if as_json:
        sys.stdout.write(report.joinpath("report.json").read_text(encoding="utf-8"))
    else:
        _print_outcome(report)
    return 0


def execute(
    system: System, recipe: ModuleType, scale: str, config: Any, options: Any, command: str = ""
) -> Path | None:
    """Run a recipe and write its page; returns the run's folder, ``None`` on other processes than the first."""
    from isthmus.codec import write_atomically
    from isthmus.engine.run import Run
    from isthmus.report import render

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells of every process that it starts
    claims, remark = applicable_claims(system, recipe, scale, config, options)
    run = Run(system.name, config, options, scale=scale, claims=claims, command=command)
    try:
        with run:
            if remark:
                run.note(remark)
            recipe.run(config, run)
    finally:
        # Also for a run that failed or was interrupted: the page shows what it has. A full disk is told only once.
        with contextlib.suppress(OSError) if sys.exc_info()[0] else contextlib.nullcontext():
            if run.is_first and run.dir.is_dir():
                write_atomically(run.dir / "report.html", render([run.dir]).encode())
    return run.dir if run.is_first else None


def applicable_claims(
    system: System, recipe: ModuleType, scale: str, config: Any, options: Any
) -> tuple[tuple[Claim, ...], str]:
    """The claims that a run can speak to, and a remark for the reader.

    Claims are about the recipe's own data and settings at the laptop scale; elsewhere there are metrics, not verdicts.
    A recipe whose claims need real data says in ``no_verdict(config)`` what is missing, with an empty string where
    nothing is.
    """
    if not system.claims:
        return (), ""
    usual = recipe.Config()
    changed = _changed(config, usual)
    if any(name in _DATA for name in changed):
        return (), "The claims are about the recipe's own data; on yours there are numbers and pictures, not verdicts."
    if hasattr(recipe, "no_verdict") and (reason := recipe.no_verdict(config)):
        return (), reason  # its own data are not all there
    if scale != "laptop" or options.max_steps is not None:
        return (), "The claims are about the laptop scale at full length; this run was of another length."
    flags = ", ".join(f"--{name}" for name in changed)
    if flags:
        return (), f"The claims are about the default settings, and {flags} changed; there are numbers, not verdicts."
    return system.claims, ""


_DATA = {"data", "photos", "evoked", "fields", "field-data", "key-data", "series"}
"""Settings that say where samples come from."""


def _changed(config: Any, usual: Any, prefix: str = "") -> list[str]:
    """Names of the flags whose values differ, nested ones with their prefix."""
    found = []
    for field in dataclasses.fields(usual):
        name, now, before = (
            prefix + field.name.replace("_", "-"),
            getattr(config, field.name),
            getattr(usual, field.name),
        )
        if dataclasses.is_dataclass(before):
            found += _changed(now, before, f"{name}.")
        elif now != before:
            found.append(name)
    return found


def _command(system: System, arguments: Sequence[str]) -> str:
    kept = [argument for argument in arguments if argument not in ("--resume", "--quiet")]
    return shlex.join(["isthmus", "run", system.name, *kept])


def _print_outcome(folder: Path) -> None:
    """Metrics, indicative claims, and where the report is."""
    from isthmus.report import read

    record = read(folder)
    console = Console(highlight=False)
    if record["metrics"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("measured")
        table.add_column("", justify="right")
        table.add_column("published")
        for name, metric in record["metrics"].items():
            value = "not finite" if metric["value"] is None else f"{metric['value']:.4g} {metric['unit']}".rstrip()
            table.add_row(name, value, Text(metric["published"] or ""))
        console.print(table)
    if record["claims"]:
        console.print(Text("\nClaims, indicative: one run is one seed", style="bold"))
        for claim in record["claims"]:
            value = "" if claim["value"] is None else f"{claim['value']:.4g}, "
            told = f"{claim['text']} ({claim['metric']} {value}bar {claim['bar']})"
            console.print(Text.assemble(MARKS[claim["holds"]], " ", told))
    for note in record["notes"]:
        console.print(Text(note, style="dim"))
    console.print(Text(f"\nReport: {folder / 'report.html'}"))
