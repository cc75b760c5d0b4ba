"""A damaged or hostile record is one sentence; only pictures of the run get on its page."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from isthmus.codec import UserError
from isthmus.report import Record, read, render


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record = Record(tmp_path / "run", "spark", config={"a": 1})
    record.metric("accuracy", 0.5)
    record.figure("picture", Image.new("RGB", (4, 4), "red"), "A picture.")
    record.curve("train/loss", [0, 1], [2.0, 1.0])
    record.artifact("weights", tmp_path / "run" / "w.safetensors", "weights")
    record.note("a note")
    record.finish()
    return tmp_path / "run"


def change(run: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((run / "report.json").read_text())
    edit(data)
    (run / "report.json").write_text(json.dumps(data))


@pytest.mark.parametrize("key", ["config", "metrics", "system", "notes"])
def test_a_missing_key_is_named(run: Path, key: str) -> None:
    change(run, lambda data: data.pop(key))
    with pytest.raises(UserError, match=rf"report.json is damaged: it lacks '{key}'\."):
        render([run])


def test_every_key_may_be_missing_or_of_another_kind_without_a_raw_error(run: Path) -> None:
    whole = json.loads((run / "report.json").read_text())

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]

    for place in places(whole):
        for value in (None, 3, "x", [], {}, [3], {"x": 3}, "gone"):
            data = json.loads(json.dumps(whole))
            holder = data
            for key in place[:-1]:
                holder = holder[key]
            if value == "gone":
                del holder[place[-1]]
            else:
                holder[place[-1]] = value
            (run / "report.json").write_text(json.dumps(data))
            with contextlib.suppress(UserError):
                assert render([run])


def test_settings_nested_without_end_are_told(run: Path) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = {"a": deep}
    change(run, lambda data: data["config"].update(a=deep))
    with pytest.raises(UserError, match="nested too deep"):
        render([run])
    text = (run / "report.json").read_text()
    (run / "report.json").write_text(
        text.replace('"config": {', '"config": {"b": ' + "[" * 99_999 + "]" * 99_999 + ", ")
    )
    with pytest.raises(UserError, match="is no JSON"):
        read(run)


@pytest.mark.parametrize("how", ["above", "absolute", "linked", "linked folder"])
def test_a_picture_outside_of_the_run_is_left_out(run: Path, how: str) -> None:
    secret = run.parent / "secret.png"
    Image.new("RGB", (5, 5), "blue").save(secret)
    file = {"above": "../secret.png", "absolute": str(secret)}.get(how, "figures/link.png")
    if how == "linked":
        os.symlink(secret, run / "figures" / "link.png")
    if how == "linked folder":
        os.symlink(run.parent, run / "out")
        file = "out/secret.png"
    change(run, lambda data: data["figures"][0].update(file=file))
    page = render([run])
    assert "is outside of the run and was left out" in page
    assert "base64" not in page


def test_what_is_no_picture_is_said(run: Path) -> None:
    for file, told in (
        ("report.json", "is no PNG"),
        ("figures", "is missing"),
        ("none.png", "is missing"),
        ("\0", "missing"),
    ):
        change(run, lambda data, file=file: data["figures"][0].update(file=file))
        assert told in render([run])


def test_a_linked_run_shows_its_own_pictures(run: Path) -> None:
    os.symlink(run, run.parent / "latest")
    assert "base64" in render([run.parent / "latest"])


def test_a_damaged_record_does_not_keep_a_run_from_going_on(run: Path) -> None:
    (run / "report.json").write_text("{")
    record = Record(run, "spark", resume=True)
    assert read(run)["system"] == record.data["system"]
