"""What a SparK run is good for afterwards: its files, reconstructions of any picture, published checkpoints.

:mod:`isthmus.recipes.spark` trains.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from isthmus.codec import UserError, build, create_timm, load_weights, save_weights, spec_of, write_atomically
from isthmus.codec.timm_models import headless
from isthmus.data.readers.decoding import Unreadable, decode_image
from isthmus.decoders.spark_unet import SparKUNet
from isthmus.encoders.backbone import Backbone
from isthmus.layers.random import derive_seed
from isthmus.objectives import spark_files
from isthmus.objectives.spark import SparK
from isthmus.recipes._spark_measures import greyed, reconstruct


def write(weights: Path, objective: SparK, size: int) -> None:
    """Weights, and a JSON beside them from which ``load_pretrained`` rebuilds the modules."""
    save_weights(objective, weights)
    description = {"format": "isthmus-spark", "version": 1, "size": size, "objective": spec_of(objective)}
    write_atomically(weights.with_suffix(".json"), json.dumps(description, indent=1).encode())


def load_pretrained(folder: Path) -> tuple[SparK, int]:
    """The objective that a run (or ``convert``) left, and the image size it was trained at.

    Raises:
        UserError: the folder holds no SparK run, or a file of it is damaged.
    """
    try:
        description = json.loads((folder / "spark.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable spark.json; give the folder of a finished spark run.") from error
    if description.get("format") != "isthmus-spark":
        raise UserError(f"{folder / 'spark.json'} is not of a spark run.")
    objective = build(description["objective"])
    load_weights(objective, folder / "spark.safetensors")
    return objective.eval(), int(description["size"])


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


# ------------------------------------------------------------------------------------------- published checkpoints


def convert(path: Path, out: Path, encoder: str = "") -> Path:
    """A published checkpoint to safetensors, or ours back to the published form.

    ``*_1kpretrained_timm_style.pth`` and ``*_official_style.pth`` become a file that
    timm loads under any number of classes. ``*_withdecoder_*_spark_style.pth``
    becomes the weights of :class:`isthmus.objectives.spark.SparK`, with a JSON of its making beside it. A
    ``.safetensors`` file of ours becomes the published form; give ``--out FILE.pth``.

    Args:
        path: the checkpoint.
        out: the file to write.
        encoder: its timm name, where the shapes do not tell (they do for the published ones).
    """
    if path.suffix == ".safetensors":
        return spark_files.write_published(path, out)
    state, made = spark_files.read_published(path)
    backbone = spark_files.backbone_of(state)
    model = create_timm(encoder or spark_files.guess_encoder(backbone, path))
    spark_files.load_backbone(model, backbone, path)
    if backbone is state:
        save_weights(headless(model), out)
        return out
    scales = sum("mask_tokens" in name for name in state)
    pyramid = Backbone(model, reductions=[32 >> k for k in reversed(range(scales))])
    norm = "batch" if "decoder.densify.norms.0.running_mean" in state else "layer"
    width = state["decoder.blocks.0.up_sample.weight"].shape[0]
    objective = SparK(pyramid, SparKUNet(pyramid.feature_info, width, norm), float(made.get("mask_ratio", 0.6)))
    decoder = {n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")}
    try:
        objective.decoder.load_state_dict(decoder)
    except RuntimeError as error:
        raise UserError(f"{path} has another decoder than the published one: {str(error).splitlines()[-1]}") from error
    write(out, objective, int(made.get("sparse_encoder.input_size", 224)))
    return out
