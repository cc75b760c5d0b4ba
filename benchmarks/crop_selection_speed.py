"""Selecting a crop beside scoring every crop on its own, and beside what else makes answers stable.

    python -m benchmarks.crop_selection_speed

Selecting takes a few passes over the pixels whatever the size of the crop; the peer sums every window by itself (same
integers, same choice). The rows after that put it beside the network that follows, and beside averaging the answers
of nine shifted crops, which is the usual way to stability and costs eight more forward passes. One process, one thread.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import compare, record, table
from isthmus.robustness import crop_selection
from isthmus.robustness.crop_selection import CropSelection
from isthmus.robustness.shifts import EIGHT, view

VIEW, CROP, BATCH = 256, 224, 4


def summed_one_by_one(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The same sums, every window from scratch."""
    windows = x.unfold(-2, size[0], 1).unfold(-2, size[1], 1)
    return torch.stack([row.sum((-1, -2)) for row in windows.unbind(-4)], -2)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, VIEW + 2, VIEW + 2)).to(torch.uint8)
    views = view(images, VIEW)
    network = timm.create_model("resnet50").eval()
    robust = CropSelection(network, CROP)
    chooser = CropSelection(nn.Identity(), CROP)

    ours, fast = chooser.select(views).offset, crop_selection.box_sums

    def peer() -> Tensor:
        crop_selection.box_sums = summed_one_by_one
        try:
            return chooser.select(views).offset
        finally:
            crop_selection.box_sums = fast

    assert torch.equal(ours, peer()), "both must choose the same crops"

    def averaged() -> Tensor:
        crops = [view(views, CROP, shift).float() / 255 for shift in ((0, 0), *EIGHT)]
        return sum(network(crop).softmax(1) for crop in crops)  # type: ignore[return-value]

    with torch.inference_mode():
        rows = compare({"select": lambda: chooser.select(views), "select, windows one by one": peer}, rounds=5)
        rows |= compare(
            {
                "resnet50, centre crop": lambda: network(view(views, CROP).float() / 255),
                "resnet50, selected crop": lambda: robust(views),
                "resnet50, mean of nine shifts": averaged,
            },
            rounds=3,
        )
    for row in rows.values():
        row["images_a_second"] = BATCH / row["seconds"]
    print(table(rows))
    ratios = {
        "windows_one_by_one_over_select": rows["select, windows one by one"]["seconds"] / rows["select"]["seconds"],
        "selected_over_centre": rows["resnet50, selected crop"]["seconds"] / rows["resnet50, centre crop"]["seconds"],
        "nine_shifts_over_selected": rows["resnet50, mean of nine shifts"]["seconds"]
        / rows["resnet50, selected crop"]["seconds"],
    }
    print(ratios)
    record("crop_selection_speed", rows, view=VIEW, crop=CROP, batch=BATCH, ratios=ratios)


if __name__ == "__main__":
    main()
