"""Parts of a source that are mixed and balanced, and the names of its classes."""

from __future__ import annotations

import numpy as np

from isthmus.codec import UserError
from isthmus.data.dataset import Dataset
from isthmus.data.hashing import permutation
from isthmus.data.loading import evaluation_batches
from isthmus.data.readers.streams import Stream
from isthmus.data.transforms import CenterCrop


def subset(
    dataset: Dataset,
    number: float,
    seed: int,
    at_least: int = 1,
    stride: int | None = None,
    labels: np.ndarray | None = None,
) -> Dataset:
    """Some samples of a shuffled source; the order does not depend on the seed, which says where in it they begin.

    Args:
        dataset: to take from.
        number: how many samples; a float up to 1 is the share of all.
        seed: seed s begins at sample s · ``stride``, so that different seeds get different samples while they last.
        at_least: samples that a batch takes; where there are fewer they are repeated.
        stride: ``number`` where it is left out.
        labels: of every sample, ``(N,)``; with them every class has its share of the samples taken.

    Raises:
        UserError: the source has not that many samples.
    """
    total = len(dataset)
    share = isinstance(number, float) and number <= 1
    count = max(1, round(number * total)) if share else round(number)
    if number <= 0 or count > total:
        raise UserError(f"{dataset.name} has {total} training images; {number:g} of them were asked for.")
    places = (np.arange(count) + seed * (stride or count)) % total
    order = permutation(total, seed=0)
    if labels is not None:
        order = order[np.argsort(_within_class(labels[order]), kind="stable")]
    return dataset.select(np.resize(order[places], max(count, at_least)))


def _within_class(labels: np.ndarray) -> np.ndarray:
    """Where every sample stands among those of its class, from 0 to 1: sorted by it, classes are evenly mixed."""
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    place = np.empty(len(labels))
    place[by_class] = (np.arange(len(labels)) - np.repeat(starts, counts) + 0.5) / np.repeat(counts, counts)
    return place


def class_names(*datasets: Dataset | Stream) -> list[str]:
    """Names of the classes, or their numbers where the source has none; every split's labels are counted in.

    Raises:
        UserError: the source has no labels.
    """
    for dataset in datasets:
        if "label" not in dataset.columns:
            raise UserError(f"{dataset.name} has no labels; a classifier needs a column label, or a folder a class.")
        if dataset.classes is not None:
            return list(dataset.classes)
    return [str(number) for number in range(max(_largest_label(dataset) for dataset in datasets) + 1)]


def _largest_label(dataset: Dataset | Stream) -> int:
    if isinstance(dataset, Dataset):
        return int(dataset.labels.max(initial=0))
    batches = evaluation_batches(dataset, 256, transform=CenterCrop(1))  # pictures may be of any size
    return max((int(batch["label"].max()) for batch in batches), default=0)
