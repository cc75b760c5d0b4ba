"""Encoders and parts cross as the table in results/ says; a refusal names its reason."""

from __future__ import annotations

import json

import pytest

from tests.crossing import ENCODERS, PARTS, RESULTS, cross

RECORDED = json.loads((RESULTS / "crossing.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_works_or_refuses_as_recorded(encoder: str, part: str) -> None:
    found = cross(encoder, part)
    assert found == RECORDED[part][encoder]
    assert found == "works" or len(found.split()) > 5, "a refusal is a sentence"


def test_every_part_takes_most_encoders() -> None:
    assert len(ENCODERS) >= 6
    for part in PARTS:
        assert sum(RECORDED[part][encoder] == "works" for encoder in ENCODERS) >= 6
