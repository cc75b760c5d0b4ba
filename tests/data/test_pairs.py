"""Pictures with masks in one folder, in the layouts that people and known data sets have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.codec import UserError
from isthmus.data import Dataset, load


def picture(path: Path, value: int = 0, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (value, 100, 100)).save(path, **options)  # type: ignore[arg-type]


def mask(path: Path, value: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((8, 12), dtype=np.uint8)
    pixels[2:5, 3:9] = value
    Image.fromarray(pixels).save(path)


def both(root: Path, split: str = "all", options: str = "") -> Dataset:
    return load(f"folder:{root}{options}", split, ("image", "mask"))


LAYOUTS = {
    "images and masks": ("images/{}.jpg", "masks/{}.png"),
    "additions to names": ("images/{}.jpg", "masks/{}_mask.png"),
    "beginnings of names": ("images/image_{}.jpg", "labels/label_{}.png"),
    "one folder deeper": ("seg/Images/{}.jpg", "seg/Masks/{}.png"),
    "voc": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    "ade20k": ("images/training/{}.jpg", "annotations/training/{}.png"),
    "parts outside": ("train/images/{}.jpg", "train/masks/{}.png"),
    "cityscapes": ("leftImg8bit/train/ulm/{}_leftImg8bit.png", "gtFine/train/ulm/{}_gtFine_labelIds.png"),
    "camvid": ("train/{}.png", "trainannot/{}.png"),
    "camvid in colours": ("train/{}.png", "train_labels/{}_L.png"),
    "side by side": ("{}.jpg", "{}_mask.png"),
    "other folders below": ("images/train/{}.jpg", "masks/{}.png"),
    "masks of pets": ("images/{}.jpg", "annotations/trimaps/{}.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_picture_gets_its_mask(layout: str, tmp_path: Path) -> None:
    where, there = LAYOUTS[layout]
    for number in range(1, 7):
        picture(tmp_path / where.format(f"p{number}"), number * 10)
        mask(tmp_path / there.format(f"p{number}"), number)
    if layout == "cityscapes":
        for number in range(1, 7):
            mask(tmp_path / f"gtFine/train/ulm/p{number}_gtFine_instanceIds.png", 99)
            picture(tmp_path / f"gtFine/train/ulm/p{number}_gtFine_color.png")
    dataset = both(tmp_path)
    assert len(dataset) == 6
    for i in range(6):
        sample = dataset[i]
        number = round(float(sample["image"][0].float().mean()) / 10)
        assert sample["mask"].unique().tolist() == [0, number]
    assert len(load(f"folder:{tmp_path}", "all", ("image",))) == 6, "masks are no photographs"
    parts = [both(tmp_path, part) for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == 6
    assert min(map(len, parts)) >= 1


@pytest.mark.parametrize(
    ("where", "there"),
    [("images/{}/{}.jpg", "masks/{}/{}.png"), ("{}/images/{}.jpg", "{}/masks/{}.png"), ("{}/{}.png", "{}annot/{}.png")],
)
def test_parts_of_pictures_and_masks_are_used(where: str, there: str, tmp_path: Path) -> None:
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        for number in range(count):
            picture(tmp_path / where.format(part, number))
            mask(tmp_path / there.format(part, number))
    assert [len(both(tmp_path, part)) for part in ("train", "val", "test", "all")] == [5, 2, 3, 10]
    assert "Folders say the part of the data: 5 for train, 2 for val, 3 for test." in both(tmp_path).notes


def test_folders_of_other_names_can_be_named(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"left/{number}.jpg")
        mask(tmp_path / f"truth/{number}.png")
    assert len(both(tmp_path, options="?image=left&mask=truth")) == 4
    with pytest.raises(UserError, match=r"no column mask.*docs/data.md"):
        both(tmp_path)
    with pytest.raises(UserError, match="mask=gone leaves pictures or masks without a file"):
        both(tmp_path, options="?mask=gone")


def test_what_belongs_to_nothing_is_said(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / f"images/{number}.jpg")
        mask(tmp_path / f"masks/{number + 1}.png")
    dataset = both(tmp_path)
    assert len(dataset) == 5
    assert len(load(f"folder:{tmp_path}", "all", ("image",))) == 6
    assert dataset.notes == [
        "5 of 6 pictures have a mask, such as masks/1.png.",
        "1 pictures without a mask are left out, such as images/0.jpg.",
        "1 masks belong to no picture, such as masks/6.png.",
    ]


def test_class_folders_called_like_masks_are_classes(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"masks/{number}.jpg")
        picture(tmp_path / f"photos/other {number}.jpg")
        picture(tmp_path / f"hats/{number}.jpg")
    assert load(f"folder:{tmp_path}", "all", ("label",)).classes == ["hats", "masks", "photos"]


def test_masks_of_another_size_and_damaged_ones_are_named(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"images/{number}.jpg")
        mask(tmp_path / f"masks/{number}.png")
    Image.new("L", (5, 5)).save(tmp_path / "masks/1.png")
    (tmp_path / "masks/2.png").write_bytes(b"")
    dataset = both(tmp_path)
    assert dataset.fetch(range(4))["index"].tolist() == [0, 3, 3, 3]
    assert dict(dataset.skipped) == {
        "images/1.jpg": "the picture is 8×12 and its mask masks/1.png 5×5",
        "images/2.jpg": "masks/2.png: the file is empty",
    }


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_masks_follow_the_orientation_of_their_picture(turn: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    marked = np.zeros((8, 12, 3), dtype=np.uint8)
    marked[2:5, 3:9] = 200
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(marked).save(tmp_path / "images" / "a.png", exif=exif)
    mask(tmp_path / "masks" / "a.png")
    sample = both(tmp_path)[0]
    assert torch.equal(sample["mask"] == 1, sample["image"][0] > 100)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("class_dict.csv", "name,r,g,b\nsky,128,128,128\ntree,128,128,0\n"),
        ("label_colors.txt", "128 128 128\tsky\n128 128 0\ttree\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nsky:128,128,128::\ntree:128,128,0::\n"),
    ],
)
def test_coloured_masks_are_read_by_a_file_that_says_the_colours(file: str, text: str, tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"images/{number}.jpg")
        colours = np.full((8, 12, 3), 128, dtype=np.uint8)
        colours[: number + 1, :, 2] = 0
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(colours).save(tmp_path / f"masks/{number}.png")
    with pytest.raises(UserError, match=r"colours.*class_dict.csv"):
        both(tmp_path)
    (tmp_path / file).write_text(text)
    dataset = both(tmp_path)
    assert dataset.mask_classes == ["sky", "tree"]
    assert dataset[1]["mask"].sum() == 2 * 12


def test_classes_of_masks_are_named(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"images/{number}.jpg")
        mask(tmp_path / f"masks/{number}.png")
    assert both(tmp_path).mask_classes is None
    (tmp_path / "classes.txt").write_text("ground\nblob\n")
    assert both(tmp_path).select([0, 1]).mask_classes == ["ground", "blob"]
    assert load("scenes:16", "test", ("mask",)).mask_classes[0] == "ground"


def test_lossy_masks_are_said(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"images/{number}.jpg")
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.new("L", (12, 8), number).save(tmp_path / f"masks/{number}.jpg")
    assert any("JPEG or lossy WebP, which changes class numbers" in note for note in both(tmp_path).notes)
