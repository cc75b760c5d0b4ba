"""Labels without pictures, parts of a source, and the names of its classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.codec import UserError
from isthmus.data import Dataset, Memory, Repeated, class_names, load
from isthmus.data.readers import columns, files
from isthmus.data.subsets import subset


def _pictures(root: Path, size: int) -> Path:
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            noise = np.random.default_rng(number).integers(0, 255, (size, size + 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{number}.png")
    return root


def _table(root: Path, size: int) -> Path:
    import datasets

    rows = {"image": [str(path) for path in sorted(_pictures(root / "files", size).rglob("*.png"))]}
    table = datasets.Dataset.from_dict({**rows, "label": [3, 1, 2] * 6}).cast_column("image", datasets.Image())
    table.to_parquet(str(root / "data.parquet"))
    return root / "data.parquet"


@pytest.mark.parametrize(
    "source", ["digits", "scenes:16", "photos:16?count=32", "textures:16?count=32", "sounds?count=9", "random:8"]
)
def test_labels_are_those_that_come_with_the_samples(source: str) -> None:
    columns = ("image", "label") if not source.startswith("sounds") else ("audio", "label")
    dataset = load(source, "test", columns).first(20)
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == dataset.fetch(range(len(dataset)))["label"].tolist()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("view", ["whole", "subset", "repeated"])
def test_labels_are_read_without_a_picture(
    kind: str, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _pictures(tmp_path / "set", 120) if kind == "folder" else _table(tmp_path, 120)
    dataset: Dataset = load(f"{kind}:{made}", "all", ("image", "label"))
    whole = dataset.fetch(range(18))["label"]
    for module, name in ((files, "decode_image"), (columns, "as_image")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a picture was read"))
    if view == "subset":
        dataset, whole = dataset.select([17, 3, 8]), whole[[17, 3, 8]]
    elif view == "repeated":
        dataset = Repeated(dataset, 3)
    assert dataset.labels.tolist() == whole.tolist()


def test_reading_labels_alone_reads_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _pictures(tmp_path / "set", 8)
    monkeypatch.setattr(files, "decode_image", lambda *_: pytest.fail("a picture was read"))
    assert load(f"folder:{root}", "all", ("label",)).labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_what_was_not_loaded_is_said() -> None:
    with pytest.raises(ValueError, match="loaded with image, without label"):
        _ = load("digits", "test", ("image",)).labels
    with pytest.raises(UserError, match="has no labels; it has: signal, target"):
        _ = load("fields", "test", ("signal",)).labels


def test_first_and_spread_take_what_there_is() -> None:
    dataset = Memory("m", {"label": torch.arange(10) // 5})
    assert dataset.first(3).labels.tolist() == [0, 0, 0]
    assert len(dataset.first(0)) == len(dataset.first(99)) == 10
    assert dataset.spread(4).labels.tolist() == [0, 0, 1, 1]
    assert len(dataset.spread(99)) == 10
    with pytest.raises(ValueError, match="0 \\(all of them\\) or more, got -1"):
        dataset.first(-1)


def test_the_natural_size_is_that_of_the_first_readable_picture(tmp_path: Path) -> None:
    assert load("scenes:24", "test").natural_size() == (24, 24)
    root = _pictures(tmp_path / "set", 120)
    (root / "ant" / "0.png").write_bytes(b"")
    dataset = load(f"folder:{root}", "all", ("image", "label"))
    assert dataset.natural_size() == dataset.first(5).natural_size() == (120, 128)
    assert dataset.skipped == [("ant/0.png", "the file is empty")]


def test_classes_are_named_or_counted_over_all_splits() -> None:
    assert class_names(load("digits", "test", ("image", "label"))) == [str(i) for i in range(10)]
    few, many = (Memory("m", {"label": torch.tensor(labels)}) for labels in ([0, 1], [0, 3]))
    assert class_names(few, many) == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="m has no labels; a classifier needs a column label, or a folder a class"):
        class_names(Memory("m", {"signal": torch.zeros(3)}))


def test_subsets_of_seeds_do_not_overlap_and_repeat_where_a_batch_needs_more() -> None:
    source = load("digits", "train", ("image", "label"))
    slices = [subset(source, 400, seed, stride=400) for seed in range(3)]
    taken = [{int(sample["index"]) for sample in part.samples(range(400))} for part in slices]
    assert len(set.union(*taken)) == 1200
    few = subset(source, 100, 1, stride=400)
    assert {int(s["index"]) for s in few.samples(range(100))} < taken[1]
    assert len(subset(source, 0.1, 0)) == 126
    assert len(subset(source, 10, 0, at_least=25)) == 25
    for number in (0, 2000):
        with pytest.raises(UserError, match="1257 training images"):
            subset(source, number, 0)


def test_shares_of_a_source_have_their_share_of_every_class() -> None:
    source = load("digits", "train", ("image", "label"))
    labels = load("digits", "train", ("label",)).labels
    assert np.array_equal(labels, source.fetch(np.arange(len(source)))["label"].numpy())
    counts = np.bincount(labels)
    for share, seed in ((0.05, 0), (0.1, 3), (0.1, 9), (0.5, 1)):
        chosen = subset(source, share, seed, labels=labels)
        taken = chosen.fetch(np.arange(len(chosen)))
        assert len(chosen) == round(share * len(source)) == len(set(taken["index"].tolist()))
        assert np.abs(np.bincount(taken["label"].numpy(), minlength=10) - share * counts).max() <= 1.5
    few, more = (subset(source, share, 0, labels=labels) for share in (0.05, 0.1))
    assert {int(s["index"]) for s in few.samples(range(len(few)))} < {
        int(s["index"]) for s in more.samples(range(len(more)))
    }
    uneven = np.concatenate([np.full(500, 7), np.zeros(757, int)])
    for seed in range(4):
        taken = [uneven[subset(source, 0.01, seed, labels=uneven).number(i)] for i in range(13)]
        assert taken.count(7) in (5, 6), "500 of 1257 images, so 5.2 of 13"
