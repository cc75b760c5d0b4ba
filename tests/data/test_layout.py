"""What the folders of a data set mean: parts, classes, nothing, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from isthmus.data import Dataset, load
from isthmus.data.readers import walk
from isthmus.data.splits import name_parts


def fill(root: Path, *names: str, kind: str | None = None) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(root / name, kind)


def ten(*folders: str, ending: str = "png") -> list[str]:
    return [f"{folder}/{i}.{ending}" for folder in folders for i in range(10)]


def whole(root: Path, split: str = "all") -> Dataset:
    return load(f"folder:{root}", split, ("image", "label?"))


@pytest.mark.parametrize("word", ["train", "val", "test", "dev"])
def test_a_class_called_like_a_part_is_a_class(word: str, tmp_path: Path) -> None:
    fill(tmp_path, *ten("bus", "car", word))
    dataset = whole(tmp_path)
    assert dataset.classes == sorted(["bus", "car", word])
    assert dataset.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert any(f"{word} is a class here" in note for note in dataset.notes)
    assert sum(len(whole(tmp_path, part)) for part in ("train", "val", "test")) == 30


def test_parts_may_stand_below_the_classes_or_one_folder_deeper(tmp_path: Path) -> None:
    fill(tmp_path / "a", *ten("cat/train", "cat/test", "dog/train", "dog/test"))
    fill(tmp_path / "b", *ten("set/train/cat", "set/train/dog", "set/Validation/cat", "set/Validation/dog"))
    assert whole(tmp_path / "a", "test").classes == whole(tmp_path / "b", "val").classes == ["cat", "dog"]
    assert len(whole(tmp_path / "a", "test")) == len(whole(tmp_path / "b", "val")) == 20
    assert whole(tmp_path / "a", "test").notes == ["Folders say the part of the data: 20 for train, 20 for test."]


@pytest.mark.parametrize("ending", ["jfif", "jpe", "pjpeg", "JFIF", "pjp"])
def test_every_ending_of_jpegs_is_read(ending: str, tmp_path: Path) -> None:
    fill(tmp_path, *ten("cat", ending=ending), kind="JPEG")
    fill(tmp_path, *ten("dog", ending="jpg"))
    assert whole(tmp_path).classes == ["cat", "dog"]
    assert len(whole(tmp_path).fetch(range(20))["image"]) == 20


def test_folders_without_a_picture_are_named(tmp_path: Path) -> None:
    fill(tmp_path, *ten("cat", "dog"))
    (tmp_path / "emu").mkdir()
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "1.heic").write_bytes(b"x")
    assert whole(tmp_path).notes == ["No picture is in emu, fox (1 other files, such as 1.heic)."]


def test_a_locked_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, *ten("cat", "dog", "emu"))
    scandir = os.scandir

    def refusing(path: str):
        if str(path).endswith("emu"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refusing)
    dataset = whole(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert "Locked folders cannot be listed: emu." in dataset.notes


@pytest.mark.parametrize("parts", [False, True])
def test_stray_pictures_beside_the_class_folders_are_left_out_and_named(parts: bool, tmp_path: Path) -> None:
    before = "train/" if parts else ""
    fill(tmp_path, *ten(f"{before}cat", f"{before}dog"), f"{before}overview.png", "logo.png")
    dataset = whole(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert len(dataset) == 20
    assert any("2 files beside the folders are left out, such as logo.png" in note for note in dataset.notes)


def test_many_loose_pictures_are_no_strays(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{i}.png" for i in range(30)), *ten("cat", "dog"))
    assert whole(tmp_path).classes is None
    assert len(whole(tmp_path)) == 50


def test_pictures_to_be_predicted_leave_the_labels_of_the_others(tmp_path: Path) -> None:
    fill(tmp_path, *ten("train/cat", "train/dog"), *(f"test/{i}.png" for i in range(90)))
    assert whole(tmp_path, "train").classes == ["cat", "dog"]
    assert sum(len(whole(tmp_path, part)) for part in ("train", "val", "test")) == 20


def test_a_data_set_one_folder_too_deep_keeps_its_classes(tmp_path: Path) -> None:
    fill(tmp_path, *ten("download/animals/cat", "download/animals/dog"), "readme.png")
    dataset = whole(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert any("download/animals, which holds all files" in note for note in dataset.notes)


def test_a_stray_picture_may_stand_in_the_folder_that_holds_all(tmp_path: Path) -> None:
    fill(tmp_path, *ten("download/cat", "download/dog"), "download/preview.png")
    assert whole(tmp_path).classes == ["cat", "dog"]
    assert any(
        "1 files beside the folders are left out, such as download/preview.png" in n for n in whole(tmp_path).notes
    )


def test_one_class_with_some_pictures_deeper_stays_one_class(tmp_path: Path) -> None:
    fill(tmp_path, *ten("cat", "cat/kittens"))
    assert whole(tmp_path).classes == ["cat"]


def test_a_link_that_repeats_a_folder_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path / "set", *ten("cat", "dog"))
    fill(tmp_path / "elsewhere", *ten("gnu"))
    links = {"a link": tmp_path / "set" / "dog", "b link": tmp_path, "bee": tmp_path / "elsewhere" / "gnu"}
    for name, target in links.items():
        (tmp_path / "set" / name).symlink_to(target)
    dataset = whole(tmp_path / "set")
    assert dataset.classes == ["bee", "cat", "dog"]
    assert len(dataset) == 30


def test_all_classes_may_be_links(tmp_path: Path) -> None:
    fill(tmp_path / "store", *ten("1", "2"))
    (tmp_path / "set").mkdir()
    for name, target in (("cat", "1"), ("dog", "2")):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / target)
    assert whole(tmp_path / "set").classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["test_tubes.parquet", "lamps.parquet"], [None, None]),
        (["crash_test.parquet"], [None]),
        (["my_train_set.tar", "validity.tar"], [None, None]),
        (["train.parquet", "extra.parquet", "test.parquet"], ["train", None, "test"]),
        (["train-00000-of-00002.parquet", "validation-00000-of-00001-0123456789abcdef.parquet"], ["train", "val"]),
        (["train_0.tar", "test.1.tar.gz"], ["train", "test"]),
        (["birds-train-0001.tar", "birds-val-0001.tar"], ["train", "val"]),
        (["birds-train-0001.tar", "trees-val-0001.tar"], [None, None]),
        (["data/train/0.parquet", "data/validation/0.parquet"], ["train", "val"]),
        (["train/0.parquet", "bus/0.parquet"], [None, None]),
        (["validation/a.parquet", "train-0.parquet"], ["val", "train"]),
    ],
)
def test_names_of_tables_say_a_part_only_as_a_whole(files: list[str], expected: list[str | None]) -> None:
    assert name_parts(files) == expected
