"""Records, verdicts and pages: what a run leaves behind is complete, readable and honest."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from isthmus.catalog import Claim
from isthmus.report import Record, environment, judge, read

GAIN = Claim("gain", "It helps by four points.", "gain", at_least=4, published="about five")


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    widths: tuple[int, ...] = (8, 16)
    out: Path = Path("somewhere")
    bound: float = math.inf


# ------------------------------------------------------------------------------------------------------- verdicts


def test_the_mean_decides_unless_every_seed_must() -> None:
    values = {0: 5.0, 1: 3.0, 2: 7.0}
    by_mean = judge(GAIN, values)
    assert by_mean.holds
    assert (by_mean.mean, by_mean.spread) == (5.0, 2.0)
    assert not judge(Claim("gain", "…", "gain", at_least=4, rule="every"), values).holds
    assert judge(Claim("gain", "…", "gain", at_least=3, rule="every"), values).holds


@pytest.mark.parametrize(("value", "holds"), [(1.0, True), (2.0, True), (0.999, False), (2.001, False)])
def test_bars_are_inclusive_on_both_sides(value: float, holds: bool) -> None:
    assert judge(Claim("x", "…", "x", at_least=1, at_most=2), {0: value}).holds is holds


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_never_clears_a_bar(bad: float) -> None:
    for claim in (GAIN, Claim("x", "…", "x", at_most=1e9, at_least=-1e9)):
        verdict = judge(claim, {0: 100.0, 1: bad})
        assert not verdict.holds
        assert verdict.as_json()["values"] == {"0": 100.0, "1": None}
        json.dumps(verdict.as_json(), allow_nan=False)


def test_one_seed_has_no_spread_and_no_seed_no_verdict() -> None:
    assert judge(GAIN, {7: 4.0}).spread == 0
    with pytest.raises(ValueError, match="no run recorded the metric 'gain'"):
        judge(GAIN, {})


# -------------------------------------------------------------------------------------------------------- records


def test_a_record_on_disk_is_complete_at_every_stage(tmp_path: Path) -> None:
    record = Record(tmp_path, "toy", seed=3, config=Config(), claims=[GAIN], command="isthmus run toy")
    begun = read(tmp_path)
    assert begun["status"] == "running"
    assert begun["config"] == {"data": "digits", "widths": [8, 16], "out": "somewhere", "bound": "inf"}
    assert begun["claims"][0] | {"text": ""} == {
        "name": "gain",
        "text": "",
        "metric": "gain",
        "bar": "≥ 4",
        "rule": "mean",
        "published": "about five",
        "value": None,
        "holds": None,
    }
    record.metric("gain", 4.5, published=5, unit="points")
    halfway = read(tmp_path)
    assert halfway["metrics"] == {"gain": {"value": 4.5, "unit": "points", "published": "5"}}
    assert halfway["claims"][0]["holds"] is True
    record.metric("gain", float("nan"))
    assert read(tmp_path)["claims"][0]["holds"] is False
    record.note("once")
    record.note("once")
    record.artifact("weights", tmp_path / "model.safetensors", "loads in timm")
    record.finish("interrupted", "stopped by hand")
    ended = read(tmp_path)
    assert (ended["status"], ended["error"], ended["notes"]) == ("interrupted", "stopped by hand", ["once"])
    assert ended["artifacts"] == [{"name": "weights", "path": "model.safetensors", "text": "loads in timm"}]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_pictures_of_every_kind_are_kept_and_replaced(tmp_path: Path) -> None:
    record = Record(tmp_path, "toy")
    plot = Figure(figsize=(2, 1))
    plot.subplots().plot([1, 2])
    record.figure("a plot / of it", plot, "a caption")
    record.figure("pil", Image.new("RGB", (5, 4), (255, 0, 0)))
    half = torch.full((3, 4, 6), 0.5)
    record.figure("float", half)
    record.figure("grey", torch.zeros(4, 6, dtype=torch.uint8))
    record.figure("pil", Image.new("RGB", (7, 4)))
    figures = read(tmp_path)["figures"]
    assert [figure["name"] for figure in figures] == ["a plot / of it", "pil", "float", "grey"]
    assert figures[0]["file"] == "figures/a-plot-of-it.png"
    loaded = {}
    for figure in figures:
        with Image.open(tmp_path / figure["file"]) as image:
            loaded[figure["name"]] = image.copy()
    assert [loaded[name].size for name in ("pil", "float", "grey")] == [(7, 4), (6, 4), (6, 4)]
    assert loaded["float"].getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ValueError, match="a figure is a matplotlib figure"):
        record.figure("batch", torch.zeros(2, 3, 4, 4))


def test_a_long_curve_is_thinned_and_keeps_its_ends(tmp_path: Path) -> None:
    record = Record(tmp_path, "toy")
    record.curve("pretrain/loss", range(9_999), [float(i) for i in range(9_998)] + [math.nan])
    curve = read(tmp_path)["curves"]["pretrain/loss"]
    assert len(curve["x"]) == len(curve["y"]) <= 2001
    assert (curve["x"][0], curve["x"][-1], curve["y"][-1]) == (0, 9_998, None)
    with pytest.raises(ValueError, match="has 2 places and 1 values"):
        record.curve("bad", [1, 2], [1])


def test_resuming_keeps_the_start_and_adds_up_the_time(tmp_path: Path) -> None:
    Record(tmp_path, "toy").metric("old", 1)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(read(tmp_path) | {"started": "2026-01-01T00:00:00Z", "seconds": 100.0}))
    resumed = Record(tmp_path, "toy", resume=True)
    assert resumed.data["started"] == "2026-01-01T00:00:00Z"
    assert read(tmp_path)["seconds"] >= 100
    assert read(tmp_path)["metrics"] == {}
    assert Record(tmp_path, "toy").data["started"] > "2026-01-01T00:00:00Z"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    record = Record(tmp_path, "toy", write=False)
    record.metric("gain", 1)
    record.figure("grey", torch.zeros(4, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_raises(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"ermission"):
        Record(tmp_path, "toy")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no report.json"),
        ("{", "is no JSON"),
        ("[]", "not written by"),
        ('{"format": 1}', "not written by"),
    ],
)
def test_reading_a_record_that_is_none_says_so(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


def test_a_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    Record(tmp_path, "toy")
    (tmp_path / "report.json").write_text(json.dumps(read(tmp_path) | {"version": 2}))
    with pytest.raises(ValueError, match="version 2; this isthmus reads version 1"):
        read(tmp_path)


def test_the_environment_names_what_decides_numbers() -> None:
    found = environment()
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["cpu"]
