"""One self-contained HTML page about one or several runs: no network, no script; wide, narrow, light, dark, print."""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from isthmus import __version__, catalog
from isthmus.report.cells import breakable, cell, duration, in_words, moment, number, table
from isthmus.report.plot import COLOURS, Curve, plot
from isthmus.report.record import read
from isthmus.report.using import apply_line, explained, line_for

DRIVING = ("lr", "weight_decay", "gradient_norm")  # scalars about the optimiser, not about what was learnt
SMALL = 320  # pictures narrower than this are drawn enlarged, with their pixels visible


def render(runs: Sequence[Path], results: Path | None = None) -> str:
    """A page about runs, those of one system side by side.

    Args:
        runs: folders of runs (or their ``report.json``), in the order in which they are to appear.
        results: folder of measured results, for the verdicts over seeds; ``./results`` or the package's own by default.

    Raises:
        ValueError: a folder holds no record of a run.
    """
    if not runs:
        raise ValueError("there is no run to report on; give the folders of some.")
    loaded = [_Run(Path(run), read(Path(run))) for run in runs]
    _label(loaded)
    names = list(dict.fromkeys(run.data["system"] for run in loaded))
    groups = {name: [run for run in loaded if run.data["system"] == name] for name in names}
    title = f"{', '.join(names)}: {len(loaded)} run{'s' if len(loaded) > 1 else ''}"
    body = "".join(_system(name, group, results) for name, group in groups.items())
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{css}</style></head>\n<body><main>{body}"
        f"<footer>Written by isthmus {escape(__version__)}. Everything on this page is inside this file.</footer>"
        "</main></body></html>\n"
    )


class _Run:
    """A record with the folder its files are in and the short name it has on the page."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.data = data
        self.label = self.folder.resolve().name


def _label(runs: list[_Run]) -> None:
    """Short names that tell the runs apart: the folder's name, with as many parents as that takes."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    for run, label in zip(runs, labels, strict=True):
        run.label = label


def _system(name: str, runs: list[_Run], results: Path | None) -> str:
    try:
        system = catalog.find(name)
    except catalog.UnknownSystem:
        system, record = None, None
        head = f"<h1>{escape(name)}</h1>"
    else:
        record = catalog.measured(system, results)
        link = f' · <a href="{escape(system.url)}">arXiv {escape(system.arxiv or "")}</a>' if system.url else ""
        venue = f", {escape(system.venue)}" if system.venue else ""
        head = (
            f"<h1>{escape(name)}</h1><p><strong>{escape(system.title)}</strong><br>"
            f'<span class="soft">{escape(system.authors)}, {system.year}{venue}{link}</span></p>'
            f"<p>{escape(system.summary)}</p>"
        )
        if system.headline:
            head += f'<p class="soft">The paper reports: {escape(system.headline)}.</p>'
    sections = [
        ("Claims", _claims(runs, record)),
        ("Pictures", _pictures(runs)),
        ("Numbers", _metrics(runs)),
        ("Curves", _curves(runs)),
        ("Good to know", _notes(runs)),
        ("What it wrote", _artifacts(runs)),
        ("Settings", _settings(runs)),
        ("Where it ran", _environment(runs)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return f'<article class="system"><header>{head}{_legend(runs)}{_status(runs)}</header>{body}</article>'


def _status(runs: list[_Run]) -> str:
    """A banner for every run that did not finish, with what to do about it."""
    told = []
    for run in runs:
        status, error = run.data["status"], run.data["error"]
        if status == "finished":
            continue
        sentence = {
            "running": f"is running, or was killed: last heard of {moment(run.data['updated'])}.",
            "interrupted": "was interrupted and can be resumed.",
            "failed": "failed.",
        }.get(status, f"is {status}.")
        which = f"Run {run.label}" if len(runs) > 1 else "This run"
        command = f"{run.data['command'].removesuffix(' --resume')} --resume"
        again = f" To go on: <code>{escape(command)}</code>" if run.data["command"] and status != "failed" else ""
        reason = f" {escape(error)}" if error else ""
        told.append(f'<div class="status {escape(status)}">{escape(which)} {escape(sentence)}{reason}{again}</div>')
    return "".join(told)


def _legend(runs: list[_Run]) -> str:
    if len(runs) < 2:
        return ""
    marks = [
        f'<span><i style="background:var(--s{index % COLOURS})"></i>{escape(run.label)}</span>'
        for index, run in enumerate(runs)
    ]
    return f'<div class="legend">{"".join(marks)}</div>'


# ------------------------------------------------------------------------------------------------ numbers and claims


def _claims(runs: list[_Run], record: dict[str, Any] | None) -> str:
    entries = _merged(runs, lambda data: {claim["name"]: claim for claim in data["claims"]})
    if not entries:
        return ""
    verdicts = {verdict["name"]: verdict for verdict in (record or {}).get("verdicts", ())}
    shown = any(_fits(claim, verdicts.get(name)) for name, claim in entries.items())
    heads = ["claim", "bar", "published"] + [run.label if len(runs) > 1 else "this run" for run in runs]
    heads += ["over seeds"] if shown else []
    columns = [(head, "number" if index > 2 else "") for index, head in enumerate(heads)]
    rows = []
    for name, claim in entries.items():
        bar = f"{claim['metric']} {claim['bar']}" + (", every seed" if claim["rule"] == "every" else "")
        cells = [
            cell(escape(claim["text"]), "name claim"),
            cell(f"<code>{breakable(bar)}</code>", "bar", "bar"),
            cell(escape(claim["published"] or "–"), label="published"),
        ]
        for head, run in zip(heads[3:], runs, strict=False):
            own = next((c for c in run.data["claims"] if c["name"] == name), None)
            cells.append(cell(_mark(own["holds"], number(own["value"])) if own else "–", "number", head))
        if shown:
            verdict = verdicts.get(name)
            fits = _fits(claim, verdict)
            figure = catalog.figure_of(verdict) if fits and verdict else ""
            cells.append(cell(_mark(verdict["holds"], figure) if fits and verdict else "–", "number", "over seeds"))
        rows.append(cells)
    told = (
        "One run uses one seed, so its marks are indicative; <code>isthmus claim</code> gives the verdict over seeds."
    )
    if record and shown:
        seeds = ", ".join(map(str, record["seeds"]))
        told += f" Recorded {escape(record['date'][:10])} with seeds {escape(seeds)}."
    return f'{table(columns, rows, "cards")}<p class="soft">{told}</p>'


def _fits(claim: dict[str, Any], verdict: dict[str, Any] | None) -> bool:
    """Whether a recorded verdict is about this very claim."""
    return verdict is not None and all(verdict[key] == claim[key] for key in ("metric", "bar", "rule"))


def _mark(holds: bool | None, figure: str) -> str:
    if holds is None:
        return '<span class="open">not measured</span>'
    kind, word = ("yes", "holds") if holds else ("no", "does not hold")
    return f'<span>{figure}<br><span class="{kind}">{"✓" if holds else "✗"} {word}</span></span>'


def _metrics(runs: list[_Run]) -> str:
    entries = _merged(runs, lambda data: data["metrics"])
    if not entries:
        return ""
    units = any(metric["unit"] for metric in entries.values())
    published = any(metric["published"] for metric in entries.values())
    heads = [("", ""), *((run.label if len(runs) > 1 else "measured", "number") for run in runs)]
    heads += [("unit", "")] * units + [("published", "")] * published
    meanings = explained(runs[0].data["system"])
    rows = []
    for name, metric in entries.items():
        meaning = f'<br><span class="soft">{escape(meanings[name])}</span>' if name in meanings else ""
        cells = [cell(f"<code>{breakable(name)}</code>{meaning}", "name")]
        for (head, _), run in zip(heads[1:], runs, strict=False):
            own = run.data["metrics"].get(name)
            cells.append(cell(number(own["value"]) if own else "–", "number", head))
        cells += [cell(escape(metric["unit"]), "soft", "unit")] * units
        rows.append(cells + [cell(escape(str(metric["published"] or "")), label="published")] * published)
    return table(heads, rows, "narrow cards")


def _curves(runs: list[_Run]) -> str:
    """A plot for every scalar of every kind of phase; what only says how the optimiser was driven is folded away."""
    told: dict[bool, list[str]] = {True: [], False: []}
    for title, curves in _grouped(runs).items():
        curves = {label: curve for label, curve in curves.items() if len({*curve.y} - {None}) > 1}
        drawn = plot(curves, f"{title} over steps")
        if drawn:
            ends = {label: next(y for y in reversed(curve.y) if y is not None) for label, curve in curves.items()}
            lines = [
                f'<span><i style="background:var(--s{index % COLOURS})"></i>{escape(label)} {number(end)}</span>'
                for index, (label, end) in enumerate(ends.items())
            ]
            caption = f'{escape(title)} over steps; last values<div class="legend">{"".join(lines)}</div>'
            figure = f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"
            told[title.rpartition("/")[2] in DRIVING].append(figure)
    shown = f'<div class="plots">{"".join(told[False])}</div>' if told[False] else ""
    if told[True]:
        shown += f"<details><summary>{', '.join(DRIVING).replace('_', ' ')}</summary>"
        shown += f'<div class="plots">{"".join(told[True])}</div></details>'
    return shown


def _grouped(runs: list[_Run]) -> dict[str, dict[str, Curve]]:
    """Curves that belong into one plot: of one run the phases of a kind, of several runs the same phase.

    The kind of a phase is its name up to the first hyphen: ``pretrain`` and ``pretrain-zeroed`` stand together.
    """
    found: dict[str, dict[str, Curve]] = {}
    for run in runs:
        for name, curve in run.data["curves"].items():
            phase, _, scalar = name.rpartition("/")
            title = name if len(runs) > 1 else f"{phase.partition('-')[0]}/{scalar}".lstrip("/")
            label = run.label if len(runs) > 1 else phase or scalar
            found.setdefault(title, {})[label] = Curve(curve["x"], curve["y"])
    return found


# ------------------------------------------------------------------------------------------------- pictures and words


def _pictures(runs: list[_Run]) -> str:
    names = _merged(runs, lambda data: {figure["name"]: figure for figure in data["figures"]})
    told = []
    for name in names:
        owners = [(run, figure) for run in runs for figure in run.data["figures"] if figure["name"] == name]
        figures = [_picture(run, figure, run.label if len(runs) > 1 else "") for run, figure in owners]
        told.append(figures[0] if len(figures) == 1 else f'<div class="beside">{"".join(figures)}</div>')
    return f'<div class="pictures">{"".join(told)}</div>' if told else ""


def _picture(run: _Run, figure: dict[str, Any], label: str) -> str:
    caption = escape(" · ".join(text for text in (label, figure["caption"] or figure["name"]) if text))
    path = run.folder / figure["file"]
    data = _png_inside(run.folder, path)
    if isinstance(data, str):
        gone = f'<p class="soft">The picture {escape(str(path))} {data}.</p>'
        return f"<figure>{gone}<figcaption>{caption}</figcaption></figure>"
    width, height = struct.unpack(">II", data[16:24])  # a PNG's header
    zoom = max(1, SMALL // width)
    kind = ' class="small"' if zoom > 1 else ""
    source = base64.b64encode(data).decode()
    return (
        f'<figure><div class="scroll"><img{kind} src="data:image/png;base64,{source}" width="{width * zoom}" '
        f'height="{height * zoom}" style="--own:{width * zoom}px" alt="{caption}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _png_inside(folder: Path, path: Path) -> bytes | str:
    """A picture in the folder of a run, or why there is none; nothing else of the machine gets on a page."""
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "is outside of the run and was left out"
        data = path.read_bytes() if path.is_file() else b""
    except (OSError, ValueError, RuntimeError):  # no file name, or links in a circle
        data = b""
    if not data:
        return "is missing"
    whole = data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24 and data[16:20] != bytes(4)
    return data if whole else "is no PNG"


def _notes(runs: list[_Run]) -> str:
    notes = list(dict.fromkeys(note for run in runs for note in run.data["notes"]))
    told = []
    for note in notes:
        owners = [run.label for run in runs if note in run.data["notes"]]
        which = f"{', '.join(owners)}: " if 0 < len(owners) < len(runs) else ""
        told.append(f"<li>{escape(which + note)}</li>")
    return f"<ul>{''.join(told)}</ul>" if told else ""


def _artifacts(runs: list[_Run]) -> str:
    """Every file that was left for use, what it is, and the line that uses it."""
    told = []
    for run in runs:
        for artifact in run.data["artifacts"]:
            path = run.folder / artifact["path"]
            line = line_for(path, artifact["text"])
            paste = f'<code class="paste">{escape(line)}</code>' if line else ""
            told.append(f"<dt><code>{escape(str(path))}</code></dt><dd>{escape(artifact['text'])}{paste}</dd>")
    used = "".join(f'<p><code class="paste">{escape(line)}</code></p>' for line in map(_use, runs) if line and told)
    return f"<dl>{''.join(told)}</dl>{used}" if told else ""


def _use(run: _Run) -> str | None:
    try:
        system = catalog.find(run.data["system"])
    except catalog.UnknownSystem:
        return None
    return apply_line(system, run.folder) if run.data["status"] == "finished" else None


def _settings(runs: list[_Run]) -> str:
    """The command, its settings as a table, and those of every part that has some of its own, folded away."""
    commands = list(dict.fromkeys(run.data["command"] for run in runs if run.data["command"]))
    told = "".join(f'<p><code class="paste">{escape(command)}</code></p>' for command in commands)
    every = [
        _flat({**run.data["config"], "seed": run.data["seed"], "scale": run.data["scale"], **run.data["options"]})
        for run in runs
    ]
    parts = dict.fromkeys(name.rpartition(".")[0] for settings in every for name in settings)
    for part in parts:
        own = [{n: value for n, value in each.items() if n.rpartition(".")[0] == part} for each in every]
        shown = _facts(runs, own)
        differ = ", which differ" if any(each != own[0] for each in own) else ""
        summary = f"{escape(part)}: {len({*itertools.chain(*own)})} settings{differ}"
        told += f"<details><summary>{summary}</summary>{shown}</details>" if part else shown
    return told


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of parts under ``part.name``, as their flags are called."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def _environment(runs: list[_Run]) -> str:
    def flat(data: dict[str, Any]) -> dict[str, Any]:
        machine = {key: value for key, value in data["hardware"].items() if value is not None}
        spent = {"started": moment(data["started"]), "time": duration(data["seconds"])}
        commit, _, changes = (data["commit"] or "not a checkout").partition("+")
        return {**spent, **machine, **data["versions"], "commit": " + ".join(filter(None, (commit[:14], changes)))}

    return _facts(runs, [flat(run.data) for run in runs])


def _facts(runs: list[_Run], columns: list[dict[str, Any]]) -> str:
    """Names and values, one column a run; a row where the runs differ is marked."""
    heads = [run.label if len(runs) > 1 else "" for run in runs]
    rows = []
    for key in dict.fromkeys(itertools.chain.from_iterable(columns)):
        values = [in_words(column[key]) if key in column else "–" for column in columns]
        differs = "differs" if len(set(values)) > 1 else ""
        pairs = zip(values, heads, strict=True)
        cells = [cell(f"<code>{escape(value)}</code>", differs, head) for value, head in pairs]
        rows.append([cell(breakable(key), "name"), *cells])
    return table(["", *heads] if len(runs) > 1 else [], rows, "narrow cards" if len(runs) > 1 else "narrow")


# ---------------------------------------------------------------------------------------------------------- helpers


def _merged(runs: list[_Run], entries: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Entries of all runs by name, in order of appearance; the first run that has one speaks for it."""
    merged: dict[str, Any] = {}
    for run in runs:
        for name, entry in entries(run.data).items():
            merged.setdefault(name, entry)
    return merged
