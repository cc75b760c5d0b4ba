"""What a SparK run is good for afterwards: its files, reconstructions of any picture, published checkpoints.

:mod:`isthmus.recipes.spark` trains.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from isthmus.codec import UserError, write_atomically
from isthmus.data.readers.decoding import Unreadable, decode_image
from isthmus.layers.random import derive_seed
from isthmus.objectives.spark_files import load_pretrained
from isthmus.recipes._spark_measures import greyed, reconstruct


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Hide patches of each picture and predict them: original, visible part and prediction side by side, as PNG.

    Pictures keep their shape; the shorter side becomes that of the training images. Those that do not decode are
    skipped and named.
    """
    objective, size = load_pretrained(run_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    objective.to(device)
    written: list[Path] = []
    skipped: list[str] = []
    for path in inputs:
        try:
            picture = decode_image(path).float()[None] / 255
        except Unreadable as error:
            skipped.append(f"{path}: {error}")
            continue
        sides = [_fitting(side, min(picture.shape[2:]), size, objective.patch) for side in picture.shape[2:]]
        image = F.interpolate(picture, sides, mode="bicubic", antialias=True).clamp(0, 1).to(device)
        generator = torch.Generator().manual_seed(derive_seed("apply", path.name))
        visible = objective.draw_mask(image, generator).to(device)
        panels = [image, greyed(image, visible, objective.patch), reconstruct(objective, image, visible)]
        target = out / f"{path.stem}-spark.png"
        if target in written:
            target = out / f"{path.stem}-{len(written)}-spark.png"
        write_atomically(target, _png(panels))
        written.append(target)
    if skipped:
        sys.stderr.write(f"{len(skipped)} of {len(inputs)} files could not be read: {'; '.join(skipped)}\n")
    if not written:
        raise UserError(f"none of the {len(inputs)} files is a picture that can be read.")
    return written


def _fitting(side: int, shorter: int, size: int, patch: int) -> int:
    """A side scaled so that the shorter one becomes ``size``, rounded to patches, four times ``size`` at most."""
    return min(max(round(side * size / shorter / patch), size // patch), 4 * size // patch) * patch


def _png(panels: Sequence[Tensor]) -> bytes:
    gap = torch.ones(1, 3, panels[0].shape[2], 4)
    parts = [part for panel in panels for part in (panel.cpu(), gap)][:-1]
    pixels = torch.cat(parts, 3)[0].permute(1, 2, 0).mul(255).round().byte().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
