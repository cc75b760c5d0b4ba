"""The command line: list · show · run · claim · apply · report · convert · completion.

Exit codes: 0 all went well; 1 a claim's verdict differs from the recorded one, the run failed, or a bug (with its
traceback); 2 a mistake in the command or its input; 130 interrupted. Nothing here imports torch until a command needs
it. ``ISTHMUS_DEBUG=1`` shows the traceback behind a one-line error.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from isthmus.cli.parser import build_parser

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # `run` and `convert` take flags that only the recipe knows.
        if len(arguments) > 1 and arguments[0] == "run" and arguments[1] not in ("-h", "--help"):
            from isthmus.cli.running import run

            return run(arguments[1], arguments[2:])
        if arguments[:1] == ["convert"]:
            from isthmus.cli.using import convert

            return convert(arguments[1:])
        if arguments[:1] == ["__complete"]:
            from isthmus.cli.completion import answer

            return answer(arguments[1:])
        parser = build_parser()
        parsed = parser.parse_args(arguments)
        if parsed.handler is None:
            parser.print_help()
            return OK
        return parsed.handler(parsed)
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`isthmus list | head`): nothing is wrong, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if os.environ.get("ISTHMUS_DEBUG"):
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    """Say what went wrong, and return the exit code it deserves.

    What a person can mend is one sentence: mistakes in the command or its input, files, a full disk. A run that could
    not go on for reasons of its own is one too, with another code. All else is a bug, shown whole.
    """
    from isthmus.errors import RunFailed, UserError

    sentence = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "isthmus":
        _say(_missing_package(error.name.partition(".")[0]))
        return USAGE
    if isinstance(error, RunFailed):
        _say(sentence)
        return FAILED
    if isinstance(error, (UserError, OSError)) or _refused_argument(error):
        _say(sentence)
        return USAGE
    traceback.print_exception(error)
    _say(f"{type(error).__name__}: {sentence} (a bug of isthmus, or of a package it uses)")
    return FAILED


def _refused_argument(error: Exception) -> bool:
    """Whether a constructor of ours refused what it was given: settings of the person at the keyboard."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    parts = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    ours = parts and parts[-1].startswith("isthmus.") and not parts[-1].startswith(("isthmus.engine", "isthmus.cli"))
    return (
        bool(ours)
        and type(error) is ValueError
        and any(
            frame.f_code.co_name in ("__init__", "__post_init__") and name.startswith("isthmus.")
            for frame, name in zip(frames, parts, strict=True)
        )
    )


def _missing_package(package: str) -> str:
    """Name the extra that brings a package, where one of ours does."""
    import re
    from importlib.metadata import PackageNotFoundError, requires

    try:
        wanted = requires("isthmus") or []
    except PackageNotFoundError:
        wanted = []
    for line in wanted:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and name.group().lower().replace("-", "_") == package.lower().replace("-", "_"):
            return f'this needs the package {package}: pip install "isthmus[{extra.group(1)}]".'
    return f"this needs the package {package}: pip install {package}."


def _say(sentence: str) -> None:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    which = f" (process {rank})" if rank != "0" else ""
    sys.stderr.write(f"isthmus{which}: {sentence}\n")
