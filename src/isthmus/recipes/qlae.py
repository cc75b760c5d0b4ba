"""QLAE: latents on small tables of their own, and a strong weight decay, come apart (Hsu et al., arXiv 2305.18378).

The paper's claim: an autoencoder whose every latent takes one of a few learned scalars, trained with an unusually high
weight decay, gives each latent one cause to tell of, more than autoencoders without, and than VAEs; without the decay,
or with one table for all, modularity falls.

What is measured here: on 720 drawn discs of known colour, size and place, one network with and without quantisation,
with and without decay, and a β-VAE, a β-TCVAE and FSQ with the same steps. Each is scored by InfoMEC (modularity,
explicitness, compactness; ``isthmus.metrics.infomec``) and PSNR; the metric itself is tried on causes that are
permuted, where it must be 1, and rotated, where it must fall. Quantised latents pay in PSNR: there are 6^8 codes.

What comes out, over five seeds: quantised latents are more modular than an ordinary autoencoder's (InfoM 0.54, 0.45;
0.40 with decay). What decay adds to them does not show: 0.54 with it, 0.53 without, and single seeds go from +0.20 to
-0.10; three seeds alone had shown +0.08. The likely reason, not tried: at a rate of 1e-3 a decay of 0.1 shrinks a
weight by a fifth in 2,500 steps, and the paper's 200,000 give it eighty times as long. The VAEs are about as modular
(0.50 and 0.54). Plain FSQ collapses on four of five seeds: all pictures first want the same of a latent, which runs
into the flat ends of the tanh, so that its InfoM says nothing about FSQ. The arm ``fsq_normalised`` does not; at the
one seed tried (100) it came to InfoM 0.56 and 29.9 dB, QLAE to 0.49 and 30.3 dB.

Own pictures need no causes: ``--data folder:PATH --size 64 --network small`` trains, draws and keeps the codec; columns
of numbers or words in a parquet file (or those of ``--factors``) are taken for causes. ``--encoder resnet18`` puts any
timm network in front, ``--arms gan`` trains QLInfoWGAN-GP.

    from isthmus.recipes import qlae
    codec, facts = qlae.load("runs/qlae-seed0")
    codec.encode(images).indices        # (B, 3, size, size) in [0, 1] → (B, 1, L), which value every latent took

``isthmus apply`` writes the codes of pictures and draws what every latent changes in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.catalog import published
from isthmus.codec import Codec, UserError, write_atomically
from isthmus.data import evaluation_batches
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.data.transforms import CenterCrop, Compose, Resize, Transform
from isthmus.engine import Run, Training
from isthmus.metrics.infomec import infomec
from isthmus.recipes import _qlae_arms as arms
from isthmus.recipes import _qlae_pictures as pictures
from isthmus.recipes._qlae_arms import Arm, Measured, Network, Sizes
from isthmus.report import figures

needs = ("image",)
FOLDER, FACTS = "codec", "latents.json"
CLAIMED: tuple[Arm, ...] = ("qlae_without_decay", "ae_with_decay", "ae")


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about three minutes on one core."""

    data: str = "discs"
    """Pictures; any source that can be read more than once."""
    factors: tuple[str, ...] = ()
    """Columns that tell of causes; without them all columns of one number or word a picture."""
    size: int = 16
    """Pixels a side."""
    network: Network = "dense"
    """Dense layers, the published convolutions (image, for 64 pixels) or their small version."""
    encoder: str = ""
    """Any timm network as encoder, in place of ours; its deepest level is averaged."""
    latents: int = 8
    """Latents L; the paper takes twice as many as there are causes."""
    values: int = 6
    """Values V of every latent."""
    arms: tuple[Arm, ...] = ("qlae", "qlae_without_decay", "ae_with_decay", "ae", "vae", "tcvae", "fsq")
    """What is trained; the first is kept. Also: fsq_normalised, qlae_global_table, qlae_frozen_tables, gan."""
    decay: float = 0.1
    """Weight decay of arms that have one; the others have none."""
    beta: float = 4.0
    """β of the VAEs."""
    training: Training = Training(steps=2500, batch_size=128, lr=1e-3, schedule="constant")
    """Training of every autoencoder; the decay is set above, and gradients are clipped element by element to 1."""
    gan: Training = Training(
        steps=2000, batch_size=64, lr=2e-4, betas=(0.0, 0.9), weight_decay=1e-3, schedule="constant"
    )
    """Training of the GAN; one step of the generator in five."""
    measured: int = 10000
    """Pictures that are scored, at most."""
    train_split: str = "all"
    """Part of the data to train on."""
    eval_split: str = "all"
    """Part of the data to score."""

    @classmethod
    def paper(cls) -> Config:
        """Shapes3D: twelve latents of ten values, 200,000 steps; the GAN with its own settings."""
        return cls(
            data="hub:eurecom-ds/shapes3d",
            size=64,
            network="image",
            latents=12,
            values=10,
            arms=("qlae", "qlae_without_decay", "ae_with_decay", "ae", "vae", "tcvae", "qlae_global_table", "gan"),
            training=Training(steps=200_000, batch_size=128, lr=1e-3, schedule="constant", workers=8),
            gan=Training(
                steps=200_000,
                batch_size=64,
                lr=2e-4,
                betas=(0.0, 0.9),
                weight_decay=1e-3,
                schedule="constant",
                workers=8,
            ),
        )


@dataclass(frozen=True)
class Facts:
    """What a kept codec takes, and what its latents tell of."""

    size: int
    names: list[str] = field(default_factory=list)
    """For every latent, the cause that it tells most of, and how much."""
    spread: list[list[float]] = field(default_factory=list)
    """Latents of some training pictures, between whose ends continuous ones are moved."""

    def transform(self) -> Transform:
        """Pictures of any form to the middle square of ``size`` pixels."""
        return _transform(self.size)


def run(config: Config, run: Run) -> None:
    """Train all arms, score them, draw what latents do, and keep the first."""
    if not config.arms:
        raise UserError("name at least one of --arms.")
    for name in ("latents", "values", "size", "measured"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(config, name)}.")
    if config.beta < 0:
        raise UserError(f"beta must be 0 or more, got {config.beta}.")
    sizes = Sizes(config.latents, config.values, config.size, config.network, config.encoder, config.beta)
    for arm in config.arms:
        arms.check(arm, sizes)
    _try_metric(run)
    transform = _transform(config.size)
    dataset, columns, names = arms.read(run, config.data, config.train_split, config.factors, transform)
    held = dataset
    if config.eval_split != config.train_split:
        held = arms.read(run, config.data, config.eval_split, config.factors, transform)[0]
    shown = held.select(np.arange(min(len(held), config.measured)) * len(held) // min(len(held), config.measured))
    batches = list(evaluation_batches(shown, 256, transform=transform))
    images = torch.cat([batch["image"] for batch in batches])
    joined = {name: _joined([batch[name] for batch in batches]) for name in columns}
    sources, names = arms.causes(run, joined, columns, names)
    run.log(f"{config.data}: {len(dataset)} pictures to train on, {len(images)} to score, causes: {', '.join(names)}.")
    if not names:
        run.note("The data tell of no causes, so that there is no InfoMEC.")

    found: dict[str, Measured] = {}
    for arm in dict.fromkeys(config.arms):
        codec = arms.train(run, arm, sizes, dataset, config.training, config.gan, config.decay, transform)
        found[arm] = arms.measure(run, codec, images, sources)
        _record(run, arm, found[arm])
    _compare(run, found, names)
    _draw(config, run, found, images, names)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Codes of pictures, and what every latent changes in them.

    Args:
        run_dir: a finished run.
        inputs: image files; others are left out.
        out: gets ``codes.json`` (numbers and values of every latent, and the PSNR of what comes back) and
            ``NAME-latents.png``, the picture and, a row a latent, what it becomes.

    Raises:
        UserError: the run is incomplete, or no input is an image.
    """
    codec, facts = load(run_dir)
    transform, spread = facts.transform(), torch.tensor(facts.spread)
    told: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    for path in inputs:
        try:
            image = decode_image(path)
        except Unreadable as error:
            told[str(path)] = {"skipped": str(error)}
            continue
        batch = {"image": image[None].float() / 255, "index": torch.tensor([0])}
        x = transform(batch, torch.Generator())["image"]
        with torch.no_grad():
            seen = codec(x)
        error = float((seen.prediction.sigmoid() - x).square().mean())
        name = f"{path.stem}-latents.png"
        name = name if name not in drawn else f"{path.stem}-{len(drawn)}-latents.png"
        drawn[name] = pictures.draw_traversal(x[0], pictures.traversal(codec, x[0], spread), facts.names)
        told[str(path)] = {
            **({} if seen.code.indices is None else {"code": seen.code.indices.flatten().tolist()}),
            "values": [round(float(value), 5) for value in seen.code.features[-1].flatten()],
            "tells": facts.names,
            "psnr": round(float(-10 * np.log10(max(error, 1e-12))), 2),
            "picture": name,
        }
    if not drawn:
        reasons = "; ".join(f"{path}: {entry['skipped']}" for path, entry in told.items()) or "nothing given"
        raise UserError(f"none of the inputs is an image ({reasons}); known are {', '.join(IMAGE_SUFFIXES)}.")
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(out / name)
    write_atomically(out / "codes.json", (json.dumps(told, indent=1) + "\n").encode())
    return [out / "codes.json", *(out / name for name in drawn)]


def load(folder: str | Path) -> tuple[Codec, Facts]:
    """The codec that a run kept, and what is known of it.

    Raises:
        UserError: there is none.
    """
    path = Path(folder) / FOLDER
    try:
        facts = Facts(**json.loads((path / FACTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} has no {FOLDER}; run the recipe to its end first.") from error
    return Codec.from_pretrained(path), facts


# ----------------------------------------------------------------------------------------------------------- measuring


def _try_metric(run: Run, rotations: int = 10) -> None:
    """The metric on latents that are the causes themselves, permuted, and on the same ones rotated at random."""
    generator = torch.Generator().manual_seed(run.generator("metric").initial_seed() % 2**63)
    sources = torch.cartesian_prod(*[torch.arange(6)] * 4)
    exact = infomec(sources, 5 - sources[:, torch.randperm(4, generator=generator)], discrete=True)
    mixed = []
    for _ in range(rotations):
        turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        mixed.append(infomec(sources, (sources - 2.5).double() @ turn, discrete=False))
    run.metric("metric_permuted", min(exact.infom, exact.infoc))
    run.metric("metric_rotated", sum(max(each.infom, each.infoc) for each in mixed) / rotations)


def _record(run: Run, arm: str, found: Measured) -> None:
    run.metric(f"psnr_{arm}", found.psnr, unit="dB")
    if found.scores is None:
        return
    for score in ("infom", "infoe", "infoc"):
        name = f"{score}_{arm}"
        run.metric(name, getattr(found.scores, score), published=published("qlae").get(name))
    run.metric(f"active_{arm}", int(found.scores.active.sum()))
    for note in found.scores.notes:
        run.note(f"{arm}: {note}.")


def _compare(run: Run, found: Mapping[str, Measured], names: list[str]) -> None:
    scores = {arm: each.scores for arm, each in found.items() if each.scores is not None}
    if not scores:
        return
    if "qlae" in scores:
        for arm in CLAIMED:
            if arm in scores:
                run.metric(f"margin_over_{arm}", scores["qlae"].infom - scores[arm].infom)
    run.figure(
        "infom", figures.bars({a: s.infom for a, s in scores.items()}, "InfoM", " ae"), "Modularity of every arm."
    )
    run.figure(
        "information",
        pictures.draw_information(scores, names),
        "Mutual information of causes (rows) and latents (columns), over the cause's entropy; × is an inactive latent, "
        "the number InfoM.",
    )


def _draw(config: Config, run: Run, found: Mapping[str, Measured], images: Tensor, names: list[str]) -> None:
    chosen = torch.linspace(0, len(images) - 1, 10).long()
    middle = images[int(chosen[len(chosen) // 2])]
    for arm, each in found.items():
        spread = pictures.latents_of(each.codec, images[:2000]).cpu()
        told = pictures.told_by(each.scores, names, config.latents)
        changed = pictures.traversal(each.codec, middle, spread)
        caption = f"{arm.replace('_', ' ')}: a picture, and in each row what changing one latent makes of it."
        run.figure(f"traversal_{arm}", pictures.draw_traversal(middle, changed, told), caption)
        if arm != config.arms[0]:
            continue
        with torch.no_grad():
            rebuilt = each.codec(run.fabric.to_device(images[chosen])).prediction.sigmoid().cpu()
        run.figure("rebuilt", pictures.grid(torch.cat([images[chosen], rebuilt]), 10), "Pictures, and what comes back.")
        if run.is_first:
            each.codec.cpu().save_pretrained(run.dir / FOLDER)
            facts = Facts(config.size, told, [[round(x, 5) for x in row] for row in spread[:200].tolist()])
            write_atomically(run.dir / FOLDER / FACTS, (json.dumps(asdict(facts)) + "\n").encode())
        text = f"pictures to codes and back: codec, facts = isthmus.recipes.qlae.load({str(run.dir)!r})"
        run.artifact("codec", run.dir / FOLDER / Codec.WEIGHTS, text)


# -------------------------------------------------------------------------------------------------------------- helpers


def _transform(size: int) -> Transform:
    return Compose([Resize(size), CenterCrop(size)])


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [value for part in parts for value in part]
