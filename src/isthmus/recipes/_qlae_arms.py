"""The arms of the comparison: one network with different bottlenecks and weight decays, trained alike."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.bottlenecks.latents import FSQ, GaussianLatents, PlainLatents
from isthmus.codec import Codec, UserError
from isthmus.data import Dataset, Memory, evaluation_batches
from isthmus.data import load as load_data
from isthmus.data.transforms import Transform
from isthmus.decoders import style_decoder
from isthmus.decoders.style_decoder import DenseDecoder, StyleDecoder
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.encoders.images import qlae as encoders
from isthmus.encoders.images.qlae import DenseEncoder, QLAEEncoder
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.metrics.infomec import InfoMEC, infomec
from isthmus.objectives.latent_quantization import Autoencoding, InfoWGAN, decay_groups

Network = Literal["dense", "image", "small"]
Arm = Literal[
    "qlae",
    "qlae_without_decay",
    "ae_with_decay",
    "ae",
    "vae",
    "tcvae",
    "fsq",
    "fsq_normalised",
    "qlae_global_table",
    "qlae_frozen_tables",
    "gan",
]
MEMORY = 2**28  # bytes of pixels that are kept in memory rather than read again in every epoch


@dataclass(frozen=True)
class Sizes:
    """The networks of all arms."""

    latents: int
    values: int
    size: int
    network: Network
    encoder: str
    beta: float


@dataclass(frozen=True)
class Measured:
    """A trained arm on the pictures that are measured.

    Attributes:
        codec: pictures to logits.
        latents: ``(n, L)``, numbers of table values where codes are discrete.
        discrete: whether they are.
        psnr: dB, of the mean squared error over all pictures.
        scores: where the causes are known.
    """

    codec: Codec
    latents: Tensor
    discrete: bool
    psnr: float
    scores: InfoMEC | None


# ---------------------------------------------------------------------------------------------------------------- data


def factor_columns(dataset: Dataset, asked: Sequence[str]) -> list[str]:
    """Columns that tell of causes: those asked for, or ``factors``, or every column of one number or word a sample.

    Raises:
        UserError: a column asked for is not there.
    """
    if missing := [name for name in asked if name not in dataset.columns]:
        raise UserError(f"{dataset.name} has no column {missing[0]!r}; it has: {', '.join(dataset.columns)}.")
    if asked:
        return list(asked)
    if "factors" in dataset.columns:
        return ["factors"]
    known = ("image", "index", "mask", "masks", "boxes", "labels", "caption", "audio", "signal", "tokens", "depth")
    return [name for name in dataset.columns if name not in known and not name.startswith("__")]


def read(
    run: Run, data: str, split: str, factors: Sequence[str], transform: Transform
) -> tuple[Dataset, list[str], list[str]]:
    """Pictures of a source, in memory where they fit, the columns that tell of causes, and names of ``factors``."""
    columns = factor_columns(load_data(data, split, ("image",), run.seed), factors)
    try:
        dataset = load_data(data, split, ("image", *columns), run.seed)
    except UserError:
        if factors:
            raise
        dataset, columns = load_data(data, split, ("image",), run.seed), []
    if not hasattr(dataset, "__len__"):
        raise UserError(f"{data} is a stream; give a source that can be read more than once.")
    names: list[str] = list(getattr(dataset, "factor_names", ()))
    if run.options.max_steps is not None:  # a smoke test need not read everything
        dataset = dataset.select(np.arange(min(len(dataset), 256)))
    first = next(evaluation_batches(dataset.select([0]), 1, transform=transform))["image"]
    if len(dataset) * first[0].numel() <= MEMORY:
        return in_memory(dataset, columns, transform), columns, names
    return dataset, columns, names


def in_memory(dataset: Dataset, columns: Sequence[str], transform: Transform) -> Memory:
    """All pictures at their final size, as bytes, and all columns of causes."""
    found: dict[str, list[Any]] = {name: [] for name in ("image", *columns)}
    for batch in evaluation_batches(dataset, 256, transform=transform):
        found["image"] += list((batch["image"] * 255).round().byte())
        for name in columns:
            found[name] += list(batch[name])
    if not found["image"]:
        raise UserError(f"{dataset.name} has no readable picture.")
    data: dict[str, Any] = {
        name: torch.stack(values) if all(isinstance(value, Tensor) for value in values) else values
        for name, values in found.items()
    }
    return Memory(dataset.name, data, dataset.columns, dataset.classes)


def causes(run: Run, batch: dict[str, Any], columns: Sequence[str], names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Causes ``(n, S)`` as numbers and their names; columns that are no categories are left out, and told."""
    found, told = [], []
    for column in columns:
        values = batch[column]
        if isinstance(values, Tensor) and values.ndim == 2:
            found += list(values.double().T)
            told += list(names) if len(names) == values.shape[1] else [f"{column}{i}" for i in range(values.shape[1])]
            continue
        try:
            numbers = torch.tensor([float(value) for value in values], dtype=torch.float64)
        except (TypeError, ValueError):
            if not all(isinstance(value, str) for value in values):
                run.note(f"The column {column} holds neither numbers nor words, and is left out.")
                continue
            known = sorted(set(values))
            numbers = torch.tensor([known.index(value) for value in values], dtype=torch.float64)
        if len(numbers.unique()) > max(50, len(numbers) // 10) or not bool(numbers.isfinite().all()):
            run.note(f"The column {column} takes too many values to be a category, and is left out.")
            continue
        found.append(numbers)
        told.append(column)
    kept = [i for i, values in enumerate(found) if len(values.unique()) > 1]
    return torch.stack([found[i] for i in kept], 1) if kept else torch.empty(0, 0), [told[i] for i in kept]


# -------------------------------------------------------------------------------------------------------------- models


def check(arm: Arm, sizes: Sizes) -> None:
    """Find out about an impossible arm before others are trained.

    Raises:
        UserError: its networks cannot be made so.
    """
    if arm == "gan" and sizes.encoder:
        raise UserError("the arm gan has a critic inside its encoder; leave --encoder out, or gan.")
    try:
        make(arm, sizes, 1)
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from error


def make(arm: Arm, sizes: Sizes, samples: int) -> Codec:
    """An arm's networks with new weights.

    Raises:
        UserError: sizes that do not fit together.
    """
    variational = arm in ("vae", "tcvae")
    width = sizes.latents * (2 if variational else 1)
    channels = None
    try:
        if sizes.encoder:
            encoder: nn.Module = Backbone(sizes.encoder, **made_for(sizes.encoder, sizes.size))
            channels = encoder.feature_info[-1].channels  # type: ignore[union-attr]
        elif sizes.network == "dense":
            encoder = DenseEncoder(width, sizes.size)
        else:
            encoder = QLAEEncoder(width, sizes.size, **(encoders.IMAGE if sizes.network == "image" else encoders.SMALL))
        if sizes.network == "dense":
            decoder: nn.Module = DenseDecoder(sizes.latents, sizes.size)
        else:
            style = style_decoder.IMAGE if sizes.network == "image" else style_decoder.SMALL
            decoder = StyleDecoder(sizes.latents, sizes.size, **style)
        bottleneck = _bottleneck(arm, sizes, channels, samples)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Codec(encoder, bottleneck, decoder)


def _bottleneck(arm: Arm, sizes: Sizes, channels: int | None, samples: int) -> nn.Module:
    if arm in ("ae", "ae_with_decay"):
        return PlainLatents(sizes.latents, channels)
    if arm in ("vae", "tcvae"):
        # The reconstruction is a mean over pixels, so KL is divided by their number: β has its usual meaning.
        scale = 3 * sizes.size**2
        return GaussianLatents(sizes.latents, sizes.beta, channels, arm == "tcvae", samples, scale)
    if arm in ("fsq", "fsq_normalised"):
        return FSQ(sizes.latents, sizes.values, channels, arm == "fsq_normalised")
    kind = {"learned": arm != "qlae_frozen_tables", "shared": arm == "qlae_global_table"}
    return LatentQuantization(sizes.latents, sizes.values, channels, **kind)


def train(
    run: Run, arm: Arm, sizes: Sizes, dataset: Dataset, training: Training, gan: Training, decay: float, transform: Any
) -> Codec:
    """Train one arm; all begin with the same numbers where their shapes are the same."""
    run.seed_everything("networks")
    codec = make(arm, sizes, len(dataset))
    batch = min((gan if arm == "gan" else training).batch_size, len(dataset))
    if arm == "gan":
        assert codec.decoder is not None
        game = InfoWGAN(codec.encoder, codec.bottleneck, codec.decoder)
        settings = replace(gan, batch_size=batch)
        groups = {t.name: decay_groups(game, gan.weight_decay, None, t.parameters) for t in game.turns}
        fit(run, arm, game, dataset, settings, transform, groups)
        return codec
    undecayed = arm in ("qlae_without_decay", "ae", "vae", "tcvae")
    settings = replace(training, batch_size=batch, weight_decay=0.0 if undecayed else decay)
    objective = Autoencoding(codec)
    fit(run, arm, objective, dataset, settings, transform, decay_groups(objective, settings.weight_decay))
    return codec


@torch.no_grad()
def measure(run: Run, codec: Codec, images: Tensor, sources: Tensor) -> Measured:
    """Latents, reconstruction and, where causes are known, InfoMEC of pictures ``(n, 3, H, W)`` in [0, 1]."""
    codec.eval()
    latents, error = [], 0.0
    for part in images.split(256):
        part = run.fabric.to_device(part)
        out = codec(part)
        found = out.code.features[-1] if out.code.indices is None else out.code.indices
        latents.append(found.flatten(1).cpu())
        error += float((out.prediction.sigmoid() - part).square().mean((1, 2, 3)).sum())
    z, discrete = torch.cat(latents), out.code.indices is not None
    psnr = float(-10 * np.log10(max(error / len(images), 1e-12)))
    scores = None
    if sources.numel():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its notes go into the report
            try:
                scores = infomec(sources, z, discrete)
            except ValueError as error:  # too few pictures, say; the codec is of use all the same
                run.note(f"There is no InfoMEC of these latents: {error}")
    return Measured(codec, z, discrete, psnr, scores)
