"""Shell completion: the script asks ``isthmus __complete WORDS…``, which answers from the catalog and the recipes.

Nothing is frozen into the script, so a new system or a new flag completes at once.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from isthmus import catalog
from isthmus.catalog import Setting

_BASH = """\
# isthmus completion for bash; in ~/.bashrc:  eval "$(isthmus completion bash)"
_isthmus() {
    local IFS=$'\\n' word="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=($(compgen -W "$(isthmus __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | cut -f1)" -- "$word"))
}
complete -o default -F _isthmus isthmus
"""
_ZSH = """\
#compdef isthmus
# isthmus completion for zsh; in ~/.zshrc, after compinit:  eval "$(isthmus completion zsh)"
_isthmus() {
    local -a found
    found=(${(f)"$(isthmus __complete "${(@)words[2,CURRENT]}" 2>/dev/null | sed -e 's/:/\\\\:/g' -e $'s/\\t/:/')"})
    (( $#found )) && _describe isthmus found || _files
}
compdef _isthmus isthmus
"""
_FISH = """\
# isthmus completion for fish:  isthmus completion fish > ~/.config/fish/completions/isthmus.fish
function __isthmus
    set -l words (commandline -opc) (commandline -ct)
    isthmus __complete $words[2..-1] 2>/dev/null
end
complete -c isthmus -a '(__isthmus)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
SOURCES = ("digits", "photos", "scenes", "random:224", "folder:", "parquet:", "hub:", "shards:")
_NAMED = ("show", "run", "claim")  # commands whose first argument is a system


def script(arguments: argparse.Namespace) -> int:
    """Print the completion script of a shell."""
    sys.stdout.write(SCRIPTS[arguments.shell])
    return 0


def answer(words: Sequence[str]) -> int:
    """Print what the last word may become, one candidate a line, with a tab before its description."""
    for candidate, description in candidates(words):
        sys.stdout.write(f"{candidate}\t{description}\n" if description else f"{candidate}\n")
    return 0


def candidates(words: Sequence[str]) -> list[tuple[str, str]]:
    """What may stand in the place of the last word, given those before it; empty where files are wanted."""
    from isthmus.cli.parser import build_parser

    *before, last = words or [""]
    commands = build_parser().commands
    if not before:
        found = [(name, help) for name, help in commands.helps.items() if help]
    elif before[0] in _NAMED and len(before) == 1 and not last.startswith("-"):
        found = [(s.name, s.summary) for s in catalog.systems() if s.ready or before[0] == "show"]
    elif before[-1] == "--system":
        found = [(s.name, s.summary) for s in catalog.systems() if s.ready]
    elif before[0] == "run":
        found = _run_flags(before, last)
    elif before[0] in commands.choices and last.startswith("-"):
        actions = commands.choices[before[0]]._actions
        found = [(flag, action.help or "") for action in actions for flag in action.option_strings if flag[:2] == "--"]
    elif before[0] in commands.choices:
        actions = commands.choices[before[0]]._actions
        wanted = [a for a in actions if a.choices and (before[-1] in a.option_strings or not a.option_strings)]
        found = [(str(choice), "") for action in wanted for choice in action.choices or ()]
    else:
        found = []
    return [(text, description) for text, description in found if text.startswith(last)]


def _run_flags(before: Sequence[str], last: str) -> list[tuple[str, str]]:
    """Flags of ``isthmus run NAME``, or the values of the flag before the cursor, read from source."""
    known = {s.name.replace("_", "-"): s for s in _settings(before[1] if len(before) > 1 else "")}
    if last.startswith("-"):
        found = [(f"--{name}", setting.doc) for name, setting in known.items()]
        return [("--scale", "laptop, or the paper's settings"), ("--json", "print the report as JSON"), *found]
    flag = before[-1].removeprefix("--")
    if flag == "scale":
        return [("laptop", ""), ("paper", "")]
    if flag == "data" and flag in known:
        return [(source, "") for source in SOURCES]
    return [(value, "") for value in _literals(known[flag].type)] if flag in known else []


def _settings(name: str) -> list[Setting]:
    options = catalog.settings(Path(catalog.__file__).parents[1] / "engine" / "options.py", "RunOptions")
    try:
        system = catalog.find(name)
    except catalog.UnknownSystem:
        return options
    return [*(catalog.settings(system.recipe) if system.ready else []), *options]


def _literals(annotation: str) -> list[str]:
    """The words of a ``Literal[…]`` in an annotation."""
    constants = [node.value for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str)]
