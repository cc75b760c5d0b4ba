"""``isthmus run NAME``: every field of the recipe's ``Config`` and of ``RunOptions`` is a flag."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isthmus import catalog, recipes
from isthmus.catalog import Claim, System
from isthmus.cli.listing import MARKS

SCALES = ("laptop", "paper")
_Parsed = TypeVar("_Parsed")


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a recipe with the settings given as flags; print what it measured and where the report is."""
    if name.startswith("-"):
        raise ValueError("name the system first: isthmus run NAME [flags]; `isthmus list --ready` shows the names.")
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
    except (ValueError, OSError, ModuleNotFoundError):
        if run.is_first and not run.resumed and not any(run.dir.glob("checkpoints/*")):
            # A mistake that came out before anything was learnt: the corrected command finds its folder free.
            shutil.rmtree(run.dir, ignore_errors=True)
        raise
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


# ------------------------------------------------------------------------------------------------------------ flags


def parse(system: System, recipe: ModuleType, arguments: Sequence[str]) -> tuple[str, Any, Any]:
    """Scale, ``Config`` and ``RunOptions`` from flags; a run that is resumed starts from its own settings.

    Raises:
        ValueError: a flag does not exist (the nearest are named) or has an unfit value.
    """
    import tyro

    from isthmus.engine.options import RunOptions

    scale = _value(arguments, "--scale") or "laptop"
    if scale not in SCALES:
        raise ValueError(f"--scale is laptop or paper, not {scale!r}.")
    config = recipe.Config() if scale == "laptop" else recipe.Config.paper()
    options = RunOptions()
    out = _value(arguments, "--out")
    if "--resume" in arguments and out and (Path(out) / "config.json").is_file():
        scale, config, options = _settings_of(Path(out), system, config, options)
    config = _in_the_unit_given(config, arguments)
    both = dataclasses.make_dataclass(
        "Both",
        [
            ("recipe", Annotated[type(config), tyro.conf.arg(name="")]),
            ("run", Annotated[RunOptions, tyro.conf.arg(name="")]),
            ("scale", Literal["laptop", "paper"], scale),
        ],
    )
    prog = f"isthmus run {system.name}"
    check_flags(arguments, [*_flags(config), *_flags(options), "--scale", "--help", "--json"], prog)
    parsed = through_tyro(
        lambda: tyro.cli(
            both,
            default=both(config, options, scale),
            args=list(arguments),
            prog=prog,
            description=_about(system),
        ),
        arguments,
    )
    return parsed.scale, parsed.recipe, parsed.run


def _in_the_unit_given(config: Any, arguments: Sequence[str]) -> Any:
    """A config in which ``--PHASE.epochs`` takes the place of the recipe's steps, and the other way round."""
    given = {argument.partition("=")[0] for argument in arguments}
    for field in dataclasses.fields(config):
        training = getattr(config, field.name)
        if not {"steps", "epochs"} <= getattr(training, "__dataclass_fields__", {}).keys():
            continue
        flag = f"--{field.name.replace('_', '-')}"
        for unit, other in (("epochs", "steps"), ("steps", "epochs")):
            if f"{flag}.{unit}" in given and f"{flag}.{other}" not in given and getattr(training, unit) is None:
                # One of the two has to be set at all times; the flag's own value comes afterwards.
                training = dataclasses.replace(training, **{unit: 1, other: None})
                config = dataclasses.replace(config, **{field.name: training})
    return config


def check_flags(arguments: Sequence[str], known: Sequence[str], prog: str) -> None:
    """Refuse a flag that does not exist, naming the nearest ones.

    Raises:
        ValueError: the sentence for the person who typed it.
    """
    spelled = {flag.replace("_", "-") for flag in known}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and len(flag) > 2 and flag not in spelled:
            near = difflib.get_close_matches(flag, sorted(spelled), n=3, cutoff=0.55)
            told = f"nearest: {', '.join(near)}" if near else f"`{prog} --help` lists all"
            raise ValueError(f"there is no flag {flag}; {told}.")


def through_tyro(call: Callable[[], _Parsed], arguments: Sequence[str]) -> _Parsed:
    """Let tyro parse; what it prints about a mistake becomes one sentence.

    Raises:
        ValueError: tyro's complaint.
    """
    if {"-h", "--help"} & set(arguments):
        return call()  # prints the help and leaves
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            return call()
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise ValueError(_sentence(told.getvalue())) from None


def _sentence(box: str) -> str:
    """The first paragraph inside tyro's box, which has round corners or is plain ASCII."""
    paragraph: list[str] = []
    for line in (line.strip("│| ") for line in box.splitlines()[1:]):
        separator = not line or set(line) <= set("─-+╰╯")
        if separator and paragraph:
            break
        paragraph += [] if separator else [line]
    text = re.sub(r"^Error parsing (recipe|run): ", "", " ".join(paragraph))
    return text.rstrip(".") + "." if text else "the flags could not be understood."


def _flags(settings: Any, prefix: str = "") -> list[str]:
    """All spellings of a dataclass's flags, nested ones with their prefix."""
    found = []
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += _flags(value, f"{name}.")
        found += (
            [f"--{name}", f"--{prefix}no-{field.name.replace('_', '-')}"] if isinstance(value, bool) else [f"--{name}"]
        )
    return found


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag given as ``--flag value`` or ``--flag=value``."""
    for index, argument in enumerate(arguments):
        if argument == flag:
            return arguments[index + 1] if index + 1 < len(arguments) else None
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _settings_of(folder: Path, system: System, config: Any, options: Any) -> tuple[str, Any, Any]:
    """Scale, config and options that a run was started with, to go on with the same."""
    from isthmus.engine.folder import read_config

    saved = read_config(folder)
    if saved["name"] != system.name:
        raise ValueError(f"{folder} holds a run of {saved['name']}, not of {system.name}.")
    report = folder / "report.json"
    scale = json.loads(report.read_text(encoding="utf-8")).get("scale", "laptop") if report.is_file() else "laptop"
    return scale, restored(config, saved["config"] or {}), restored(options, saved["options"])


def restored(like: Any, saved: Mapping[str, Any]) -> Any:
    """A dataclass like the given one, with the values that were saved as JSON."""
    values = {}
    for field in dataclasses.fields(like):
        if field.name not in saved:
            continue
        value, model = saved[field.name], getattr(like, field.name)
        if dataclasses.is_dataclass(model) and isinstance(value, Mapping):
            value = restored(model, value)
        elif isinstance(value, list):
            value = tuple(value) if isinstance(model, tuple) or model is None else value
        elif isinstance(value, str) and "Path" in str(field.type):
            value = Path(value)
        values[field.name] = value
    return dataclasses.replace(like, **values)


def _about(system: System) -> str:
    first = catalog.docstring(system.recipe).partition("\n\n")[0]
    return (
        f"{first}\n\n{system.title} ({system.authors}, {system.year}).\n\n"
        f"examples: isthmus run {system.name}  |  isthmus run {system.name} --seed 1 --out runs/try  |  "
        f"isthmus run {system.name} --scale paper --max-steps 1"
    )


def _command(system: System, arguments: Sequence[str]) -> str:
    kept = [argument for argument in arguments if argument not in ("--resume", "--quiet")]
    return shlex.join(["isthmus", "run", system.name, *kept])


# ---------------------------------------------------------------------------------------------------------- outcome


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
