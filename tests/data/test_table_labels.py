"""Labels of tables as people have them: gaps, words, far numbers, and those that no class can have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from isthmus.codec import UserError
from isthmus.data import load
from tests.data.test_files import encoded, picture

IMAGES = [{"bytes": encoded(picture((6, 5), seed)), "path": None} for seed in range(8)]


def table(path: Path, label: list[Any], **columns: list[Any]) -> str:
    pq.write_table(pa.table({"image": IMAGES[: len(label)], "label": label, **columns}), path)
    return f"parquet:{path}"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (math.nan, "the cell is empty"),
        (None, "the cell is empty"),
        (math.inf, "inf is no whole number, as classes are"),
        (-math.inf, "-inf is no whole number, as classes are"),
        (0.5, "0.5 is no whole number, as classes are"),
    ],
)
@pytest.mark.parametrize("needs", [("image", "label"), ("label",)])
def test_a_label_that_is_no_class_is_named_with_its_row_and_column(
    wrong: float | None, why: str, needs: tuple[str, ...], tmp_path: Path
) -> None:
    dataset = load(table(tmp_path / "a.parquet", [0.0, 1.0, wrong, 1.0]), "all", needs)
    assert dataset.fetch(range(4))["label"].tolist() == [0, 1, 1, 1]
    assert dataset.skipped == [("row 2 of a.parquet", f"label: {why}")]
    assert dataset.labels.dtype.kind == "i"


def test_labels_without_a_single_class_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 0 of a.parquet: label: 0.25 is no whole number"):
        load(table(tmp_path / "a.parquet", [0.25, 0.5, 0.75]), "all", ("image", "label"))


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([0, 10**9, 3, 10**9], ["0", "3", "1000000000"], [0, 2, 1, 2]),
        ([0.0, 1e9, 3.0, 1e9], ["0", "3", "1000000000"], [0, 2, 1, 2]),
        ([2**62, 5, 5, 6], ["5", "6", str(2**62)], [2, 0, 0, 1]),
        ([-1, 1, 1, -1], ["-1", "1"], [0, 1, 1, 0]),
        ([-1, 0, 1, 1], ["-1", "0", "1"], [0, 1, 2, 2]),
        ([1, 5, 900, 5], None, [1, 5, 900, 5]),
        ([True, False, True, True], None, [1, 0, 1, 1]),
        (["b", "a", "c", "a"], ["a", "b", "c"], [1, 0, 2, 0]),
    ],
)
def test_numbers_far_apart_are_numbered_as_they_occur(
    labels: list[Any], classes: list[str] | None, expected: list[int], tmp_path: Path
) -> None:
    dataset = load(table(tmp_path / "a.parquet", labels), "all", ("image", "label"))
    assert dataset.classes == classes
    assert dataset.labels.tolist() == expected


def test_numbers_are_the_same_in_every_split(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [10**9, 7])
    table(tmp_path / "test.parquet", [5])
    classes = [load(f"parquet:{tmp_path}", part, ("image", "label")).classes for part in ("train", "test")]
    assert classes == [["5", "7", "1000000000"]] * 2
    assert load(f"parquet:{tmp_path}", "train+val", ("label",)).labels.tolist() == [2, 1]


def test_the_usual_sign_of_no_label_is_no_class(tmp_path: Path) -> None:
    dataset = load(table(tmp_path / "a.parquet", [0, 1, 2, -1]), "all", ("image", "label"))
    assert dataset.fetch([3])["label"].tolist() == [0]
    assert dataset.skipped == [("row 3 of a.parquet", "label: -1 is no class")]
    names = datasets.ClassLabel(names=["a", "b"])
    rows = datasets.Dataset.from_dict({"label": [0, -1, 1]}, datasets.Features({"label": names}))
    rows.to_parquet(str(tmp_path / "b.parquet"))
    dataset = load(f"parquet:{tmp_path / 'b.parquet'}", "all", ("label",))
    assert dataset.fetch([1])["label"].tolist() == [1]
    assert dataset.skipped == [("row 1 of b.parquet", "label: -1 is no class: there are 2")]


def test_people_and_objects_are_numbered_too(tmp_path: Path) -> None:
    source = table(
        tmp_path / "a.parquet",
        [0, 1, 1],
        subject=[10**9, 4, 10**9],
        boxes=[[[0, 0, 1, 1]], [], [[0, 0, 1, 1]] * 2],
        labels=[[7], [], [10**8, 7]],
    )
    dataset = load(source, "all", ("image", "subject", "boxes", "labels"))
    assert [int(dataset[i]["subject"]) for i in range(3)] == [1, 0, 1]
    assert [dataset[i]["labels"].tolist() for i in range(3)] == [[0], [], [1, 0]]


def test_a_stream_names_labels_that_no_class_can_have(tmp_path: Path) -> None:
    for part in ("train", "test"):
        table(tmp_path / f"{part}-0.parquet", [0.0, math.nan, 1e9, 0.5, 1.0])
    stream = load(f"shards:{tmp_path}/*.parquet", "train", ("image", "label"))
    assert stream.fetch(range(2))["label"].tolist() == [0, 1]
    assert [reason for _, reason in stream.skipped] == [
        "label: the cell is empty",
        "label: 1000000000.0 is no class",
        "label: 0.5 is no whole number, as classes are",
    ]


def test_a_series_of_one_dimension_is_one_channel(tmp_path: Path) -> None:
    source = table(tmp_path / "a.parquet", [0, 1], signal=[[float(i) for i in range(96)]] * 2)
    assert load(source, "all", ("signal", "label"))[0]["signal"].shape == (1, 96)
    two = table(tmp_path / "b.parquet", [0, 1], signal=[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]] * 2)
    assert torch.equal(load(two, "all", ("signal",))[0]["signal"], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
