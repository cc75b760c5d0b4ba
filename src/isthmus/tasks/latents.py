"""Autoencoders of pictures whose latents are read: training data with causes, scores, traversals, a codec to keep.

::

    task = latents.open(config, run)
    measured = task.measure(codec)          # latents, PSNR and, where causes are known, InfoMEC
    task.show({"ours": measured, "plain": other})
    task.keep(measured, "pictures to codes and back")
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus import saved
from isthmus.bounds import Count
from isthmus.codec import Codec
from isthmus.data import evaluation_batches
from isthmus.data.factors import factors, load_with_factors
from isthmus.data.inputs import Inputs
from isthmus.engine import Run, Training
from isthmus.metrics.infomec import InfoMEC, infomec
from isthmus.report import latents as drawing
from isthmus.saved import Saved
from isthmus.tasks.applying import Answer, Item

NEEDS = ("image",)
#: Pictures of a source that a try-out reads.
_FEW = 256
#: Latents of training pictures that are kept, between whose ends continuous ones are moved.
_SPREAD = 200


@dataclass(frozen=True)
class LatentsConfig:
    """Settings that every recipe of latents has."""

    data: str = "discs"
    """Pictures; any source that can be read more than once."""
    factors: tuple[str, ...] = ()
    """Columns that tell of causes; without them all columns of one number or word a picture."""
    size: Count = 16
    """Pixels a side."""
    training: Training = Training(steps=2500, batch_size=128, lr=1e-3, schedule="constant")
    """Training of every autoencoder."""
    measured: Count = 10000
    """Pictures that are scored, at most."""
    train_split: str = "all"
    """Part of the data to train on."""
    eval_split: str = "all"
    """Part of the data to score."""


@dataclass(frozen=True)
class Measured:
    """A trained codec on the pictures that are measured.

    Attributes:
        codec: pictures to logits of pixels.
        psnr: dB, of the mean squared error over all pictures.
        scores: where the causes are known.
    """

    codec: Codec
    psnr: float
    scores: InfoMEC | None


def open(config: LatentsConfig, run: Run) -> LatentsTask:
    """Load the pictures of a run and find out what their causes are.

    Raises:
        UserError: a stream, a column that is not there, no readable picture.
    """
    return LatentsTask(config, run)


class LatentsTask:
    """Pictures, causes and scores of one run; made by :func:`open`.

    Attributes:
        dataset: pictures to train on.
        images: ``(n, 3, H, W)`` in [0, 1], which are scored.
        sources: their causes ``(n, S)``; empty where none are known.
        names: of the causes.
        inputs: what a codec is fed.
    """

    def __init__(self, config: LatentsConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.inputs = Inputs(size=(config.size, config.size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.dataset, columns = self._load(config.train_split)
        held = self.dataset if config.eval_split == config.train_split else self._load(config.eval_split)[0]
        count = min(len(held), config.measured)
        shown = held.select(np.arange(count) * len(held) // count)
        batches = list(evaluation_batches(shown, 256, transform=self.inputs.transform()))
        self.images = torch.cat([batch["image"] for batch in batches])
        joined = {name: _joined([batch[name] for batch in batches]) for name in columns}
        self.sources, self.names, notes = factors(joined, columns, getattr(held, "factor_names", ()))
        for note in notes:
            run.note(note)
        run.uses(self.dataset)
        run.uses(held)
        run.log(
            f"{config.data}: {len(self.dataset)} pictures to train on, {len(self.images)} to score, causes: "
            f"{', '.join(self.names)}."
        )
        if not self.names:
            run.note("The data tell of no causes, so that there is no InfoMEC.")

    def _load(self, split: str) -> Any:
        limit = None if self.run.options.max_steps is None else _FEW  # a try-out need not read everything
        config = self.config
        return load_with_factors(config.data, split, self.run.seed, config.factors, self.inputs.transform(), limit)

    @torch.no_grad()
    def measure(self, codec: Codec) -> Measured:
        """Latents, reconstruction and, where causes are known, InfoMEC of the pictures that are scored."""
        codec.to(self.run.fabric.device).eval()
        latents, error, discrete = [], 0.0, False
        for part in self.images.split(256):
            part = self.run.fabric.to_device(part)
            out = codec(part)
            discrete = out.code.indices is not None
            latents.append((out.code.indices if discrete else out.code.features[-1]).flatten(1).cpu())
            error += float((out.prediction.sigmoid() - part).square().mean((1, 2, 3)).sum())
        scores = self._scores(torch.cat(latents), discrete) if self.sources.numel() else None
        return Measured(codec, psnr(error / len(self.images)), scores)

    def _scores(self, latents: Tensor, discrete: bool) -> InfoMEC | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its notes go into the report
            try:
                return infomec(self.sources, latents, discrete)
            except ValueError as error:  # too few pictures, say; the codec is of use all the same
                self.run.note(f"There is no InfoMEC of these latents: {error}")
                return None

    def record(self, arm: str, found: Measured, published: Mapping[str, str]) -> None:
        """PSNR and scores of an arm, as ``psnr_ARM``, ``infom_ARM``, ``infoe_ARM``, ``infoc_ARM``, ``active_ARM``."""
        self.run.metric(f"psnr_{arm}", found.psnr, unit="dB")
        if found.scores is None:
            return
        for score in ("infom", "infoe", "infoc"):
            name = f"{score}_{arm}"
            self.run.metric(name, getattr(found.scores, score), published=published.get(name))
        self.run.metric(f"active_{arm}", int(found.scores.active.sum()))
        for note in found.scores.notes:
            self.run.note(f"{arm}: {note}.")

    def show(self, found: Mapping[str, Measured]) -> None:
        """What latents and causes share in every arm, what each latent changes, and what comes back of the first."""
        scores = {arm: each.scores for arm, each in found.items() if each.scores is not None}
        if scores:
            self.run.figure(
                "information",
                drawing.draw_information(scores, self.names),
                "Mutual information of causes (rows) and latents (columns), over the cause's entropy; × is an inactive "
                "latent, the number InfoM.",
            )
        chosen = self.images[torch.linspace(0, len(self.images) - 1, 10).long()]
        middle = chosen[len(chosen) // 2]
        for arm, each in found.items():
            changed = traversal(each.codec, middle, self._latents(each.codec))
            caption = f"{arm.replace('_', ' ')}: a picture, and in each row what changing one latent makes of it."
            figure = drawing.draw_traversal(middle, changed, self._labels(each))
            self.run.figure(f"traversal_{arm}", figure, caption)
        first = next(iter(found.values())).codec
        with torch.no_grad():
            rebuilt = first(self.run.fabric.to_device(chosen)).prediction.sigmoid().cpu()
        pictures = drawing.grid(torch.cat([chosen, rebuilt]), 10)
        self.run.figure("rebuilt", pictures, "Pictures, and what comes back.")

    @torch.no_grad()
    def _latents(self, codec: Codec) -> Tensor:
        """Latents ``(n, L)`` of some pictures as the decoder gets them."""
        device = next(codec.parameters()).device
        parts = self.images[:2000].split(256)
        return torch.cat([codec.encode(part.to(device)).features[-1].flatten(1) for part in parts]).cpu()

    def _labels(self, found: Measured) -> list[str]:
        return drawing.most_informative(found.scores, self.names, self._latents(found.codec).shape[1])

    def keep(self, found: Measured, text: str, name: str = "codec") -> None:
        """Save a codec with what its latents tell of: ``isthmus.load(run)``, ``isthmus apply``."""
        spread = [[round(x, 5) for x in row] for row in self._latents(found.codec)[:_SPREAD].tolist()]
        facts = {"names": self._labels(found), "spread": spread}
        folder = self.run.dir / saved.KEPT / name
        if self.run.is_first:
            saved.save(folder, found.codec.cpu(), self.inputs, facts=facts)
        self.run.artifact(name, folder, text)


def answer(kept: Saved, item: Item) -> Answer:
    """The code of a picture, what every latent changes in it, and the PSNR of what comes back."""
    codec, x = kept.model, item.input
    assert isinstance(codec, Codec)
    with torch.no_grad():
        out = codec(x)
    error = float((out.prediction.sigmoid() - x).square().mean())
    changed = traversal(codec, x[0], torch.tensor(kept.facts["spread"]))
    facts = {
        **({} if out.code.indices is None else {"code": out.code.indices.flatten().tolist()}),
        "values": [round(float(value), 5) for value in out.code.features[-1].flatten()],
        "causes": kept.facts["names"],
        "psnr": round(psnr(error), 2),
    }
    return Answer(facts, drawing.draw_traversal(x[0].cpu(), changed, kept.facts["names"]))


@torch.no_grad()
def traversal(codec: Codec, image: Tensor, spread: Tensor, steps: int = 6) -> Tensor:
    """What the decoder makes of a picture when one latent at a time is changed, ``(L, V, 3, H, W)``.

    Args:
        codec: of vectors of latents.
        image: ``(3, H, W)`` in [0, 1].
        spread: ``(n, L)`` latents as the decoder gets them, whose ends a continuous latent is moved between.
        steps: values of a continuous latent; a quantised one takes all of its table, repeated to the longest.
    """
    device = next(codec.parameters()).device
    z = codec.encode(image[None].to(device)).features[-1].flatten(1)
    low, high = spread.to(device).quantile(torch.tensor([0.02, 0.98], device=device), 0)
    bottleneck: Any = codec.bottleneck
    sizes = getattr(bottleneck, "sizes", None)
    shown = []
    for latent in range(z.shape[1]):
        if sizes is None:
            values = torch.linspace(float(low[latent]), float(high[latent]), steps, device=device)
        else:
            index = torch.zeros(sizes[latent], z.shape[1], dtype=torch.int64, device=device)
            index[:, latent] = torch.arange(sizes[latent], device=device)
            values = bottleneck.embed(index)[0][:, latent]
            values = values[torch.arange(max(sizes), device=device).clamp_max(sizes[latent] - 1)].sort().values
        changed = z.repeat(len(values), 1)
        changed[:, latent] = values
        assert codec.decoder is not None
        shown.append(codec.decoder([changed]).sigmoid())
    return torch.stack(shown).cpu()


def psnr(squared_error: float) -> float:
    """Peak signal to noise in dB of a mean squared error of values in [0, 1]."""
    return float(-10 * np.log10(max(squared_error, 1e-12)))


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [value for part in parts for value in part]
