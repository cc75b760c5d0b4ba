"""The harness of ``make faults`` counts what comes out wrong; a little of each quick kind comes out right."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from faults import damage, formats
from faults.__main__ import KINDS, _counted, _table


@pytest.mark.parametrize("kind", ["pcz_files", "checkpoints", "arrays"])
def test_mutated_files_are_told(kind: str, tmp_path: Path) -> None:
    if kind == "pcz_files":
        pytest.importorskip("constriction")
    outcomes = list(itertools.islice(getattr(formats, kind)(tmp_path, random.Random(0)), 60))
    assert outcomes == [None] * 60


def test_what_comes_out_wrong_is_counted_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "kills", lambda scratch, chance: iter([None, "other weights", None, "other weights"]))
    found = _counted("kills", 60, 0)
    assert (found["tried"], found["wrong"], found["what"]) == (4, 2, {"other weights": 2})
    assert "- kills, 2 times: `other weights`" in _table({"kills": found})


def test_damage_always_changes_something_in_the_end() -> None:
    chance, data = random.Random(0), bytes(range(50))
    assert sum(damage.mutated(data, chance) != data for _ in range(200)) > 190
    assert damage.mutated(b"", chance) == b"\0"
