"""Images a second from every source on one thread, augmentation included, against the usual loaders.

    python -m benchmarks.data_speed

The files are made here from the built-in photographs: 10,000 JPEGs of 32×32 in parquet, 256 JPEGs of 500×375 in a
folder and in tar shards. The peers read the same files with the same crops and flips: Hugging Face ``datasets`` and
torchvision's ``ImageFolder``, both with torchvision's v2 transforms (antialiased bicubic) in torch's ``DataLoader``,
without workers.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.common import compare, record, table
from isthmus import data
from isthmus.data.transforms import Compose, Flip, RandomCrop, RandomResizedCrop

SMALL, LARGE, SHAPE = 10_000, 256, (500, 375)


def jpeg(image: Image.Image) -> bytes:
    """The picture as a file of usual quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_files(root: Path) -> None:
    """The parquet file, the folder and the shards that are read below."""
    small = data.load(f"photos:32?count={SMALL}", needs=("image", "label"))
    rows = [jpeg(Image.fromarray(small[i]["image"].permute(1, 2, 0).numpy())) for i in range(SMALL)]
    columns = {
        "image": [{"bytes": row, "path": None} for row in rows],
        "label": small.fetch(range(SMALL))["label"].numpy(),
    }
    pq.write_table(pa.table(columns), root / "small.parquet")
    large = data.load(f"photos:{SHAPE[0]}?count={LARGE}", needs=("image", "label"))
    for i in range(LARGE):
        sample = large[i]
        picture = Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).resize(SHAPE)
        path = root / "folder" / (large.classes or [])[int(sample["label"])] / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture))
    for shard in range(4):
        with tarfile.open(root / f"part-{shard}.tar", "w") as tar:
            for path in sorted((root / "folder").rglob("*.jpg"))[shard::4]:
                tar.add(path, path.name)


def drain(batches: Iterator[Any], images: int, batch_size: int) -> None:
    """Read as many batches as ``images`` make."""
    for _ in itertools.islice(batches, images // batch_size):
        pass


def endless(loader: DataLoader) -> Iterator[Any]:
    """Epoch after epoch of a loader."""
    while True:
        yield from loader


def ours(source: str, images: int, batch_size: int, transform: Any = None, split: str = "all") -> Callable[[], None]:
    """A case: training batches of one of our sources, loaded beforehand."""
    dataset = data.load(source, split)
    return lambda: drain(data.batches(dataset, batch_size, seed=0, transform=transform), images, batch_size)


def main() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    cases: dict[str, Callable[[], None]] = {}
    images: dict[str, int] = {}

    def case(name: str, run: Callable[[], Any], count: int) -> None:
        cases[name], images[name] = run, count

    to_float = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    small = Compose([RandomCrop(32, padding=4), Flip()])
    small_peer = v2.Compose([v2.ToImage(), v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), to_float])
    large = Compose([RandomResizedCrop(224), Flip()])
    bicubic = v2.InterpolationMode.BICUBIC
    large_peer = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(224, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(),
            to_float,
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_files(root)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        parquet, pictures = f"parquet:{root}/small.parquet", f"folder:{root}/folder"
        case("digits:32", ours("digits:32", 12_800, 128), 12_800)
        case("photos:64", ours("photos:64", 6_400, 128), 6_400)
        case("photos:224", ours("photos:224", 256, 32), 256)
        case("scenes:64", ours("scenes:64", 1_280, 128), 1_280)
        case("random:224", ours("random:224", 512, 32), 512)
        case(
            "photos:64, resized crop and flip",
            ours("photos:64", 2_560, 128, Compose([RandomResizedCrop(64), Flip()])),
            2_560,
        )
        case("parquet 32 px, load and decode all", lambda: data.load(parquet, "all"), SMALL)
        case("parquet 32 px, crop and flip", ours(parquet, 6_400, 128, small), 6_400)
        table_ = datasets.load_dataset("parquet", data_files=str(root / "small.parquet"), split="train")
        table_ = table_.cast_column("image", datasets.Image()).with_transform(
            lambda rows: {"image": [small_peer(each.convert("RGB")) for each in rows["image"]], "label": rows["label"]}
        )
        peer = DataLoader(table_, batch_size=128, shuffle=True, drop_last=True)
        case("  the same, datasets and torchvision", lambda: drain(endless(peer), 1_280, 128), 1_280)
        case("folder 500×375, resized crop to 224", ours(pictures, LARGE, 32, large), LARGE)
        slow = DataLoader(ImageFolder(root / "folder", large_peer), batch_size=32, shuffle=True, drop_last=True)
        case("  the same, torchvision", lambda: drain(endless(slow), LARGE, 32), LARGE)
        case("shards 500×375, resized crop to 224", ours(f"shards:{root}/part-*.tar", LARGE, 32, large), LARGE)
        rows = compare(cases, rounds=5, memory=False)
    for name, row in rows.items():
        row["images/s"] = images[name] / row["seconds"]
    print(table(rows))
    print(record("data_speed", rows))


if __name__ == "__main__":
    main()
