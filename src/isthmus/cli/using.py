"""``isthmus apply``, ``report`` and ``convert``: what a finished run and a published checkpoint are good for."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isthmus import catalog, recipes
from isthmus.errors import UserError


def apply(arguments: argparse.Namespace) -> int:
    """Use a finished run on new inputs; print the files that were written."""
    from isthmus.cli.flags import check, settings_of
    from isthmus.engine.folder import read_config
    from isthmus.engine.options import RunOptions

    folder = arguments.run
    name = read_config(folder)["name"]
    if not (folder / "finished.json").is_file():
        raise UserError(f"{folder} is not finished; go on with `isthmus run {name} --resume --out {folder}` first.")
    recipe = recipes.load(name)
    _, config, _ = settings_of(folder, catalog.find(name), recipe.Config(), RunOptions())
    check(recipe, config)
    inputs = _files(arguments.inputs)
    out = arguments.out or folder / "applied"
    if hasattr(recipe, "apply"):
        written = [Path(path) for path in recipe.apply(folder, inputs, out)]
    else:
        from isthmus.tasks import applying

        written = applying.apply(folder, inputs, out, recipe.answer)
    if arguments.json:
        sys.stdout.write(json.dumps([str(path) for path in written], indent=1) + "\n")
    else:
        sys.stdout.write("".join(f"{path}\n" for path in written))
        for path in written:
            if path.name == "answers.json":
                sys.stdout.write(_answers(json.loads(path.read_text(encoding="utf-8"))))
    return 0


def _answers(found: dict[str, dict[str, object]]) -> str:
    """What was found on every input, a line each."""
    lines = []
    for name, facts in found.items():
        told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if key != "files")
        lines.append(f"{name}: {told}\n")
    return "".join(lines)


def report(arguments: argparse.Namespace) -> int:
    """Write one HTML page about runs; print where it is."""
    from isthmus.codec import write_atomically
    from isthmus.report import render

    runs = arguments.runs or _runs_here()
    for run in runs:
        if not run.exists():
            raise UserError(f"there is no {run}; give the folders of runs, such as those under runs/.")
    target = arguments.out or (runs[0] / "report.html" if len(runs) == 1 and runs[0].is_dir() else Path("report.html"))
    if target.is_dir():
        target = target / "report.html"
    write_atomically(target, render(runs, arguments.results).encode())
    sys.stdout.write(f"{target}\n")
    return 0


def convert(arguments: Sequence[str]) -> int:
    """Turn a published checkpoint into safetensors; what the file does not tell are flags of the system."""
    from isthmus.cli.parser import build_parser
    from isthmus.codec import tables

    parser = build_parser()
    helped = {"-h", "--help"} & set(arguments)
    if "--system" not in " ".join(arguments) and helped:
        parser.parse_args(["convert", "--help"])
    own = [argument for argument in arguments if argument not in ("-h", "--help")]
    parsed, rest = parser.parse_known_args(["convert", *own])
    system = catalog.find(parsed.system).name if parsed.system else ""
    if system and system not in tables.PUBLISHED:
        known = ", ".join(tables.PUBLISHED)
        raise UserError(f"{system} has no published checkpoint to convert; those that have: {known}.")
    if helped:
        return _options_of(system)
    out = parsed.out or parsed.official.with_suffix(".safetensors")
    if out.resolve() == parsed.official.resolve():
        raise UserError(f"{out} would overwrite the checkpoint; give another --out.")

    from isthmus.codec import published
    from isthmus.codec.checkpoints import read_checkpoint

    found = read_checkpoint(parsed.official, parsed.ema)
    each = published.find(found, system)
    sys.stderr.write(f"{each.of}: {found.told}\n")
    prog = f"isthmus convert {parsed.official} --system {each.of}"
    made = _with_flags(functools.partial(each.read, found), each.make, rest, prog)
    sys.stdout.write(f"{each.save(made, found, out)}\n")
    return 0


def _with_flags(read: Callable[..., Any], make: Callable[..., Any] | None, rest: Sequence[str], prog: str) -> Any:
    """Call ``read`` with what of ``make``'s keywords is given as flags."""
    import tyro

    from isthmus.cli.flags import check_flags, through_tyro

    options = list(inspect.signature(make).parameters)[1:] if make is not None else []
    check_flags(rest, [*(f"--{name}" for name in options), *(f"--no-{name}" for name in options), "--help"], prog)
    if make is None or not options:
        if rest:
            raise UserError(f"{prog} takes nothing else, got {' '.join(rest)}.")
        return read()

    def keep(_found: None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**dict(zip(options, args, strict=False)), **kwargs}

    call = functools.partial(functools.wraps(make)(keep), None)
    return read(**through_tyro(lambda: tyro.cli(call, args=list(rest), prog=prog), rest))


def _options_of(system: str) -> int:
    """Print what ``convert`` takes for a system."""
    from isthmus.codec import published

    makes = [each.make for each in published.published(system) if each.make is not None]
    make = max(makes, key=lambda function: len(inspect.signature(function).parameters), default=None)
    if make is None or len(inspect.signature(make).parameters) < 2:
        sys.stdout.write(f"isthmus convert FILE --system {system} takes no other flags than --out and --ema.\n")
        return 0
    return _with_flags(lambda **_: 0, make, ["--help"], f"isthmus convert FILE --system {system}")


def _files(inputs: Sequence[Path]) -> list[Path]:
    """Inputs as files; a folder stands for the files in it.

    Raises:
        UserError: an input does not exist, or a folder holds nothing.
    """
    found: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise UserError(f"there is no file {path}.")
        inside = (
            sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise UserError(f"the folder {path} holds no file.")
        found += inside
    return found


def _runs_here() -> list[Path]:
    """Every run under ``runs/``, oldest first."""
    found = [path.parent for path in Path("runs").rglob("report.json")]
    if not found:
        raise UserError("there are no runs under runs/; give their folders, or start one with `isthmus run NAME`.")
    return sorted(found, key=lambda folder: (folder / "report.json").stat().st_mtime)
