"""Crop selection on real pictures: published CIFAR-10 networks, an anti-aliased twin, and photographs.

    python -m benchmarks.crop_selection_real

Needs ``cifar10`` and the CIFAR ResNet weights among the data at hand (isthmus/data/readers/local.py). CIFAR's 32 pixels
leave room for views of 30 and few crops (k = 5 or 7 an axis), so that theory promises little: this says what is left.
The twin low-passes before it takes every second place (Zhang 2019, arXiv 1904.11486); both networks are trained on for
the same steps first, because the published weights never saw the blur.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from torch import Tensor, nn

from benchmarks.common import record, table
from isthmus import data
from isthmus.data import evaluation_batches
from isthmus.data.readers.local import local
from isthmus.data.transforms import CenterCrop, Compose, Resize
from isthmus.encoders.images.resnet_cifar import BasicBlock
from isthmus.encoders.trained import trained
from isthmus.robustness.crop_selection import CropSelection, same_crop_probability
from isthmus.robustness.shifts import EIGHT, FOUR, stability, view

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES, STEPS, BATCH, VIEW = 2000, 200, 100, 30


def antialiased(network: nn.Module) -> nn.Module:
    """A copy whose blocks of stride 2 filter at full resolution and blur before every second place is taken."""
    twin = copy.deepcopy(network)
    for block in twin.modules():
        if isinstance(block, BasicBlock) and block.conv1.stride == (2, 2):
            channels, before = block.conv1.out_channels, block.conv1.in_channels
            block.conv1.stride = (1, 1)
            block.conv2 = nn.Sequential(BlurPool2d(channels), block.conv2)  # type: ignore[assignment]
            block.shortcut.stride = 1
            block.shortcut = nn.Sequential(BlurPool2d(before), block.shortcut)  # type: ignore[assignment]
    return twin


def train_on(network: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """``STEPS`` steps of SGD with random crops and mirrored images."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    network.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / STEPS)
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        top, left, turn = torch.randint(5, (2,), generator=generator).tolist() + [int(step % 2)]
        batch = images[chosen, :, top : top + 28, left : left + 28]
        loss = F.cross_entropy(network(normalised(batch.flip(-1) if turn else batch)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def normalised(images: Tensor) -> Tensor:
    """uint8 or [0, 1] → what the networks read."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def centred(network: nn.Module, crop: int) -> Any:
    return lambda views: network(normalised(view(views, crop)))


def main() -> None:
    torch.set_num_threads(1)
    if local("cifar10/test.parquet") is None:
        print("no cifar10 at hand; nothing to measure")
        return
    test = data.load(f"parquet:{local('cifar10/test.parquet')}?limit={IMAGES}", "all", ("image", "label"))
    train = data.load(f"parquet:{local('cifar10/train.parquet')}?limit=20000", "all", ("image", "label"))
    whole = train.fetch(range(len(train)))
    weights = local("cifar10").parent.parent / "weights" / "cifar10-resnet20.safetensors"  # type: ignore[union-attr]
    published = trained("cifar_resnet20", weights)
    plain = train_on(copy.deepcopy(published), whole["image"], whole["label"])
    twin = train_on(antialiased(published), whole["image"], whole["label"])
    ways: dict[str, Any] = {"centre 30": centred(plain, 30), "anti-aliased, centre 30": centred(twin, 30)}
    for crop in (26, 24):
        ways[f"centre {crop}"] = centred(plain, crop)
        ways[f"selected {crop}"] = CropSelection(plain, crop, mean=MEAN, std=STD).eval()
        ways[f"anti-aliased, selected {crop}"] = CropSelection(twin, crop, mean=MEAN, std=STD).eval()
        ways[f"mean of nine shifts, {crop}"] = lambda views, crop=crop: sum(
            plain(normalised(view(views, crop, shift))).softmax(1) for shift in ((0, 0), *EIGHT)
        )
    rows = {}
    for name, predict in ways.items():
        found = stability(predict, evaluation_batches(test, 200), VIEW, FOUR)
        rows[name] = {"accuracy": found.accuracy, "flips": found.flips, "fooled_by_one_of_four": found.fooled}
    around = CropSelection(plain, 30, mean=MEAN, std=STD, cyclic=True).eval()
    for name, predict in (("cyclic shifts, centre 30", ways["centre 30"]), ("cyclic shifts, selected 30", around)):
        found = stability(predict, evaluation_batches(test, 200), VIEW, [(1, 0), (0, 3), (5, 7)], cyclic=True)
        rows[name] = {"accuracy": found.accuracy, "flips": found.flips, "fooled_by_one_of_four": found.fooled}
    print(table(rows))
    photographs = {}
    if (path := local("imagenet-sample/test.parquet")) is not None:
        sample = data.load(f"parquet:{path}", "all", ("image",))
        photographs = {f"{256 - crop + 1} positions": agreement(sample, crop) for crop in (224, 192, 128)}
        print(table(photographs))
    record("crop_selection_real", rows, photographs=photographs, images=IMAGES, steps=STEPS, view=VIEW)


def agreement(sample: Any, crop: int) -> dict[str, float]:
    """How often views of photographs, 256 pixels a side and one pixel apart, choose the same crop."""
    chooser, same, total = CropSelection(nn.Identity(), crop), 0, 0
    for batch in photographs_of(sample):
        still = chooser.select(view(batch, 256)).offset
        for shift in FOUR:
            moved = chooser.select(view(batch, 256, shift)).offset + torch.tensor(shift)
            same, total = same + int((moved == still).all(1).sum()), total + len(still)
    return {"same_crop": same / total, "theory": same_crop_probability(257 - crop, [FOUR[0]])}


def photographs_of(sample: Any) -> Iterator[Tensor]:
    transform = Compose([Resize(258), CenterCrop(258)])
    for batch in evaluation_batches(sample.select(range(0, len(sample), 4)), 25, transform=transform):
        yield batch["image"]


if __name__ == "__main__":
    main()
