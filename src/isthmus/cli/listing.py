"""``isthmus list`` and ``isthmus show``: what there is, without importing anything heavy."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isthmus import catalog
from isthmus.catalog import Claim, System

MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}


def list_systems(arguments: argparse.Namespace) -> int:
    """Print the table of systems, or the same as JSON."""
    chosen = [s for s in catalog.systems() if arguments.part in (None, s.part) and (s.ready or not arguments.ready)]
    if arguments.json:
        return _print_json([describe(system, arguments.results) for system in chosen])
    console = _console()
    names, parts = (max(len(getattr(s, key)) for s in catalog.systems()) for key in ("name", "part"))
    room = max(20, console.width - names - parts - len("00readyclaims") - 10)  # 10: two spaces between columns
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("", "name", "part", "ready", "claims", "what it does"):
        table.add_column(header, no_wrap=True)
    for system in chosen:
        record = catalog.measured(system, arguments.results)
        marks = Text()
        for claim in system.claims if system.ready else ():
            marks.append(*MARKS[catalog.verdict_of(claim, record)])
        name = Text(system.name, style="bold cyan" if system.ready else "dim")
        summary = Text(system.summary)
        summary.truncate(room, overflow="ellipsis")
        ready = "yes" if system.ready else ""
        table.add_row(Text(f"{system.number:02d}", style="dim"), name, system.part, ready, marks, summary)
    console.print(table)
    ready = sum(s.ready for s in chosen)
    console.print(
        f"\n{ready} of {len(chosen)} ready. Claims: ✓ holds, ✗ does not hold, · not measured yet. "
        "`isthmus show NAME` tells more, `isthmus run NAME` runs it."
    )
    return 0


def show_system(arguments: argparse.Namespace) -> int:
    """Print one system's facts, settings, claims and newest measured result."""
    system = catalog.find(arguments.name)
    record = catalog.measured(system, arguments.results)
    settings = catalog.settings(system.recipe) if system.ready else []
    if arguments.json:
        facts = describe(system, arguments.results)
        facts["settings"] = [dataclasses.asdict(setting) for setting in settings]
        return _print_json({**facts, "measured": record})
    console = _console()
    console.print(Text(f"{system.number:02d}  {system.name}", style="bold cyan"))
    console.print(Text(system.title, style="bold"))
    paper = [f"{system.authors}, {system.year}", system.venue, system.url]
    console.print(Text(" · ".join(item for item in paper if item), style="dim"))
    console.print(Text(f"\n{system.summary}"))
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row("part", system.part)
    facts.add_row("reported", Text(system.headline or "no figure could be confirmed"))
    facts.add_row("data", ", ".join(system.data) or "none")
    facts.add_row("recipe", Text(str(_short(system.recipe)) if system.ready else "not written yet"))
    console.print(facts)
    _show_claims(console, system, record)
    _show_settings(console, settings)
    if system.ready:
        more = "; --help lists every flag" if any(s.usual for s in settings) else ""
        console.print(Text(f"\nisthmus run {system.name}", style="bold"), f" runs it with these settings{more}.")
    return 0


def _show_claims(console: Console, system: System, record: dict[str, Any] | None) -> None:
    if not system.claims:
        return
    table = Table(title="Claims", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("", "claim", "bar", "measured", "published"):
        table.add_column(column, overflow="fold")
    found = {verdict["name"]: verdict for verdict in (record or {}).get("verdicts", ())}
    for claim in system.claims:
        holds = catalog.verdict_of(claim, record)
        verdict = found.get(claim.name) if holds is not None else None
        figure = catalog.figure_of(verdict) if verdict else "not yet"
        bar = f"{claim.metric} {claim.bar}" + (" (every seed)" if claim.rule == "every" else "")
        table.add_row(Text(*MARKS[holds]), claim.text, bar, figure, Text(claim.published or "–"))
    console.print("")
    console.print(table)
    if record:
        where = record.get("hardware", {})
        console.print(
            Text(
                f"measured {record['date'][:10]} with seeds {', '.join(map(str, record['seeds']))} "
                f"on {where.get('accelerator') or where.get('cpu', 'an unknown machine')}",
                style="dim",
            )
        )


def _show_settings(console: Console, settings: list[catalog.Setting]) -> None:
    if not settings:
        return
    table = Table(title="Settings", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("flag", no_wrap=True, style="cyan")
    table.add_column("default", overflow="fold", max_width=60)
    if any(setting.paper for setting in settings):
        table.add_column("paper", overflow="fold", max_width=60)
    table.add_column("meaning", overflow="fold")
    for s in settings:
        if s.usual:
            continue
        cells = [f"--{s.name.replace('_', '-')}", Text(_as_typed(s.default))]
        cells += [Text(_as_typed(s.paper or ""))] if len(table.columns) == 4 else []
        table.add_row(*cells, Text(s.doc or s.type))
    console.print("")
    console.print(table)


def _as_typed(value: str) -> str:
    """A value as it stands behind its flag: words without commas and brackets, quoted only where the shell asks."""
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return " ".join(_words(read)) or "none"


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for item in value.items() for word in _words(list(item))]
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in _words(item)]
    if value == "":
        return ["''"]
    text = str(value)
    return [shlex.quote(text) if re.search(r"[\s'\"$`\\;|<>()]", text) else text]


def describe(system: System, results: Path | None = None) -> dict[str, Any]:
    """A system as JSON: its facts, whether it is ready, and its claims with the newest verdicts."""
    record = catalog.measured(system, results)
    found = {verdict["name"]: verdict for verdict in (record or {}).get("verdicts", ())}

    def claim_facts(claim: Claim) -> dict[str, Any]:
        holds = catalog.verdict_of(claim, record)
        value = found[claim.name]["mean"] if holds is not None else None
        return {**dataclasses.asdict(claim), "holds": holds, "measured": value}

    facts = {field.name: getattr(system, field.name) for field in dataclasses.fields(system)}
    return facts | {
        "data": list(system.data),
        "url": system.url,
        "ready": system.ready,
        "claims": [claim_facts(claim) for claim in system.claims],
    }


def _console() -> Console:
    """As wide as the terminal; wide enough for whole lines where the output goes to a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _print_json(value: Any) -> int:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    return 0
