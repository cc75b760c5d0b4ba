"""Tables beside files: labels, masks, boxes, words and numbers of every picture, and of sounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.codec import UserError
from isthmus.data import load


def pictures(root: Path, names: list[str], turn: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), (number, 0, 0)).save(root / name, exif=exif)


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_table_of_text_gives_labels_words_and_numbers(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{i}.png" for i in range(4)])
    (tmp_path / "metadata.csv").write_text(
        'file_name,label,text,number,weight\n0.png,bee,a bee,12,0.5\n1.png,ant,"an ant, small",007,1\n'
        "3.png,bee,two bees,1984,\n"
    )
    dataset = load(f"folder:{tmp_path}", "all", ("image", "label", "caption", "number", "weight"))
    assert dataset.classes == ["ant", "bee"]
    assert dataset.labels.tolist() == [1, 0, 1]
    assert [dataset[i]["caption"] for i in range(3)] == ["a bee", "an ant, small", "two bees"]
    assert [dataset[i]["number"] for i in range(3)] == ["12", "007", "1984"], "zeros that begin a number count"
    assert float(dataset[0]["weight"]) == 0.5
    assert dataset.notes == [
        "3 files are described by metadata.csv.",
        "1 files without a row in it are left out, such as 2.png.",
    ]
    assert load(f"folder:{tmp_path}?label=number", "all", ("label",)).classes == ["007", "12", "1984"]


def test_a_column_of_numbers_says_what_is_to_be_read(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / "metadata.csv").write_text("file_name,number\na.png,1984\nb.png,7\n")
    dataset = load(f"folder:{tmp_path}", "all", ("image", "caption"))
    assert [dataset[i]["caption"] for i in range(2)] == ["1984", "7"]


def test_masks_and_boxes_of_a_table_are_turned_as_their_picture(tmp_path: Path) -> None:
    pictures(tmp_path / "train", ["a.png", "b.png"], turn=3)
    drawn = np.zeros((8, 12), dtype=np.uint8)
    drawn[0, 0] = 5
    Image.fromarray(drawn).save(tmp_path / "train" / "mask a.png")
    rows = [
        {"file_name": "a.png", "mask": "mask a.png", "boxes": [[0, 0, 2, 4]], "labels": [3]},
        {"file_name": "b.png", "mask": "mask a.png", "boxes": [], "labels": []},
    ]
    jsonl(tmp_path / "train" / "metadata.jsonl", rows)
    dataset = load(f"folder:{tmp_path}", "all", ("image", "mask", "boxes", "labels"))
    sample = dataset[0]
    assert sample["mask"][-1, -1] == 5
    assert sample["boxes"].tolist() == [[10, 4, 12, 8]]
    assert load(f"folder:{tmp_path}", "train", ("boxes",))[0]["boxes"].tolist() == [[10, 4, 12, 8]]
    assert load(f"folder:{tmp_path}", "train", ("mask",))[0]["mask"][-1, -1] == 5
    assert dataset[1]["boxes"].shape == (0, 4)
    assert len(dataset.notes) == 2


def test_boxes_in_the_form_of_the_hub(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"])
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [2]}}])
    source = f"folder:{tmp_path}?boxes=objects.bbox&labels=objects.categories&boxes_format=xywh"
    sample = load(source, "all", ("boxes", "labels"))[0]
    assert sample["boxes"].tolist() == [[1, 2, 4, 6]]
    assert sample["labels"].tolist() == [2]


def test_parts_come_from_a_column_or_from_folders(tmp_path: Path) -> None:
    names = [f"{part}/{i}.png" for part in ("train", "test") for i in range(3)]
    pictures(tmp_path / "a", names)
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\n" + "".join(f"{name},1\n" for name in names))
    pictures(tmp_path / "b", [f"{i}.png" for i in range(6)])
    jsonl(
        tmp_path / "b" / "metadata.jsonl",
        [{"file_name": f"{i}.png", "split": "train" if i < 4 else "test"} for i in range(6)],
    )
    pictures(tmp_path / "c", names)
    for part in ("train", "test"):
        jsonl(tmp_path / "c" / part / "metadata.jsonl", [{"file_name": f"{i}.png", "label": part} for i in range(3)])
    assert [len(load(f"folder:{tmp_path / each}", "test")) for each in "abc"] == [3, 2, 3]
    third = load(f"folder:{tmp_path / 'c'}", "train", ("image", "label"))
    assert third.classes == ["test", "train"]
    (tmp_path / "c" / "train" / "1.png").write_bytes(b"")
    damaged = load(f"folder:{tmp_path / 'c'}", "train+val", ("image", "label"))
    assert damaged.skipped == [("row 1 of train/metadata.jsonl", "image: the file is empty")]


def test_sounds_are_described_too(tmp_path: Path) -> None:
    from scipy.io import wavfile

    for number in range(2):
        wavfile.write(tmp_path / f"{number}.wav", 8000, np.zeros(10, dtype=np.int16))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.wav,high\n1.wav,low\n")
    dataset = load(f"folder:{tmp_path}", "all", ("audio", "label"))
    assert dataset.labels.tolist() == [0, 1]
    assert dataset[0]["audio"] == (tmp_path / "0.wav").read_bytes()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("picture,label\na.png,1\n", "has no column file_name.*it has picture, label"),
        ("", "has no rows"),
        ("file_name,label\n", "has no rows"),
    ],
)
def test_a_table_of_no_use_is_said(text: str, told: str, tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        load(f"folder:{tmp_path}")
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text("{not json\n")
    with pytest.raises(UserError, match=r"metadata.jsonl cannot be read"):
        load(f"folder:{tmp_path}")


def test_a_row_without_its_file_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,1\ngone.png,0\nb.png,1\n")
    dataset = load(f"folder:{tmp_path}", "all", ("image", "label"))
    assert dataset.fetch(range(3))["index"].tolist() == [0, 2, 2]
    assert dataset.skipped == [("row 1 of metadata.csv", "image: cannot be opened (No such file or directory)")]


def test_numbers_may_stand_in_the_names_of_files(tmp_path: Path) -> None:
    pictures(tmp_path, ["007.png", "1984_2.png", "house_12.png", "none.png"])
    dataset = load(f"folder:{tmp_path}?number=name", "all", ("image", "caption"))
    assert [dataset[i]["caption"] for i in range(3)] == ["007", "1984", "12"]
    assert dataset.skipped == [("none.png", "its name holds no number")]
    assert "caption" not in load(f"folder:{tmp_path}", "all").columns
    with pytest.raises(UserError, match="number=name takes the number"):
        load(f"folder:{tmp_path}?number=yes")
    assert torch.equal(dataset[0]["index"], torch.tensor(0))
