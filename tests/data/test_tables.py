"""Parquet files and hub data sets, with columns called anything and files damaged anyhow."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from isthmus import data
from isthmus.codec import UserError
from isthmus.data.readers.decoding import decode_image
from tests.conftest import shared
from tests.data.test_files import encoded, picture


def write(path, size=(10, 12), rows=20, **columns):
    """A parquet file of ``rows`` pictures and more columns, as pyarrow writes it (no Hugging Face types)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [encoded(picture(size, seed)) for seed in range(rows)]
    pq.write_table(pa.table({"image": [{"bytes": each, "path": None} for each in pictures], **columns}), path)
    return pictures


def test_bytes_columns_of_any_usual_name_are_found(tmp_path):
    pictures = [encoded(picture((6, 5), seed)) for seed in range(20)]
    pq.write_table(
        pa.table({"id": list(range(20)), "img": pictures, "fine_label": [i % 3 for i in range(20)]}),
        tmp_path / "a.parquet",
    )
    dataset = data.load(f"parquet:{tmp_path / 'a.parquet'}", "all", needs=("image", "label", "id"))
    assert set(dataset.columns) == {"image", "label", "id"}
    assert torch.equal(dataset[7]["image"], decode_image(pictures[7]))
    assert [int(dataset[7][key]) for key in ("label", "id")] == [1, 7]


def test_a_rename_says_which_column_is_meant(tmp_path):
    write(tmp_path / "a.parquet", quality=[float(i) for i in range(20)], kind=[i % 2 for i in range(20)])
    source = f"parquet:{tmp_path / 'a.parquet'}"
    with pytest.raises(UserError, match=r"no column label.*image, quality, kind"):
        data.load(source, needs=("image", "label"))
    assert data.load(source + "?label=kind", "all", needs=("label",)).fetch(range(3))["label"].tolist() == [0, 1, 0]
    assert data.load(source, "all", needs=("label",), label="kind").fetch([1])["label"].tolist() == [1]
    with pytest.raises(UserError, match=r"no column 'kid' to take as label.*Nearest: kind"):
        data.load(source + "?label=kid", needs=("label",))
    with pytest.raises(UserError, match="no option"):
        data.load(source + "?lable=kind")


def test_words_become_numbers_in_alphabetical_order_in_every_split(tmp_path):
    write(tmp_path / "train.parquet", label=["cat", "ant"] * 10)
    write(tmp_path / "test.parquet", label=["cat", "bee"] * 10)
    test = data.load(f"parquet:{tmp_path}", "test", needs=("image", "label"))
    assert test.classes == ["ant", "bee", "cat"]
    assert test.fetch(range(2))["label"].tolist() == [2, 1]
    assert data.load(f"parquet:{tmp_path}", "train+val", needs=("image", "label")).fetch([0, 1])["label"].tolist() == [
        2,
        0,
    ]


def test_class_names_of_hugging_face_files_are_kept(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"image": picture(seed=i), "label": i % 2} for i in range(12)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    dataset = data.load(f"parquet:{tmp_path / 'a.parquet'}", "all", needs=("image", "label"))
    assert dataset.classes == ["no", "yes"]
    assert np.array_equal(dataset[3]["image"].permute(1, 2, 0).numpy(), np.asarray(picture(seed=3)))


def test_file_names_and_folders_say_the_split(tmp_path):
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation/part", "test")):
        write(tmp_path / f"{name}.parquet", rows=20 + number)
    sizes = {part: len(data.load(f"parquet:{tmp_path}", part)) for part in ("train", "val", "test", "all")}
    assert sizes == {"train": 41, "val": 22, "test": 23, "all": 86}
    assert len(data.load(f"parquet:{tmp_path}/train-*.parquet", "all")) == 41


def test_a_single_file_is_divided_by_its_rows(tmp_path):
    write(tmp_path / "test.parquet", rows=200, size=(2, 2), number=list(range(200)))
    parts = [
        data.load(f"parquet:{tmp_path / 'test.parquet'}", part, needs=("number",)).samples(range(5))
        for part in ("train", "val", "test")
    ]
    assert len({int(sample["number"]) for part in parts for sample in part}) == 15
    lengths = [len(data.load(f"parquet:{tmp_path / 'test.parquet'}", part)) for part in ("train", "val", "test")]
    assert sum(lengths) == 200
    assert all(8 <= each <= 35 for each in lengths[1:])


@pytest.mark.parametrize("size", [(10, 12), (200, 100)], ids=["kept in memory", "decoded on demand"])
def test_damaged_rows_are_replaced_and_named(tmp_path, size):
    pictures = write(tmp_path / "whole.parquet", size=size)
    cells = [{"bytes": each, "path": None} for each in pictures]
    cells[3]["bytes"] = pictures[3][:60]
    cells[4] = {"bytes": None, "path": None}
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    dataset = data.load(f"parquet:{tmp_path / 'a.parquet'}", "all")
    assert dataset.fetch([2, 3, 4, 5])["index"].tolist() == [2, 5, 5, 5]
    assert [name for name, _ in dataset.skipped] == ["row 3 of a.parquet", "row 4 of a.parquet"]
    assert "the cell is empty" in dataset.skipped[1][1]
    found = torch.cat([batch["index"] for batch in data.evaluation_batches(dataset, 8)]).tolist()
    assert found == [i for i in range(20) if i not in (3, 4)]


def test_a_row_is_named_by_its_place_in_its_file(tmp_path):
    write(tmp_path / "train-0.parquet", size=(200, 100))
    pictures = write(tmp_path / "train-1.parquet", size=(200, 100))
    pictures[6] = b""
    pq.write_table(
        pa.table({"image": [{"bytes": each, "path": None} for each in pictures]}), tmp_path / "train-1.parquet"
    )
    dataset = data.load(f"parquet:{tmp_path}", "all")
    dataset.fetch([26])
    assert dataset.skipped[0][0] == "row 6 of train-1.parquet"


def test_a_truncated_file_is_named_and_the_others_are_read(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:2000])
    dataset = data.load(f"parquet:{tmp_path}", "all")
    assert len(dataset) == 20
    assert dataset.skipped[0][0].endswith("b.parquet")
    assert "cut short" in dataset.skipped[0][1]
    with pytest.raises(UserError, match=r"b\.parquet is not a readable parquet file"):
        data.load(f"parquet:{tmp_path / 'b.parquet'}")


def test_a_wrong_path_is_answered_with_the_nearest(tmp_path):
    write(tmp_path / "flowers.parquet")
    with pytest.raises(UserError, match=r"Nearest: .*flowers\.parquet"):
        data.load(f"parquet:{tmp_path / 'flower.parquet'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no file that ends in \.parquet"):
        data.load(f"parquet:{tmp_path / 'empty'}")
    with pytest.raises(UserError, match="write parquet:"):
        data.load(str(tmp_path / "flowers.parquet"))


def test_files_whose_columns_differ_are_an_error(tmp_path):
    write(tmp_path / "a.parquet", label=[1] * 20)
    write(tmp_path / "b.parquet", caption=["x"] * 20)
    with pytest.raises(UserError, match="cannot be read"):
        data.load(f"parquet:{tmp_path}", "all")


def test_images_may_be_arrays_or_paths_beside_the_file(tmp_path):
    picture().save(tmp_path / "a.png")
    expected = decode_image(tmp_path / "a.png")
    pq.write_table(pa.table({"image": ["a.png"] * 3}), tmp_path / "paths.parquet")
    assert torch.equal(data.load(f"parquet:{tmp_path / 'paths.parquet'}", "all")[0]["image"], expected)
    pixels = expected.permute(1, 2, 0).numpy()
    pq.write_table(
        pa.table({"image": [pixels.tolist()] * 3}, pa.schema({"image": pa.list_(pa.list_(pa.list_(pa.uint8())))})),
        tmp_path / "arrays.parquet",
    )
    assert torch.equal(data.load(f"parquet:{tmp_path / 'arrays.parquet'}", "all")[0]["image"], expected)


def test_boxes_in_a_structure_and_in_another_format(tmp_path):
    objects = [{"bbox": [[1.0, 2.0, 3.0, 4.0]] * (i % 3), "category": [i % 2] * (i % 3)} for i in range(20)]
    write(tmp_path / "a.parquet", objects=objects)
    source = f"parquet:{tmp_path / 'a.parquet'}?boxes=objects.bbox&labels=objects.category&boxes_format=xywh"
    batch = data.load(source, "all", needs=("image", "boxes", "labels")).fetch([0, 1, 2])
    assert [each.shape for each in batch["boxes"]] == [(0, 4), (1, 4), (2, 4)]
    assert batch["boxes"][2].tolist() == [[1, 2, 4, 6]] * 2
    assert [each.tolist() for each in batch["labels"]] == [[], [1], [0, 0]]
    centred = data.load(source.replace("xywh", "cxcywh"), "all", needs=("boxes",))[1]["boxes"]
    assert centred.tolist() == [[-0.5, 0, 2.5, 4]]
    with pytest.raises(UserError, match="boxes_format must be"):
        data.load(source.replace("xywh", "yxyx"), needs=("boxes",))
    with pytest.raises(UserError, match="no column boxes"):
        data.load(source.split("?")[0], needs=("boxes",))


def test_masks_must_be_as_large_as_their_image(tmp_path):
    masks = [encoded(picture((10, 12), i, "L")) for i in range(19)] + [encoded(picture((9, 9), 0, "L"))]
    write(tmp_path / "a.parquet", mask=masks)
    dataset = data.load(f"parquet:{tmp_path / 'a.parquet'}", "all", needs=("image", "mask"))
    assert dataset[0]["mask"].shape == (12, 10)
    assert dataset.fetch([18, 19])["index"].tolist() == [18, 0]
    assert dataset.skipped == [("row 19 of a.parquet", "the image is 12×10 and its mask 9×9")]


def test_captions_tokens_signals_and_other_columns(tmp_path):
    write(
        tmp_path / "a.parquet",
        captions=[["first", "second"]] * 20,
        input_ids=[[1, 2, 3]] * 20,
        eeg=[[[0.5, 1.5]]] * 20,
        speaker=["eve", "adam"] * 10,
        weight=[0.25] * 20,
    )
    sample = data.load(
        f"parquet:{tmp_path / 'a.parquet'}", "all", needs=("caption", "tokens", "signal", "subject", "weight")
    )[0]
    assert sample["caption"] == "first"
    assert sample["tokens"].tolist() == [1, 2, 3]
    assert sample["signal"].dtype == torch.float32
    assert sample["signal"].tolist() == [[0.5, 1.5]]
    assert int(sample["subject"]) == 1
    assert float(sample["weight"]) == 0.25


def test_limit_reads_evenly_spaced_rows(tmp_path):
    write(tmp_path / "a.parquet", number=list(range(20)))
    dataset = data.load(f"parquet:{tmp_path / 'a.parquet'}?limit=4", "all", needs=("image", "number"))
    assert dataset.fetch(range(4))["number"].tolist() == [0, 5, 10, 15]


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    write(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows=100, label=[0, 1] * 50)
    write(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", rows=12, label=[0, 1] * 6)
    sizes = {part: len(data.load(f"hub:{tmp_path / 'set'}", part)) for part in ("train", "val", "test", "all")}
    assert sizes["val"] == 12
    assert sizes["train"] + sizes["test"] == 100
    assert 3 <= sizes["test"] <= 20
    assert sizes["all"] == 112
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        data.load(f"hub:{tmp_path / 'nothing'}")


# ------------------------------------------------------------------------------------------------------- real data


def test_cifar10():
    folder = shared("data/cifar10")
    test = data.load(f"parquet:{folder}", "test", needs=("image", "label"))
    assert len(test) == 10000
    assert test.in_memory
    assert test.image_size == (32, 32)
    assert test.classes[3] == "cat"
    assert not test.skipped
    batch = next(data.batches(test, 500, seed=0))
    assert batch["image"].shape == (500, 3, 32, 32)
    assert torch.bincount(test.fetch(range(10000))["label"]).tolist() == [1000] * 10


def test_imagenet_sample():
    from isthmus.data.transforms import CenterCrop, Compose, Resize

    dataset = data.load(f"parquet:{shared('data/imagenet-sample')}?limit=12", "all", needs=("image", "label"))
    assert not dataset.in_memory
    assert [int(sample["label"]) for sample in dataset.samples([0, 11])] == [0, 916]
    batch = next(data.evaluation_batches(dataset, 12, transform=Compose([Resize(64), CenterCrop(64)])))
    assert batch["image"].shape == (12, 3, 64, 64)


def test_camvid_keeps_images_and_masks_together():
    folder = f"parquet:{shared('data/camvid')}"
    assert [len(data.load(folder, part, needs=("mask",))) for part in ("train", "val", "test")] == [367, 101, 233]
    sample = data.load(folder, "val", needs=("image", "mask"))[0]
    assert sample["image"].shape[1:] == sample["mask"].shape == (180, 240)
    assert 0 <= int(sample["mask"].min()) <= int(sample["mask"].max()) <= 11


def test_bccd_boxes_lie_in_their_images():
    source = f"parquet:{shared('data/bccd')}"
    test = data.load(source, "test", needs=("image", "boxes", "labels"))
    assert len(test) == 72
    assert test.classes == ["RBC", "WBC", "Platelets"]
    for sample in test.samples(range(0, 72, 9)):
        height, width = sample["image"].shape[1:]
        left, top, right, bottom = sample["boxes"].unbind(1)
        assert (
            (left >= 0) & (left < right) & (right <= width) & (top >= 0) & (top < bottom) & (bottom <= height)
        ).all()
    assert len(data.load(source, "train+val", needs=("boxes",))) == 292


def test_spoken_digits_pass_through_as_bytes():
    dataset = data.load(f"parquet:{shared('data/spoken-digits')}", "test", needs=("audio", "label", "subject"))
    sample = dataset[0]
    assert sample["audio"][:4] == b"fLaC"
    assert 0 <= int(sample["label"]) <= 9
    assert len({int(each["subject"]) for each in dataset.samples(range(len(dataset)))}) == 6
