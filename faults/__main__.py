"""``python -m faults [KIND …] [--seconds 60] [--seed 0] [--add]``: try, count, write results/faults.{json,md}."""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from faults import arguments, damage, formats, kills
from isthmus.codec import write_atomically

RESULTS = Path(__file__).resolve().parent.parent / "results"
KINDS: dict[str, Callable[[Path, random.Random], Iterator[str | None]]] = {
    "kills": kills.kills,
    "full disks": kills.full_disks,
    "damaged runs": damage.runs,
    "damaged models": damage.models,
    "pcz files": formats.pcz_files,
    "pictures": formats.pictures,
    "checkpoints": formats.checkpoints,
    "arrays": formats.arrays,
    "constructors": arguments.constructors,
    "settings": arguments.fields,
}
_SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seconds", type=float, default=60, help="for each kind")
    parser.add_argument("--seed", type=int, help="of what is tried; another one every time without it")
    parser.add_argument("--add", action="store_true", help="to the counts that stand in results/ already")
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"there is no kind {', '.join(unknown)}; known are {', '.join(KINDS)}.")
    torch.set_num_threads(1)
    path = RESULTS / "faults.json"
    standing: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    for kind in given.kinds or KINDS:
        found = _counted(kind, given.seconds, seed)
        before = standing.get(kind) if given.add else None
        if before:
            found["tried"] += before["tried"]
            found["wrong"] += before["wrong"]
            found["what"] = dict((Counter(before["what"]) + Counter(found["what"])).most_common(_SHOWN))
        standing[kind] = found
        sys.stdout.write(f"{kind}: {found['tried']} tried, {found['wrong']} wrong\n")
        for told, count in found["what"].items():
            sys.stdout.write(f"  {count} × {told}\n")
        sys.stdout.flush()
        standing = {name: standing[name] for name in KINDS if name in standing}
        write_atomically(path, (json.dumps(standing, indent=1, ensure_ascii=False) + "\n").encode())
        write_atomically(RESULTS / "faults.md", _table(standing).encode())


def _counted(kind: str, seconds: float, seed: int) -> dict[str, Any]:
    tried, wrong, end = 0, Counter[str](), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="faults") as scratch:
        for outcome in KINDS[kind](Path(scratch), random.Random(f"{seed} {kind}")):
            tried += 1
            if outcome is not None:
                wrong[outcome.replace(f"{scratch}/", "")] += 1
            if time.monotonic() > end:
                break
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"tried": tried, "wrong": wrong.total(), "what": dict(wrong.most_common(_SHOWN)), "date": today}


def _table(standing: dict[str, Any]) -> str:
    lines = [
        "# Faults on purpose",
        "",
        "Written by `python -m faults` (`make faults`); `--add` adds to the counts.",
        "",
    ]
    lines += ["| kind | tried | wrong | newest |", "|-|-:|-:|-|"]
    lines += [f"| {kind} | {each['tried']} | {each['wrong']} | {each['date']} |" for kind, each in standing.items()]
    wrong = {kind: each["what"] for kind, each in standing.items() if each["what"]}
    if wrong:
        lines += ["", "What came out wrong, the most frequent of each kind:", ""]
        lines += [f"- {kind}, {count} times: `{told}`" for kind, what in wrong.items() for told, count in what.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
