"""Rewrite or check the README's table: ``python -m isthmus.catalog --readme | --check [README.md]``."""

import sys
from pathlib import Path

from isthmus.catalog.readme import update_readme


def _main(arguments: list[str]) -> str | int:
    if arguments[:1] not in (["--readme"], ["--check"]):
        return "usage: python -m isthmus.catalog --readme | --check [README.md]"
    readme = Path(arguments[1] if len(arguments) > 1 else "README.md")
    stale = update_readme(readme, Path("results"), write=arguments[0] == "--readme")
    if arguments[0] == "--check" and stale:
        return f"{readme}: the table of systems is out of date; run `python -m isthmus.catalog --readme`"
    sys.stdout.write(f"{readme}: {'rewritten' if stale else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
