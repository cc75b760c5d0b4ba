"""Rotation prediction beside the published algorithm: preparing a batch, and a whole training step.

    python -m benchmarks.rotnet_speed

The peer does what the published code does: every image is turned in NumPy by flips and transposes, each of the four
copies is turned into a normalised float tensor of its own, copies are stacked image by image, images stacked into a
batch. Ours normalises the batch once and turns it as a tensor. Both give the same numbers, which is checked, and
train the same network with the same weights. One process, one thread; published training hides part of the
preparation behind the GPU in worker processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the networks
from benchmarks.common import compare, record, table
from isthmus.data.loading import as_floats
from isthmus.data.transforms import Normalize
from isthmus.objectives.rotation import Rotation, rotate_all

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SETTINGS = (("nin_cifar", 32, 32), ("nin_cifar_tiny", 32, 32), ("resnet18", 112, 8))
PREPARING = ((128, 32), (192, 224))


def published_batch(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """``(B, H, W, C)`` uint8 to the four-fold batch and its labels, image by image."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    batch = []
    for image in images:
        turned = (
            image,
            np.flipud(np.transpose(image, (1, 0, 2))),
            np.fliplr(np.flipud(image)),
            np.transpose(np.flipud(image), (1, 0, 2)),
        )
        copies = []
        for copy in turned:
            tensor = torch.from_numpy(np.ascontiguousarray(copy.transpose(2, 0, 1))).float().div(255)
            copies.append(tensor.sub_(mean).div_(std))
        batch.append(torch.stack(copies))
    return torch.stack(batch).flatten(0, 1), torch.arange(4).repeat(len(images))


def our_batch(images: Tensor) -> Tensor:
    """``(B, C, H, W)`` uint8 to the same."""
    return rotate_all(normalised(images))


def normalised(images: Tensor) -> Tensor:
    """What batches look like when the objective gets them."""
    return Normalize(MEAN, STD)(as_floats({"image": images}), torch.Generator())["image"]


def step(loss: Callable[[], Tensor], network: nn.Module) -> Callable[[], None]:
    """One SGD step as published."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def steps(name: str, images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The published training step and ours, with the same weights; their first losses must agree."""
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    torch.manual_seed(0)
    theirs, ours = (timm.create_model(name, num_classes=4) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    objective = Rotation(ours, nn.Identity())

    def their_loss() -> Tensor:
        copies, target = published_batch(images)
        return F.cross_entropy(theirs(copies), target)

    def our_loss() -> Tensor:
        return objective({"image": normalised(tensor)}, torch.Generator()).loss

    torch.testing.assert_close(their_loss(), our_loss(), rtol=1e-4, atol=1e-5)
    return {"published": step(their_loss, theirs), "isthmus": step(our_loss, ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for batch, size in PREPARING:
        images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        torch.testing.assert_close(our_batch(tensor), published_batch(images)[0], rtol=1e-5, atol=1e-6)
        cases = {"published": lambda i=images: published_batch(i), "isthmus": lambda t=tensor: our_batch(t)}
        rows.append(told(f"prepare a batch of {batch} at {size} px", batch, compare(cases, rounds=rounds)))
    for name, size, batch in SETTINGS:
        images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        timed = compare(steps(name, images), rounds=rounds)
        rows.append(told(f"training step of {name}, batch {batch} at {size} px", batch, timed))
    print(record("rotnet_speed", rows, unit="images are counted before rotation"))


def told(work: str, batch: int, timed: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print a comparison and return it as a row."""
    for row in timed.values():
        row["images_per_second"] = batch / row["seconds"]
    factor = timed["published"]["seconds"] / timed["isthmus"]["seconds"]
    print(f"{work}: {factor:.2f} times as fast\n{table(timed)}\n")
    return {"work": work, "times_as_fast": factor, **timed}


if __name__ == "__main__":
    main()
