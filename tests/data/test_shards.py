"""Streams: shared out, shuffled and resumed without holding the source."""

import io
import itertools
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch

from isthmus import data
from isthmus.codec import UserError
from isthmus.data.transforms import CenterCrop, Compose, Flip, RandomResizedCrop, Resize
from tests.data.test_files import encoded, picture
from tests.data.test_tables import write


def pack(folder, shards, each=20, prefix="train", broken=()):
    """WebDataset tars of numbered pictures of different sizes."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{prefix}-{shard:03}.tar", "w") as tar:
            for i in range(shard * each, (shard + 1) * each):
                image = b"broken" if i in broken else encoded(picture((20 + i % 7, 30), i))
                for ending, content in (("png", image), ("cls", str(i).encode()), ("txt", f"number {i}".encode())):
                    info = tarfile.TarInfo(f"{i:05}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"shards:{folder}/*.tar"


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def labels(batches):
    return torch.cat([batch["label"] for batch in batches]).tolist()


transform = Compose([RandomResizedCrop(16), Flip()])


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("shards") / "wds", 4)


def stream(pattern, **options):
    return data.load(pattern, "all", needs=("image", "label", "caption"), **{"buffer": 8, **options})


def test_an_epoch_holds_every_sample_once_and_the_next_is_in_another_order(pattern):
    found = labels(take(data.batches(stream(pattern), 10, seed=0, transform=transform), 16))
    assert sorted(found[:80]) == sorted(found[80:]) == list(range(80))
    assert found[:80] != found[80:]


def test_columns_arrive_as_those_of_other_sources(pattern):
    batch = next(data.batches(stream(pattern), 10, seed=0, transform=transform))
    assert batch["image"].shape == (10, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["caption"] == [f"number {i}" for i in batch["label"].tolist()]
    with pytest.raises(UserError, match="no column mask"):
        data.load(pattern, "all", needs=("mask",))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_it_was(pattern, workers):
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork in a process with threads; torch's DataLoader forks.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        whole = take(data.batches(stream(pattern), 6, seed=0, transform=transform, workers=workers), 30)
        for start in (1, 12, 13, 14, 29):
            resumed = next(
                data.batches(stream(pattern), 6, seed=0, transform=transform, workers=workers, start_step=start)
            )
            for key in ("image", "label", "index"):
                assert torch.equal(resumed[key], whole[start][key])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_read_different_samples_and_all_of_them(pattern, world):
    steps = 80 // world
    shares = [
        labels(take(data.batches(stream(pattern), world, seed=0, rank=r, world=world, transform=transform), steps))
        for r in range(world)
    ]
    assert sorted(itertools.chain(*shares)) == list(range(80))


def test_evaluation_reads_in_order(pattern):
    crop = Compose([Resize(16), CenterCrop(16)])
    found = list(data.evaluation_batches(stream(pattern), 32, transform=crop))
    assert labels(found) == list(range(80))
    assert len(found[-1]["label"]) == 16


def test_damaged_samples_are_replaced_within_their_window_and_named(tmp_path):
    source = pack(tmp_path / "wds", 2, broken=(3, 25))
    dataset = stream(source)
    found = labels(take(data.batches(dataset, 10, seed=0, transform=transform), 4))
    assert len(found) == 40
    assert set(range(40)) - set(found) == {3, 25}
    assert sorted(name for name, _ in dataset.skipped) == ["row 3 of train-000.tar", "row 5 of train-001.tar"]


def test_a_cut_tar_is_named_and_read_as_far_as_it_goes(tmp_path):
    source = pack(tmp_path / "wds", 2)
    whole = (tmp_path / "wds" / "train-001.tar").read_bytes()
    (tmp_path / "wds" / "train-001.tar").write_bytes(whole[: len(whole) // 2])
    dataset = stream(source)
    assert dataset.skipped == [("train-001.tar", "is cut short; samples are read up to there")]
    seen = set(labels(take(data.batches(dataset, 5, seed=0, transform=transform), 20)))
    assert set(range(25)) <= seen < set(range(40))


def test_a_foreign_file_among_the_shards_is_named(tmp_path):
    source = pack(tmp_path / "wds", 2)
    (tmp_path / "wds" / "train-000.tar").write_bytes(b"no archive at all" * 100)
    dataset = stream(source)
    assert set(labels(take(data.batches(dataset, 5, seed=0, transform=transform), 8))) == set(range(20, 40))
    assert "train-000.tar" in [name for name, _ in dataset.skipped]
    (tmp_path / "wds" / "train-001.tar").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 2 shards can be read"):
        stream(source)


def test_shard_names_say_the_split_and_ten_shards_hold_some_out(tmp_path):
    pack(tmp_path / "wds", 2)
    source = pack(tmp_path / "wds", 1, prefix="validation")
    assert [len(data.load(source, part).shards) for part in ("train", "val", "all")] == [2, 1, 3]
    with pytest.raises(UserError, match="no shards for the split 'test'"):
        data.load(source, "test")
    many = pack(tmp_path / "many", 20, each=1, prefix="part")
    held = {part: {shard.name for shard in data.load(many, part).shards} for part in ("train", "val", "test")}
    assert [len(names) for names in held.values()] == [16, 2, 2]
    assert len(set.union(*held.values())) == 20


def test_braces_name_shards(pattern):
    folder = pattern.removeprefix("shards:").removesuffix("*.tar")
    assert len(data.load(f"shards:{folder}train-{{001..003}}.tar", "all").shards) == 3
    with pytest.raises(UserError, match="there is no file"):
        data.load(f"shards:{folder}train-{{001..007}}.tar", "all")


def test_parquet_files_stream_too(tmp_path):
    for number in range(3):
        write(
            tmp_path / f"train-{number}.parquet", rows=20, size=(6, 6), label=list(range(number * 20, number * 20 + 20))
        )
    for source in (f"parquet:{tmp_path}?stream=1", f"shards:{tmp_path}/*.parquet"):
        dataset = data.load(source, "train", needs=("image", "label"), buffer=7)
        found = labels(take(data.batches(dataset, 6, seed=3), 10))
        assert sorted(found) == list(range(60))
        resumed = next(data.batches(data.load(source, needs=("image", "label"), buffer=7), 6, seed=3, start_step=9))
        assert resumed["label"].tolist() == found[54:]


def test_the_lost_rows_of_a_damaged_parquet_shard_keep_resuming_exact(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 2**62, 24).tolist()
    write(tmp_path / "train-0.parquet", rows=24, size=(6, 6), label=numbers)
    write(tmp_path / "train-1.parquet", rows=24, size=(6, 6), label=numbers)
    file = bytearray((tmp_path / "train-1.parquet").read_bytes())
    file[200:1200] = bytes(1000)
    (tmp_path / "train-1.parquet").write_bytes(file)
    source = f"shards:{tmp_path}/*.parquet"
    found = take(data.batches(data.load(source, "all", buffer=16), 8, seed=0), 15)
    for start in (3, 5, 7, 14):
        resumed = next(data.batches(data.load(source, "all", buffer=16), 8, seed=0, start_step=start))
        assert torch.equal(resumed["index"], found[start]["index"])


def test_streams_have_no_epochs_and_no_limit(pattern):
    with pytest.raises(UserError, match="set a number of steps"):
        data.steps_per_epoch(stream(pattern), 8)
    with pytest.raises(UserError, match="takes no limit"):
        data.load(pattern + "?limit=3", "all")


def test_the_first_samples_of_a_stream_can_be_looked_at(pattern):
    dataset = stream(pattern)
    assert [int(dataset[i]["label"]) for i in (3, 0, 30)] == [3, 0, 30]
    assert dataset.fetch([7, 14])["image"].shape[0] == 2
    with pytest.raises(UserError, match="has 80 readable samples"):
        dataset[80]
    with pytest.raises(UserError, match="is a stream"):
        dataset[10**6]


def test_words_for_labels_are_refused_with_a_way_out(tmp_path):
    write(tmp_path / "train-0.parquet", label=["cat", "dog"] * 10)
    with pytest.raises(UserError, match="stream=0"):
        data.load(f"parquet:{tmp_path}?stream=1", needs=("image", "label"))


def test_streams_and_tables_travel_to_workers_that_start_anew(pattern, tmp_path):
    dataset = stream(pattern)
    dataset[0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2]["image"], dataset[2]["image"])
    write(tmp_path / "a.parquet", size=(200, 200))
    table = data.load(f"parquet:{tmp_path / 'a.parquet'}", "all")
    assert torch.equal(pickle.loads(pickle.dumps(table))[2]["image"], table[2]["image"])
