"""Receptive fields of several networks on the same pictures: recorded in three scales, drawn, told in numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from isthmus.data import Dataset, evaluation_batches
from isthmus.data.inputs import Inputs
from isthmus.data.transforms import Compose, Normalize, Resize
from isthmus.engine import Run
from isthmus.lenses.receptive_field import THRESHOLDS, ReceptiveField, normalise, receptive_field
from isthmus.report import figures


def transform(inputs: Inputs, size: int) -> Compose:
    """Pictures of any shape to squares of ``size`` pixels a side, normalised as the network wants them."""
    return Compose([Resize((size, size)), Normalize(inputs.mean, inputs.std)])


def pictures(source: Dataset, inputs: Inputs, size: int) -> list[Tensor]:
    """All pictures of a source, ``(3, size, size)``, normalised."""
    return [batch["image"][0] for batch in evaluation_batches(source, 1, transform=transform(inputs, size))]


def sized(network: nn.Module, size: int) -> nn.Module:
    """The network for pictures of this side: transformers have positions for one, and change in place."""
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=(size, size))  # type: ignore[operator]
    return network


def measure(
    run: Run,
    networks: Mapping[str, nn.Module],
    pictures: Sequence[Tensor],
    size: int,
    published: Mapping[str, str] | None = None,
) -> dict[str, ReceptiveField]:
    """The field of every network, the mean over pictures, recorded in the three scales.

    Args:
        run: gets ``raw_area_NAME``, ``relative_area_NAME``, ``published_area_PERCENT_NAME`` and ``rms_radius_NAME``.
        networks: by name.
        pictures: ``(3, size, size)``, normalised.
        size: pixels a side.
        published: the paper's figures, by metric.
    """
    fields = {}
    for name, network in networks.items():
        if hasattr(network, "set_input_size"):
            network = sized(copy.deepcopy(network), size)
        network.to(run.fabric.device)
        fields[name] = field = receptive_field(network, [run.fabric.to_device(picture) for picture in pictures])
        run.metric(f"raw_area_{name}", float(field.area_ratio((0.5,), "raw").ratio))
        run.metric(f"relative_area_{name}", float(field.area_ratio((0.2,), "relative").ratio))
        for threshold, ratio in zip(THRESHOLDS, field.area_ratio().ratio.tolist(), strict=True):
            metric = f"published_area_{100 * threshold:.0f}_{name}"
            run.metric(metric, ratio, published=(published or {}).get(metric))
        run.metric(f"rms_radius_{name}", field.rms_radius, unit="px")
        if field.skipped:
            count = len(field.skipped)
            run.note(f"{name}: {count} images were left out of its field, their gradients being zero or infinite.")
    return fields


def draw(run: Run, fields: Mapping[str, ReceptiveField]) -> None:
    """Every map, and the share of it inside a centred square."""
    maps = {
        f"{name}, rms {field.rms_radius:.1f} px": normalise(field.map, "relative") for name, field in fields.items()
    }
    drawn = figures.maps(maps, "contribution", low=0, high=1)
    run.figure("fields", drawn, "Where the centre of the last map looks: relative scale, mean over images.")
    curves = {}
    for name, field in fields.items():
        thresholds = [i / 50 for i in range(2, 49)]
        side = field.area_ratio(thresholds, "raw").side.tolist()
        curves[name] = [(float(s), t) for s, t in zip(side, thresholds, strict=True) if s > 0] or [(0.0, 0.0)]
    drawn = figures.lines(curves, "side of the centred square, pixels", "share")
    run.figure("shares", drawn, "Share of the raw map inside a centred square as the square grows.")


def facts(field: ReceptiveField) -> dict[str, Any]:
    """The field in numbers: sides and areas of the squares that hold given shares of it, in the three scales."""
    found: dict[str, Any] = {"images": field.images, "rms_radius": field.rms_radius}
    for scale in ("raw", "relative", "published"):
        sides, ratios = field.area_ratio(scale=scale)
        rows = zip(THRESHOLDS, sides.tolist(), ratios.tolist(), strict=True)
        found[scale] = {
            f"{share:g}": {"side": side, "share_of_picture": round(ratio, 5)} for share, side, ratio in rows
        }
    return found
