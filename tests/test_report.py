"""Records, verdicts and pages: what a run leaves behind is complete, readable and honest."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from isthmus.catalog import Claim
from isthmus.report import Record, code, environment, judge, read, render
from isthmus.report.plot import HEIGHT, Curve, plot

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


def test_a_folder_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        Record(tmp_path / "file", "toy")


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


# ---------------------------------------------------------------------------------------------------------- pages


class Page(HTMLParser):
    """Checks that tags are closed in order, and gathers text, addresses and pictures."""

    VOID = frozenset({"meta", "br", "wbr", "img", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.sources, self.links = "", [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.sources += [found[key] for key in ("src", "srcset", "data", "poster") if key in found]
        self.links += [found["href"]] if "href" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def finished_run(folder: Path, gain: float = 5.0, **config: object) -> Path:
    record = Record(folder, "spark", config={"steps": 10, **config}, claims=[GAIN], command="isthmus run spark")
    record.metric("gain", gain, published="about five", unit="points")
    record.figure("picture", torch.rand(3, 8, 8), "A <b>small</b> picture & more")
    record.curve("pretrain/loss", range(50), [1 / (1 + i) for i in range(50)])
    record.note("Two images <did> not decode.")
    record.artifact("encoder", folder / "encoder.safetensors", "for timm")
    record.finish()
    return folder


def test_a_page_holds_everything_and_needs_no_network(tmp_path: Path) -> None:
    html = render([finished_run(tmp_path / "one")], tmp_path)
    page = Page(html)
    for told in (
        "It helps by four points.",
        "gain ≥ 4",
        "about five",
        "✓ holds",
        "A <b>small</b> picture & more",
        "Two images <did> not decode.",
        "encoder.safetensors",
        "pretrain/loss over steps; last values",
        "pretrain 0.02",
        "isthmus run spark",
        str(torch.__version__).partition("+")[0],
    ):
        assert told in page.text, told
    assert page.sources, "no picture"
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(link.startswith("https://arxiv.org/") for link in page.links)
    assert "<script" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("<svg") == 1


def test_runs_of_one_system_stand_side_by_side_and_differences_are_marked(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "a" / "run", encoder="resnet18")
    second = finished_run(tmp_path / "b" / "run", gain=1.0, encoder="resnet50")
    html = render([first, second], tmp_path)
    page = Page(html)
    assert page.text.count("It helps by four points.") == 1
    assert "✓ holds" in page.text
    assert "✗ does not hold" in page.text
    assert "a/run" in page.text
    assert "b/run" in page.text
    assert re.search(
        r'<td class="differs"[^>]*><code>resnet18</code></td><td class="differs"[^>]*><code>resnet50', html
    )
    assert re.search(r'<td data-label="a/run"><code>10</code></td><td data-label="b/run"><code>10</code></td>', html)
    assert html.count('class="line"') == 2


def test_settings_of_parts_are_a_table_of_their_own_and_no_python(tmp_path: Path) -> None:
    training = {"lr": 0.1, "betas": [0.9, 0.99], "optimizer_args": {}, "ema": None}
    run = finished_run(tmp_path / "run", image={"data": "digits", "training": training}, flip=True)
    text = Page(render([run], tmp_path)).text
    assert "image.training: 4 settings" in text
    assert "image.training.betas" in text
    assert "0.9 0.99" in text
    settings = text[text.rindex("Settings") : text.index("Where it ran")]
    assert not re.search(r"[{\['(]", settings), "Python in the page"


def test_a_metric_of_a_claim_is_explained_by_it(tmp_path: Path) -> None:
    record = Record(tmp_path, "spark")
    record.metric("tile_speedup", 1.5)
    record.metric("other", 1.0)
    record.finish()
    text = Page(render([tmp_path], tmp_path)).text
    assert "the ResNet-50 encoder is at least 1.25 times as fast" in text


def test_a_run_that_is_for_use_says_how(tmp_path: Path) -> None:
    record = Record(tmp_path, "spark")
    record.artifact("encoder", tmp_path / "encoder.safetensors", "an encoder")
    record.finish()
    assert f"isthmus apply {tmp_path} FILES" in Page(render([tmp_path], tmp_path)).text


def test_phases_of_a_kind_share_a_plot_and_the_optimisers_scalars_are_folded_away(tmp_path: Path) -> None:
    record = Record(tmp_path, "spark")
    for phase in ("pretrain", "pretrain-zeroed", "finetune-spark"):
        record.curve(f"{phase}/loss", [1, 2], [2.0, 1.0])
        record.curve(f"{phase}/lr", [1, 2], [0.2, 0.1])
        record.curve(f"{phase}/weight_decay", [1, 2], [0.05, 0.05])
    html = render([tmp_path], tmp_path)
    open_part, _, folded = html.partition("<details>")
    assert "pretrain/loss over steps" in open_part
    assert open_part.count("<svg") == folded.count("<svg") == 2
    assert open_part.count('class="line"') == 3
    assert "lr over steps" not in open_part
    assert "weight_decay over steps" not in html, "a constant is no curve"


def test_an_unfinished_run_shows_what_it_has_and_how_to_go_on(tmp_path: Path) -> None:
    record = Record(tmp_path, "spark", command="isthmus run spark --out x")
    record.finish("interrupted", "Stopped at step 5.")
    text = Page(render([tmp_path], tmp_path)).text
    assert "was interrupted" in text
    assert "Stopped at step 5." in text
    assert "isthmus run spark --out x --resume" in text
    record.finish("failed", "The loss was not finite.")
    assert "failed" in Page(render([tmp_path], tmp_path)).text


def test_the_verdict_over_seeds_is_shown_only_for_the_same_bar(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (tmp_path / "claims").mkdir()
    verdict = judge(GAIN, {0: 5.0, 1: 6.0}).as_json()
    record = {"format": "isthmus-claims", "version": 1, "date": "2026-01-02T00:00:00Z", "seeds": [0, 1]}
    path = tmp_path / "claims" / "spark.json"
    path.write_text(json.dumps(record | {"verdicts": [verdict]}))
    assert "5.5 ± 0.71" in Page(render([run], tmp_path)).text
    path.write_text(json.dumps(record | {"verdicts": [verdict | {"bar": "≥ 3"}]}))
    assert "5.5 ± 0.71" not in Page(render([run], tmp_path)).text


def test_a_lost_picture_does_not_lose_the_page(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run / "figures" / "picture.png").unlink()
    assert "is missing" in Page(render([run], tmp_path)).text
    with pytest.raises(ValueError, match="no run to report on"):
        render([], tmp_path)
    with pytest.raises(ValueError, match=r"holds no report\.json"):
        render([tmp_path / "nowhere"], tmp_path)


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([0.1, 0.35, 0.9], ["0.2", "0.4", "0.6", "0.8"]),
        ([1e-5, 1e-2, 1.0], ["0.0001", "0.01", "1"]),
        ([0.15, 9.0], ["0.2", "0.5", "1", "2", "5"]),
        ([3.0, 3.0], ["3"]),
        ([0.0, -2.0], ["-2", "-1", "0"]),
        ([0, 40_000], ["20k", "40k"]),
    ],
)
def test_axes_have_round_marks_inside_the_picture(values: list[float], marks: list[str]) -> None:
    drawn = plot({"run": Curve(range(len(values)), values)}, "loss")
    texts = re.findall(r'<text x="46" y="([\d.]+)"[^>]*>([^<]+)</text>', drawn)
    assert set(marks) <= {text for _, text in texts}
    assert all(0 < float(y) < HEIGHT for y, _ in texts)
    assert "nan" not in drawn


def test_a_curve_with_gaps_is_broken_and_an_empty_one_left_out() -> None:
    drawn = plot({"run": Curve([0, 1, 2, 3], [1.0, None, 2.0, 1.5])}, "loss")
    path = re.search(r' d="([^"]+)"', drawn)
    assert path is not None
    assert path.group(1).count("M") == 2
    assert plot({"run": Curve([0], [None])}, "loss") == ""


def test_the_digest_of_the_code_is_that_of_what_can_change_a_systems_numbers(tmp_path: Path) -> None:
    shared = "recipes/_shared.py"
    for name in ("layers/a.py", "recipes/spark.py", "recipes/rotnet.py", shared, "cli/b.py", "report/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = code("spark", tmp_path)
    assert before != code("rotnet", tmp_path)
    for name, matters in (("recipes/rotnet.py", False), ("cli/b.py", False), (shared, True)):
        (tmp_path / name).write_text("changed")
        assert (code("spark", tmp_path) != before) is matters, name
    (tmp_path / shared).write_text(shared)
    assert code("spark", tmp_path) == before
