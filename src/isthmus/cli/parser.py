"""The outer layer of the command line: commands, their flags, and help by example."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from isthmus import __version__
from isthmus.catalog import PARTS
from isthmus.errors import UserError

_TOP = """\
start here
  isthmus list                         what there is, and what holds
  isthmus show spark                   one paper: facts, settings, claims, measured results
  isthmus run spark                    train, measure and draw, in about three minutes
  isthmus run spark --data folder:PICTURES --encoder resnet50 --scale paper
  isthmus apply runs/spark-seed0 photo.jpg
                                       use the finished run on something new
  isthmus report runs/spark-seed0      one HTML page about it
"""


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence and name the nearest flag."""

    commands: _Commands

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = getattr(parsed, "parser", self)
            chosen.error(unknown_flag(unknown[0], chosen._option_string_actions))
        return parsed

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            what, given, choices = wrong.groups()
            known = [choice.strip(" '") for choice in choices.split(",")]
            near = difflib.get_close_matches(given, known, n=2, cutoff=0.5)
            noun = "command" if what == "COMMAND" else what
            told = f"nearest: {', '.join(near)}" if near else f"it is one of {', '.join(known)}"
            message = f"there is no {noun} {given!r}; {told}"
        self.exit(2, f"isthmus: {message.rstrip('.')}. `{self.prog} --help` shows how it is used.\n")


def unknown_flag(given: str, known: Any) -> str:
    """What to say about a flag that does not exist: the nearest ones that do."""
    if not given.startswith("-"):
        return f"{given!r} is one argument too many"
    near = difflib.get_close_matches(given.partition("=")[0], list(known), n=3, cutoff=0.6)
    return f"there is no flag {given.partition('=')[0]}" + (f"; nearest: {', '.join(near)}" if near else "")


class _Commands:
    """The commands with their one-line helps, for completion."""

    def __init__(self, action: Any) -> None:
        self.choices: dict[str, argparse.ArgumentParser] = action.choices
        self._action = action

    @property
    def helps(self) -> dict[str, str]:
        return {choice.dest: choice.help or "" for choice in self._action._get_subactions()}


def build_parser() -> _Parser:
    """The parser of every command but ``run NAME …``, whose flags come from the recipe."""
    parser = _Parser(
        prog="isthmus",
        description="Encoders, bottlenecks and decoders from 52 papers: run them, check them, use them.",
        epilog=_TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"isthmus {__version__}")
    parser.set_defaults(handler=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    parser.commands = _Commands(commands)

    def command(name: str, handler: str, help: str, examples: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"examples\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(handler=_later(handler), parser=made)
        return made

    listing = command(
        "list",
        "listing:list_systems",
        "the systems: which are ready, and which of their claims hold",
        "  isthmus list --ready\n  isthmus list --part encoder\n  isthmus list --json | jq '.[] | select(.ready).name'",
    )
    listing.add_argument("--part", choices=PARTS, help="only systems of this part")
    listing.add_argument("--ready", action="store_true", help="only systems that can be run")
    _common(listing, results=True, json=True)

    show = command(
        "show",
        "listing:show_system",
        "one system: facts, settings, claims, newest measured result",
        "  isthmus show spark\n  isthmus show 21\n  isthmus show meg-decoding --json",
    )
    show.add_argument("name", metavar="NAME", help="a system's name, number or slug")
    _common(show, results=True, json=True)

    running = command(
        "run",
        "parser:_name_first",
        "train, measure and draw; every setting of the recipe is a flag",
        "  isthmus run spark                                  # laptop scale, built-in data\n"
        "  isthmus run spark --help                           # all flags of this recipe\n"
        "  isthmus run spark --data folder:PICTURES --encoder convnext_tiny\n"
        "  isthmus run spark --scale paper --devices 8 --precision bf16-mixed\n"
        "  isthmus run spark --scale paper --data random:224 --max-steps 1   # does it fit here?\n"
        "  isthmus run spark --resume --out runs/spark-seed0  # go on after an interruption",
    )
    running.add_argument("name", metavar="NAME", nargs="?", help="a ready system; its flags follow")

    claim = command(
        "claim",
        "claiming:claim",
        "the verdict on a system's claims over several seeds, recorded in results/",
        "  isthmus claim spark --seeds 0 1 2\n  isthmus claim --all\n"
        "exit code 1: a verdict differs from the recorded one, or a run failed",
    )
    claim.add_argument("name", metavar="NAME", nargs="?", help="a ready system")
    claim.add_argument("--all", action="store_true", help="every ready system")
    claim.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    claim.add_argument(
        "--out", type=Path, default=Path("runs/claims"), metavar="DIR", help="folder of the runs (default: runs/claims)"
    )
    claim.add_argument("--threads", type=int, metavar="N", help="CPU threads of a run")
    claim.add_argument("--accelerator", choices=("auto", "cpu", "cuda", "mps"), help="kind of device")
    _common(claim, results=True, json=True)

    apply = command(
        "apply",
        "using:apply",
        "use a finished run on new inputs",
        "  isthmus apply runs/spark-seed0 photo.jpg\n  isthmus apply runs/spark-seed0 PICTURES/ --out drawn/",
    )
    apply.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    apply.add_argument("inputs", metavar="INPUT", type=Path, nargs="+", help="files, or folders of files")
    apply.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: RUN/applied)")
    _common(apply, json=True)

    report = command(
        "report",
        "using:report",
        "one HTML page about one or several runs, which needs no network",
        "  isthmus report runs/spark-seed0\n  isthmus report runs/spark-seed0 runs/spark-seed1 --out both.html\n"
        "  isthmus report            # all runs under runs/",
    )
    report.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="folders of runs (default: all under runs/)")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html, report.html for several")
    _common(report, results=True)

    convert = command(
        "convert",
        "parser:_name_first",
        "turn a published checkpoint into safetensors",
        "  isthmus convert hornet_tiny_gf.pth\n"
        "  isthmus convert resnet50_1kpretrained_timm_style.pth --system spark\n"
        "  isthmus convert FILE --system spark --help         # what else this system takes",
    )
    convert.add_argument("official", metavar="OFFICIAL", type=Path, help="the published file")
    convert.add_argument("--system", metavar="NAME", help="whose checkpoint it is (default: found by its tensors)")
    convert.add_argument("--ema", action="store_true", help="take the moving average of the weights in the file")
    convert.add_argument("--out", type=Path, metavar="FILE", help="default: OFFICIAL with .safetensors")

    completion = command(
        "completion",
        "completion:script",
        "print a script that completes commands, systems and flags",
        '  eval "$(isthmus completion bash)"                  # in ~/.bashrc\n'
        '  eval "$(isthmus completion zsh)"                   # in ~/.zshrc, after compinit\n'
        "  isthmus completion fish > ~/.config/fish/completions/isthmus.fish",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _name_first(arguments: argparse.Namespace) -> int:
    raise UserError("name the system first: isthmus run NAME [flags]; `isthmus list --ready` shows the names.")


def _common(parser: argparse.ArgumentParser, results: bool = False, json: bool = False) -> None:
    if results:
        parser.add_argument(
            "--results", type=Path, metavar="DIR", help="folder of measured results (default: ./results)"
        )
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def _later(target: str) -> Callable[[argparse.Namespace], int]:
    """A handler that imports its module when it is called, so that ``--help`` and errors cost nothing."""
    module, _, name = target.partition(":")

    def call(arguments: argparse.Namespace) -> int:
        return getattr(import_module(f"isthmus.cli.{module}"), name)(arguments)

    return call
