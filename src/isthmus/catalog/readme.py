"""The table of systems in the README."""

from __future__ import annotations

from pathlib import Path

from isthmus.catalog.entries import System, systems
from isthmus.catalog.results import figure_of, measured, verdict_of

MARKS = ("<!-- systems: begin (python -m isthmus.catalog --readme) -->", "<!-- systems: end -->")


def markdown_table(results: Path | None = None) -> str:
    """The table of systems as Markdown: number, name with the paper, what it does, and what was measured."""
    rows = ["| | system | part | what it does | measured here |", "|-|-|-|-|-|"]
    for system in systems():
        name = f"**{system.name}**" if system.ready else system.name
        paper = f"[{system.authors} {system.year}]({system.url})" if system.url else f"{system.authors} {system.year}"
        rows.append(
            f"| {system.number:02d} | {name}<br>{paper} | {system.part} | {system.summary} "
            f"| {_markdown_verdicts(system, results)} |"
        )
    return "\n".join(rows)


def _markdown_verdicts(system: System, results: Path | None) -> str:
    if not system.ready:
        return ""
    record = measured(system, results)
    told = []
    for claim in system.claims:
        holds = verdict_of(claim, record)
        figures = {v["name"]: v for v in (record or {}).get("verdicts", ())}
        mark = {True: "✓", False: "✗", None: "not measured yet:"}[holds]
        value = f" **{figure_of(figures[claim.name])}**" if holds is not None else ""
        told.append(f"{mark} {claim.text.rstrip('.')} ({claim.metric}{value}, bar {claim.bar})")
    return "<br>".join(told) or "ready"


def update_readme(readme: Path, results: Path | None = None, write: bool = True) -> bool:
    """Put the table of systems between the marks of a README; tells whether it was out of date.

    Raises:
        ValueError: the marks are missing.
    """
    text = readme.read_text(encoding="utf-8")
    begin, end = text.find(MARKS[0]), text.find(MARKS[1])
    if begin < 0 or end < begin:
        raise ValueError(f"{readme} lacks the marks {MARKS[0]!r} … {MARKS[1]!r}.")
    new = f"{text[: begin + len(MARKS[0])]}\n{markdown_table(results)}\n{text[end:]}"
    if write and new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text
