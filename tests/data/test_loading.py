"""A batch is a function of (seed, step): over restarts, devices and workers."""

import itertools
import os
import pickle
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus import data
from isthmus.codec import UserError
from isthmus.data import Memory, hashing
from isthmus.data.transforms import ColorJitter, Compose, Flip, Mixup, RandomCrop, RandomResizedCrop


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", needs=("image", "label"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of pictures of different sizes, one of them damaged."""
    folder = tmp_path_factory.mktemp("mixed")
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (100 + i, 130 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"")
    return data.load(f"folder:{folder}", "all")


augment = Compose([RandomCrop(8, padding=1), Flip(), ColorJitter(0.4, 0.4, 0.4)])


def test_an_epoch_visits_every_sample_once_in_a_new_order(digits):
    steps = data.steps_per_epoch(digits, 100)
    assert steps == 12
    first, second = (
        torch.cat([b["index"] for b in take(data.batches(digits, 100, seed=0, start_step=start), steps)])
        for start in (0, steps)
    )
    assert len(set(first.tolist())) == len(set(second.tolist())) == 1200
    assert not torch.equal(first, second)
    kept = take(data.batches(digits, 100, seed=0, drop_last=False), 13)
    assert len(kept[-1]["index"]) == 57
    assert sorted(torch.cat([b["index"] for b in kept]).tolist()) == list(range(1257))


def test_batches_hold_unit_floats_labels_and_numbers(digits):
    batch = next(data.batches(digits, 32, seed=0))
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
    assert torch.equal(batch["label"], digits.fetch(batch["index"])["label"])
    assert batch["index"].dtype == torch.int64


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(digits):
    whole = take(data.batches(digits, 100, seed=5, transform=augment), 20)
    for start in (1, 11, 12, 19):
        same(whole[start], next(data.batches(digits, 100, seed=5, transform=augment, start_step=start)))


def test_seeds_give_different_batches(digits):
    a, b = (next(data.batches(digits, 100, seed=seed)) for seed in (0, 1))
    assert not torch.equal(a["index"], b["index"])


def test_devices_share_the_batch_of_one_device(digits):
    transform = Compose([augment, Mixup(10)])
    whole = take(data.batches(digits, 64, seed=1, transform=transform), 3)
    for world in (2, 4):
        shares = [
            take(data.batches(digits, 64, seed=1, transform=transform, rank=r, world=world), 3) for r in range(world)
        ]
        for step in range(3):
            same(whole[step], {key: torch.cat([share[step][key] for share in shares]) for key in whole[step]})


def test_samples_of_different_sizes_share_their_batch_over_devices_too(mixed):
    transform = Compose([RandomResizedCrop(32), Flip()])
    whole = take(data.batches(mixed, 8, seed=1, transform=transform), 2)
    shares = [take(data.batches(mixed, 8, seed=1, transform=transform, rank=r, world=2), 2) for r in range(2)]
    for step in range(2):
        same(whole[step], {key: torch.cat([share[step][key] for share in shares]) for key in whole[step]})


def test_workers_change_nothing_and_report_what_they_skipped(mixed):
    transform = Compose([RandomResizedCrop(32), Flip()])
    alone = take(data.batches(mixed, 8, seed=2, transform=transform), 4)
    mixed.skipped.clear()
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork in a process with threads; torch's DataLoader forks.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        helped = take(data.batches(mixed, 8, seed=2, transform=transform, workers=2), 4)
    for a, b in zip(alone, helped, strict=True):
        same(a, b)
    assert [name for name, _ in mixed.skipped] == ["05.png"]


def test_evaluation_goes_in_order_and_keeps_the_rest(digits):
    found = list(data.evaluation_batches(digits, 500))
    assert [len(b["index"]) for b in found] == [500, 500, 257]
    assert torch.cat([b["index"] for b in found]).tolist() == list(range(1257))
    parts = [list(data.evaluation_batches(digits, 500, rank=r, world=2)) for r in range(2)]
    assert sorted(torch.cat([b["index"] for part in parts for b in part]).tolist()) == list(range(1257))


def test_evaluation_crops_pictures_of_different_sizes(mixed):
    from isthmus.data.transforms import CenterCrop, Resize

    found = list(data.evaluation_batches(mixed, 10, transform=Compose([Resize(48), CenterCrop(40)])))
    assert [tuple(b["image"].shape) for b in found] == [(9, 3, 40, 40), (10, 3, 40, 40), (4, 3, 40, 40)]
    assert 5 not in torch.cat([b["index"] for b in found]).tolist()


def test_sizes_that_differ_without_a_transform_are_an_error_that_names_the_fix(mixed):
    with pytest.raises(UserError, match=r"differ in size \(.*RandomResizedCrop"):
        next(data.batches(mixed, 8, seed=0))
    with pytest.raises(UserError, match="differ in size"):
        next(data.batches(mixed, 8, seed=0, transform=Flip()))


def test_a_batch_larger_than_the_source_is_an_error(mixed):
    with pytest.raises(UserError, match="24 samples, fewer than one batch of 32; set the batch size to 24"):
        next(data.batches(mixed, 32, seed=0))


def test_a_batch_that_devices_cannot_share_is_an_error(digits):
    with pytest.raises(ValueError, match="cannot be shared by 3"):
        next(data.batches(digits, 64, seed=0, world=3))


def test_torch_loaders_read_our_datasets(digits):
    loader = torch.utils.data.DataLoader(digits, batch_size=16)
    assert next(iter(loader))["image"].shape == (16, 3, 8, 8)


def test_hashed_permutations_are_permutations_and_never_change():
    assert sorted(hashing.permutation(1000, 3).tolist()) == list(range(1000))
    assert hashing.permutation(10, seed=0).tolist() == [3, 1, 2, 6, 7, 0, 8, 9, 4, 5]
    assert hashing.words(1, [5], 2).tolist() == hashing.words(1, [3, 5], 2)[1:].tolist()


def test_hashed_integers_fill_their_range_evenly():
    counts = np.bincount(hashing.below(hashing.words(0, np.arange(7000), 1)[:, 0], 7), minlength=7)
    assert counts.sum() == 7000
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


@pytest.mark.parametrize("source", ["digits", "photos:300?count=8", "random:8", "scenes:16?count=8"])
def test_datasets_travel_to_workers_that_start_anew(source):
    dataset = data.load(source)
    twin = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(twin[5]["image"], dataset[5]["image"])


def test_folders_travel_to_workers_that_start_anew(mixed):
    assert torch.equal(pickle.loads(pickle.dumps(mixed))[3]["image"], mixed[3]["image"])


class _Fatal(Memory):
    def read_many(self, indices):
        os.kill(os.getpid(), signal.SIGKILL)

    def fetch(self, indices, replace=True):
        return self.read_many(indices)


def test_a_process_that_dies_is_told_with_advice():
    dataset = _Fatal("fatal", {"label": torch.arange(8)})
    dataset.in_memory = False
    with pytest.raises(UserError, match=r"one of 1 processes that prepare batches died.*fewer workers or smaller"):
        next(data.batches(dataset, 4, seed=0, workers=1))


def test_an_example_is_readable_whatever_stands_first():
    dataset = Memory("m", {"label": torch.arange(8)}, bad={0: ("a.png", "is empty"), 1: ("b.png", "is empty")})
    assert data.example_batch(dataset, [0])["label"].tolist() == [2]
    assert data.example_batch(dataset, [0, 5, 1])["index"].tolist() == [2, 5, 2]
