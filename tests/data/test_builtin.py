"""The sources that need no network: same seed, same sample, on every machine; splits kept apart."""

import hashlib

import numpy as np
import pytest
import torch

from isthmus import data
from isthmus.codec import UserError
from isthmus.data.builtin import photos


def digest(dataset, numbers):
    whole = hashlib.sha256()
    for number in numbers:
        sample = dataset[number]
        whole.update(sample["image"].numpy().tobytes() + str(int(sample["label"])).encode())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("digits", "train", "736880b79bd7f3d7"),
        ("digits:32", "test", "1a7886a2c21247f9"),
        ("photos?count=128", "train", "115e726cf46a462c"),
        ("photos:96?count=128", "val", "a46f01d8c8133099"),
        ("random:16", "train", "efc1d4d86fa45d93"),
    ],
)
def test_samples_are_the_same_on_every_machine(source, split, expected):
    assert digest(data.load(source, split, needs=("image", "label")), (0, 7, 100)) == expected


def test_digits_are_dealt_out_completely_and_once():
    parts = [data.load("digits", part) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1257, 180, 360]
    together = torch.cat([part.fetch(range(len(part)))["image"][:, 0] for part in parts]).flatten(1)
    whole = data.load("digits", "all").fetch(range(1797))["image"][:, 0].flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.tolist()))
    assert set(data.load("digits", "test", needs=("label",)).fetch(range(360))["label"].tolist()) == set(range(10))


def test_the_split_of_digits_does_not_follow_the_seed():
    a, b = (data.load("digits", "test", seed=seed).fetch(range(360))["image"] for seed in (0, 1))
    assert torch.equal(a, b)


def test_photo_regions_of_different_splits_share_no_pixel():
    for name in photos.PHOTOGRAPHS:
        height, width = photos.photograph(name).shape[:2]
        painted = np.zeros((height, width), dtype=int)
        for left, top, right, bottom in photos.regions(height, width).values():
            painted[top:bottom, left:right] += 1
        assert (painted == 1).all()


def test_photo_patches_lie_inside_their_region():
    names = list(photos.PHOTOGRAPHS)
    for part in ("train", "val", "test"):
        for which, left, top, side in photos._places(names, part, 2000, seed=3).tolist():
            l, t, r, b = photos.regions(*photos.photograph(names[which]).shape[:2])[part]  # noqa: E741
            assert l <= left
            assert t <= top
            assert left + side <= r
            assert top + side <= b


def test_photos_large_enough_to_be_cut_on_demand_are_the_ones_kept_in_memory(monkeypatch):
    kept = data.load("photos:48?count=64", needs=("image", "label"))
    monkeypatch.setattr(photos, "_MEMORY", 0)
    cut = data.load("photos:48?count=64", needs=("image", "label"))
    assert kept.in_memory
    assert not cut.in_memory
    assert torch.equal(kept.fetch(range(64))["image"], cut.fetch(range(64))["image"])


def test_photos_follow_the_seed_and_balance_their_labels():
    a, b = (data.load("photos:16?count=160", seed=seed, needs=("image", "label")) for seed in (0, 1))
    assert not torch.equal(a.fetch(range(160))["image"], b.fetch(range(160))["image"])
    assert a.fetch(range(160))["label"].bincount().tolist() == [10] * 16
    assert a.classes[3] == "chelsea"
    some = data.load("photos:16?include=chelsea,coffee&count=10", needs=("image", "label"))
    assert some.classes == ["chelsea", "coffee"]
    assert some.fetch(range(10))["label"].tolist() == [0, 1] * 5


def test_random_has_every_column_in_its_form():
    dataset = data.load(
        "random:12x20?classes=5", needs=("image", "label", "mask", "boxes", "labels", "caption", "subject")
    )
    for sample in (dataset[i] for i in range(50)):
        assert sample["image"].shape == (3, 12, 20)
        assert sample["mask"].shape == (12, 20)
        assert 0 <= int(sample["mask"].min()) <= int(sample["mask"].max()) < 5
        left, top, right, bottom = sample["boxes"].unbind(1)
        assert len(sample["boxes"]) == len(sample["labels"]) >= 1
        assert ((left >= 0) & (left < right) & (right <= 20) & (top >= 0) & (top < bottom) & (bottom <= 12)).all()
    assert data.load("random:1x28x28")[0]["image"].shape == (1, 28, 28)
    assert not torch.equal(dataset[0]["image"], data.load("random:12x20", "test")[0]["image"])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("digit", "Nearest: digits"),
        ("photos:", "photos:64"),
        ("photos:64?cuont=3", "Nearest: count"),
        ("photos:abc", "whole number"),
        ("photos?include=cat", "chelsea"),
        ("photos:64?count=-1", "not negative"),
        ("random", "random:224"),
        ("random:2x2x2x2", "random:32x48"),
        ("random:0", "random:32x48"),
        ("digits:0", "at least 1"),
        ("digits?limit=0", "at least 1"),
    ],
)
def test_a_mistaken_source_is_answered_with_the_fix(source, told):
    with pytest.raises(UserError, match=told):
        data.load(source)


def test_a_missing_column_is_named_with_those_that_are_there():
    with pytest.raises(UserError, match=r"no column mask.*image, label"):
        data.load("digits", needs=("image", "mask"))
    assert "mask" not in data.load("digits", needs=("image", "mask?"))[0]


def test_an_unknown_split_is_an_error():
    with pytest.raises(UserError, match="train, val, test"):
        data.load("digits", "validation")


def test_limit_keeps_evenly_spaced_samples():
    few = data.load("digits?limit=4", "all", needs=("image", "label"))
    assert few.fetch(range(4))["index"].tolist() == [0, 449, 898, 1347]


def test_every_source_is_listed_with_a_summary():
    names = [source.name for source in data.sources()]
    assert names == [
        "digits",
        "photos",
        "scenes",
        "street-numbers",
        "discs",
        "textures",
        "planar",
        "fields",
        "brain",
        "meg",
        "sounds",
        "signals",
        "solids",
        "clips",
        "series",
        "random",
        "folder",
        "parquet",
        "hub",
        "shards",
    ]
    assert all(source.summary for source in data.sources())
