"""``isthmus claim NAME --seeds 0 1 2``: the verdict over seeds, compared with the recorded one and recorded anew.

``results/claims/NAME.json`` is one object::

    format, version   "isthmus-claims", 1
    system, number, date (ISO 8601, UTC), seeds, command
    hardware, versions, commit, code
    config            the settings that were measured
    seconds           {seed: seconds}
    metrics           {name: {values: {seed: value}, mean, spread, unit, published}}
    verdicts          [{name, text, metric, bar, rule, published, values: {seed: value}, mean, spread, holds}]

``spread`` is the sample standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isthmus import catalog, recipes
from isthmus.catalog import System
from isthmus.cli.flags import check
from isthmus.cli.listing import MARKS
from isthmus.errors import RunFailed, UserError

FORMAT, VERSION = "isthmus-claims", 1
Launch = Callable[[System, int, Path], int]


class NoVerdict(UserError):
    """The data that the claims are about are not at hand; the message tells which."""


def claim(arguments: argparse.Namespace) -> int:
    """Measure one system, or all that are ready; exit code 1 where a verdict differs from the recorded one."""
    if arguments.all == bool(arguments.name):
        raise UserError("name one system, or give --all.")
    chosen = [s for s in catalog.systems() if s.ready and s.claims] if arguments.all else [catalog.find(arguments.name)]
    results = arguments.results or Path("results")
    launch = _launcher(arguments.threads, arguments.accelerator)
    code, told = 0, []
    for system in chosen:
        before = catalog.measured(system, arguments.results)
        try:
            record = measure(system, arguments.seeds, arguments.out, launch)
        except (RunFailed, NoVerdict) as error:
            if not arguments.all:
                raise
            sys.stderr.write(f"isthmus: {error}\n")
            code = 1 if isinstance(error, RunFailed) else code
            continue
        changed = differences(before, record)
        write(record, results)
        told.append(record)
        if not arguments.json:
            _print_record(record, changed, results)
        code = 1 if changed else code
    if arguments.json:
        sys.stdout.write(json.dumps(told if arguments.all else told[0], indent=1, ensure_ascii=False) + "\n")
    return code


def measure(
    system: System, seeds: Sequence[int], out: Path, launch: Callable[[System, int, Path], int]
) -> dict[str, Any]:
    """Run every seed that is not there yet and judge the claims.

    Args:
        system: a ready system with claims.
        seeds: at least one, all different.
        out: folder of the runs: ``out/NAME/seedN``. Finished runs of the same code and settings are reused.
        launch: runs the recipe with a seed in a folder, going on with what is there; returns an exit code.

    Raises:
        UserError: there is nothing to claim, or the seeds are not fit.
        NoVerdict: the recipe's own data are not all there.
        RunFailed: a run ended with an error.
    """
    from isthmus.report import Verdict, code, judge, plain, read, versions

    if not system.ready:
        raise UserError(f"{system.name} has no recipe yet, so nothing can be measured.")
    if not system.claims:
        raise UserError(f"{system.name} claims nothing yet; claims stand in catalog/data/{system.slug}.toml.")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds takes different numbers from 0 on, got {' '.join(map(str, seeds)) or 'none'}.")
    recipe = recipes.load(system.name)
    if hasattr(recipe, "no_verdict") and (reason := recipe.no_verdict(recipe.Config())):
        raise NoVerdict(reason)
    check(recipe, recipe.Config())
    now = {"code": code(system.name), "versions": versions(), "config": plain(recipe.Config())}
    reports = {}
    for seed in seeds:
        folder = out / system.name / f"seed{seed}"
        if (folder / "report.json").is_file() and any(read(folder).get(key) != value for key, value in now.items()):
            _move_away(folder)  # measured by other code or with other settings
        if not (folder / "finished.json").is_file():
            ended = launch(system, seed, folder)
            if ended == 130:
                raise KeyboardInterrupt(f"interrupted; the same command goes on with seed {seed}.")
            if ended:
                raise RunFailed(f"{system.name} with seed {seed} ended with exit code {ended}; see {folder}/log.txt.")
        reports[seed] = read(folder)

    def values(metric: str) -> dict[int, float]:
        found = {seed: report["metrics"].get(metric) for seed, report in reports.items()}
        return {s: math.nan if m["value"] is None else m["value"] for s, m in found.items() if m is not None}

    verdicts: list[Verdict] = []
    for stated in system.claims:
        measured = values(stated.metric)
        if len(measured) < len(reports):
            missing = sorted(set(reports) - set(measured))
            raise RunFailed(f"{system.name} recorded no metric {stated.metric!r} with seed {missing[0]}.")
        verdicts.append(judge(stated, measured))
    last = reports[seeds[-1]]
    return {
        "format": FORMAT,
        "version": VERSION,
        "system": system.name,
        "number": system.number,
        "date": last["updated"],
        "seeds": list(seeds),
        "command": f"isthmus claim {system.name} --seeds {' '.join(map(str, seeds))}",
        **{key: last[key] for key in ("hardware", "versions", "commit", "code", "config")},
        "seconds": {str(seed): report["seconds"] for seed, report in reports.items()},
        "metrics": {name: _summary(metric, values(name)) for name, metric in last["metrics"].items()},
        "verdicts": [verdict.as_json() for verdict in verdicts],
    }


def differences(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Claims whose verdict differs from the recorded one; a claim with another bar, or a new one, has none recorded."""
    if before is None:
        return []
    recorded = {(v["name"], v["metric"], v["bar"], v["rule"]): v["holds"] for v in before["verdicts"]}
    told = []
    for verdict in now["verdicts"]:
        earlier = recorded.get((verdict["name"], verdict["metric"], verdict["bar"], verdict["rule"]))
        if earlier is not None and earlier != verdict["holds"]:
            words = {True: "holds", False: "does not hold"}
            told.append(f"{verdict['name']}: recorded {words[earlier]}, now {words[verdict['holds']]}")
    return told


def write(record: dict[str, Any], results: Path) -> Path:
    """Put a record where ``isthmus list`` and the README's table find it."""
    from isthmus.codec import write_atomically

    path = results / "claims" / f"{record['system']}.json"
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def _move_away(folder: Path) -> None:
    """Rename a run's folder to the next free ``NAME-before-N`` beside it."""
    number = 1
    while (beside := folder.with_name(f"{folder.name}-before-{number}")).exists():
        number += 1
    folder.rename(beside)


def _launcher(threads: int | None, accelerator: str | None) -> Launch:
    """Runs a seed in a process of its own, so that no seed inherits memory or state from the one before."""
    flags = ["--threads", str(threads)] if threads else []
    flags += ["--accelerator", accelerator] if accelerator else []

    def launch(system: System, seed: int, folder: Path) -> int:
        command = [sys.executable, "-m", "isthmus.cli", "run", system.name, "--seed", str(seed), "--out", str(folder)]
        sys.stderr.write(f"{system.name}, seed {seed}\n")
        begun = ["--resume"] if (folder / "config.json").is_file() else []
        process = subprocess.Popen([*command, *begun, *flags], stdout=subprocess.DEVNULL)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the same signal, and is writing its checkpoint
            return 130

    return launch


def _summary(metric: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    numbers = list(values.values())
    sound = all(map(math.isfinite, numbers))
    return {
        "values": {str(seed): value if math.isfinite(value) else None for seed, value in values.items()},
        "mean": statistics.fmean(numbers) if sound else None,
        "spread": (statistics.stdev(numbers) if len(numbers) > 1 else 0.0) if sound else None,
        "unit": metric["unit"],
        "published": metric["published"],
    }


def _print_record(record: dict[str, Any], changed: list[str], results: Path) -> None:
    console = Console(highlight=False)
    seeds = record["seeds"]
    title = f"{record['system']}: {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("", "claim", "bar", "mean ± spread", *(f"seed {seed}" for seed in seeds), "published"):
        table.add_column(header, justify="right" if "seed" in header or "±" in header else "left")
    for v in record["verdicts"]:
        bar = f"{v['metric']} {v['bar']}" + (" (every seed)" if v["rule"] == "every" else "")
        each = ["not finite" if value is None else f"{value:.4g}" for value in v["values"].values()]
        mark = Text.assemble(MARKS[v["holds"]], " holds" if v["holds"] else " does not hold")
        table.add_row(mark, v["text"], bar, catalog.figure_of(v), *each, Text(v["published"] or "–"))
    console.print(table)
    for sentence in changed:
        console.print(Text(f"differs from the record: {sentence}", style="bold red"))
    console.print(Text(f"written to {results / 'claims' / record['system']}.json", style="dim"))
