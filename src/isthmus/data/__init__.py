"""Where batches come from: built-in, a folder, parquet, the hub, shards.

``load("digits")`` and the other built-in sources need no network; ``load("folder:PATH")`` and its kin read what you
have.
``batches`` turns a source into training batches, ``evaluation_batches`` into batches in order.
"""

from isthmus.data.dataset import COLUMNS, Dataset, Memory, Subset, collate
from isthmus.data.loading import batches, evaluation_batches, example_batch, steps_per_epoch
from isthmus.data.repeated import Repeated
from isthmus.data.sources import Source, load, sources
from isthmus.data.subsets import class_names, subset

__all__ = [
    "COLUMNS",
    "Dataset",
    "Memory",
    "Repeated",
    "Source",
    "Subset",
    "batches",
    "class_names",
    "collate",
    "evaluation_batches",
    "example_batch",
    "load",
    "sources",
    "steps_per_epoch",
    "subset",
]
