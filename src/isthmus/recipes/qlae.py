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

    kept = isthmus.load("runs/qlae-seed0")
    kept.model.encode(images).indices   # (B, 3, size, size) in [0, 1] → (B, 1, L), which value every latent took
    kept.facts["names"]                 # the cause that every latent tells most of

``isthmus apply`` writes the codes of pictures and draws what every latent changes in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import nn

from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.bottlenecks.latents import FSQ, GaussianLatents, PlainLatents
from isthmus.bounds import Count, at_least
from isthmus.catalog import published
from isthmus.codec import Codec, UserError
from isthmus.decoders import style_decoder
from isthmus.decoders.style_decoder import DenseDecoder, StyleDecoder
from isthmus.encoders.backbone import Backbone, made_for
from isthmus.encoders.images import qlae as encoders
from isthmus.encoders.images.qlae import DenseEncoder, QLAEEncoder
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.metrics.infomec import infomec
from isthmus.objectives.latent_quantization import Autoencoding, InfoWGAN, decay_groups
from isthmus.report import figures
from isthmus.tasks import latents
from isthmus.tasks.latents import LatentsConfig, LatentsTask, Measured

needs = latents.NEEDS
answer = latents.answer

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
CLAIMED: tuple[Arm, ...] = ("qlae_without_decay", "ae_with_decay", "ae")


@dataclass(frozen=True)
class Config(LatentsConfig):
    """Settings of a run; the defaults take about three minutes on one core.

    ``training`` leaves the weight decay to ``decay``; gradients are clipped element by element to 1.
    """

    network: Network = "dense"
    """Dense layers, the published convolutions (image, for 64 pixels) or their small version."""
    encoder: str = ""
    """Any timm network as encoder, in place of ours; its deepest level is averaged."""
    latents: Count = 8
    """Latents L; the paper takes twice as many as there are causes."""
    values: Count = 6
    """Values V of every latent."""
    arms: tuple[Arm, ...] = ("qlae", "qlae_without_decay", "ae_with_decay", "ae", "vae", "tcvae", "fsq")
    """What is trained; the first is kept. Also: fsq_normalised, qlae_global_table, qlae_frozen_tables, gan."""
    decay: Annotated[float, at_least(0)] = 0.1
    """Weight decay of arms that have one; the others have none."""
    beta: Annotated[float, at_least(0)] = 4.0
    """β of the VAEs."""
    gan: Training = Training(
        steps=2000, batch_size=64, lr=2e-4, betas=(0.0, 0.9), weight_decay=1e-3, schedule="constant"
    )
    """Training of the GAN; one step of the generator in five."""

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


def check(config: Config) -> None:
    """Find out about an impossible arm before others are trained."""
    if not config.arms:
        raise UserError("name at least one of --arms.")
    if "gan" in config.arms and config.encoder:
        raise UserError("the arm gan has a critic inside its encoder; leave --encoder out, or gan.")
    for arm in config.arms:
        try:
            make(config, arm, 1)
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from error


def run(config: Config, run: Run) -> None:
    """Train all arms, score them, draw what latents do, and keep the first."""
    _try_metric(run)
    task = latents.open(config, run)
    found: dict[str, Measured] = {}
    for arm in dict.fromkeys(config.arms):
        found[arm] = task.measure(_train(config, run, arm, task))
        task.record(arm, found[arm], published("qlae"))
    modularity = {arm: each.scores.infom for arm, each in found.items() if each.scores is not None}
    for arm in CLAIMED:
        if {"qlae", arm} <= modularity.keys():
            run.metric(f"margin_over_{arm}", modularity["qlae"] - modularity[arm])
    if modularity:
        run.figure("infom", figures.bars(modularity, "InfoM", " ae"), "Modularity of every arm.")
    task.show(found)
    task.keep(found[config.arms[0]], "pictures to codes and back")


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


def make(config: Config, arm: Arm, samples: int) -> Codec:
    """An arm's networks with new weights.

    Raises:
        UserError: sizes that do not fit together.
    """
    variational = arm in ("vae", "tcvae")
    width = config.latents * (2 if variational else 1)
    channels = None
    try:
        if config.encoder:
            encoder: nn.Module = Backbone(config.encoder, **made_for(config.encoder, config.size))
            channels = encoder.feature_info[-1].channels  # type: ignore[union-attr]
        elif config.network == "dense":
            encoder = DenseEncoder(width, config.size)
        else:
            encoder = QLAEEncoder(
                width, config.size, **(encoders.IMAGE if config.network == "image" else encoders.SMALL)
            )
        if config.network == "dense":
            decoder: nn.Module = DenseDecoder(config.latents, config.size)
        else:
            style = style_decoder.IMAGE if config.network == "image" else style_decoder.SMALL
            decoder = StyleDecoder(config.latents, config.size, **style)
        bottleneck = _bottleneck(config, arm, channels, samples)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Codec(encoder, bottleneck, decoder)


def _bottleneck(config: Config, arm: Arm, channels: int | None, samples: int) -> nn.Module:
    if arm in ("ae", "ae_with_decay"):
        return PlainLatents(config.latents, channels)
    if arm in ("vae", "tcvae"):
        # The reconstruction is a mean over pixels, so KL is divided by their number: β has its usual meaning.
        scale = 3 * config.size**2
        return GaussianLatents(config.latents, config.beta, channels, arm == "tcvae", samples, scale)
    if arm in ("fsq", "fsq_normalised"):
        return FSQ(config.latents, config.values, channels, arm == "fsq_normalised")
    kind = {"learned": arm != "qlae_frozen_tables", "shared": arm == "qlae_global_table"}
    return LatentQuantization(config.latents, config.values, channels, **kind)


def _train(config: Config, run: Run, arm: Arm, task: LatentsTask) -> Codec:
    """Train one arm; all begin with the same numbers where their shapes are the same."""
    dataset, transform = task.dataset, task.inputs.transform()
    run.seed_everything("networks")
    codec = make(config, arm, len(dataset))
    training = config.gan if arm == "gan" else config.training
    training = replace(training, batch_size=min(training.batch_size, len(dataset)))
    if arm == "gan":
        assert codec.decoder is not None
        game = InfoWGAN(codec.encoder, codec.bottleneck, codec.decoder)
        groups = {turn.name: decay_groups(game, training.weight_decay, None, turn.parameters) for turn in game.turns}
        result = fit(run, arm, game, dataset, training, transform, groups)
        return codec if result.ema is None else _averaged(result.ema)
    undecayed = arm in ("qlae_without_decay", "ae", "vae", "tcvae")
    training = replace(training, weight_decay=0.0 if undecayed else config.decay)
    objective = Autoencoding(codec)
    result = fit(run, arm, objective, dataset, training, transform, decay_groups(objective, training.weight_decay))
    return codec if result.ema is None else _averaged(result.ema)


def _averaged(objective: Any) -> Codec:
    """The codec with the moving average of its weights."""
    if hasattr(objective, "codec"):
        return objective.codec
    return Codec(objective.encoder, objective.bottleneck, objective.decoder)
