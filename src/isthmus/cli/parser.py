"""The outer layer of the command line: commands, their flags, and help by example."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from isthmus import __version__
from isthmus.catalog import PARTS

_TOP = """\
start here
  isthmus list                         what there is, and what holds
  isthmus show spark                   one paper: facts, settings, claims, measured results
  isthmus run spark                    train, measure and draw, in about three minutes
  isthmus run spark --data folder:PICTURES --encoder resnet50 --scale paper
  isthmus apply runs/spark photo.jpg   use the finished run on something new
  isthmus report runs/spark            one HTML page about it
"""


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence and name the nearest flag."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = getattr(parsed, "parser", self)
            chosen.error(unknown_flag(unknown[0], chosen._option_string_actions))
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"isthmus: {message.rstrip('.')}. `{self.prog} --help` shows how it is used.\n")


def unknown_flag(given: str, known: Any) -> str:
    """What to say about a flag that does not exist: the nearest ones that do."""
    if not given.startswith("-"):
        return f"{given!r} is one argument too many"
    near = difflib.get_close_matches(given.partition("=")[0], list(known), n=3, cutoff=0.6)
    return f"there is no flag {given.partition('=')[0]}" + (f"; nearest: {', '.join(near)}" if near else "")


def build_parser() -> argparse.ArgumentParser:
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
    return parser


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
