"""Trials: signals, latents and candidates from any source; and the linear baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.codec import Codec, UserError
from isthmus.data import Memory, load
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import decode_image
from isthmus.decoders.ridge import Ridge
from isthmus.encoders.image_embedding import ImageEmbedding
from isthmus.layers.robust_scale import RobustScale, baseline
from isthmus.metrics.retrieval import topk_accuracy

ALPHAS = tuple(10.0**power for power in range(8))
_PICTURES = 64  # embedded at once
_TRIALS = 256  # predicted at once
_TRAINED = ("signal", "subject", "latent", "positions")  # what training reads


@dataclass(frozen=True)
class Trials:
    """Windows around onsets, and what was seen.

    Attributes:
        signal: ``(N, C, T)``, baseline corrected.
        subject, stimulus: int64 ``(N,)``.
        latent: ``(N, F)``.
        positions: ``(N, C, 2)``.
        times: ``(T,)`` seconds.
        label: int64 ``(N,)``, ``low``: ``(N, L)``, ``image``: uint8 ``(N, 3, H, W)``, where the source has them.
        names: of the labels.
        geometry: of simulated sensors.
        people: names of the subjects, where the source has them.
    """

    signal: Tensor
    subject: Tensor
    stimulus: Tensor
    latent: Tensor
    positions: Tensor
    times: Tensor
    label: Tensor | None = None
    low: Tensor | None = None
    image: Tensor | None = None
    names: tuple[str, ...] | None = None
    geometry: str = ""
    people: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.signal)

    def scaled(self, scale: RobustScale) -> Trials:
        """The same with scaled signals."""
        return replace(self, signal=scale(self.signal, self.subject))

    def averaged(self) -> Trials:
        """Repeats of a stimulus by a subject averaged into one trial each."""
        pairs = torch.stack([self.subject, self.stimulus], 1)
        _, place, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        signal = torch.zeros(len(counts), *self.signal.shape[1:]).index_add_(0, place, self.signal)
        first = torch.full((len(counts),), len(self)).scatter_reduce_(0, place, torch.arange(len(self)), "amin")
        kept = {
            name: value[first]
            for name in ("subject", "stimulus", "latent", "positions", "label", "low", "image")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, signal=signal / counts[:, None, None], **kept)

    def stimuli(self) -> tuple[Tensor, Tensor]:
        """The first trial of every stimulus ``(K,)``, and which stimulus each trial shows ``(N,)``."""
        found, place = self.stimulus.unique(return_inverse=True)
        first = torch.full((len(found),), len(self)).scatter_reduce_(0, place, torch.arange(len(self)), "amin")
        return first, place

    def window(self, start: float, stop: float) -> Tensor:
        """The signal of ``start ≤ t < stop`` seconds."""
        half = 0.25 * float(self.times[1] - self.times[0])  # times are not exact in binary
        return self.signal[..., (self.times >= start - half) & (self.times < stop - half)]

    def memory(self, name: str) -> Memory:
        """A dataset of what training reads."""
        return Memory(name, {column: getattr(self, column) for column in _TRAINED})

    def loss_of(self, batch_size: int) -> Callable[[nn.Module], dict[str, float]]:
        """A function of an objective: its mean ``loss`` over these trials, in batches of about that size.

        The contrastive loss grows with the candidates, so the batches are those of training, and none is much smaller.
        """

        def loss(objective: nn.Module) -> dict[str, float]:
            device, total = next(objective.parameters()).device, 0.0
            for rows in torch.arange(len(self)).tensor_split(-(-len(self) // batch_size)):
                batch = {column: getattr(self, column)[rows].to(device) for column in _TRAINED}
                total += len(rows) * float(objective(batch, torch.Generator()).loss)
            return {"loss": total / len(self)}

        return loss


def read(
    source: str, split: str, seed: int, encoder: str = "", pretrained: bool = True, pictures: bool = True
) -> Trials:
    """Trials of a source that has signals.

    Args:
        source: ``brain``, ``meg:PATH``, or another source with the column ``signal``.
        split, seed: see :func:`isthmus.data.load`.
        encoder: vision model whose latents of the source's pictures are predicted; the source's own where empty.
        pretrained: its weights.
        pictures: read them also without an encoder.

    Raises:
        UserError: the source has neither latents nor pictures nor labels, or lacks times.
    """
    wanted = ["signal", "subject?", "latent?", "label?", "stimulus?", "positions?", "low?"]
    wanted += ["image"] if encoder else ["image?"] if pictures else []
    dataset: Any = load(source, split, wanted, seed)
    if not hasattr(dataset, "times"):
        raise UserError(f"{source} tells no times of its samples; use brain or meg:PATH.")
    if not len(dataset):
        raise UserError(f"{source} has no trial for {split}.")
    batch = dataset.fetch(range(len(dataset)))
    count, channels, length = batch["signal"].shape
    image = _pictures(source, batch["image"]) if "image" in batch else None
    if encoder:
        assert image is not None
        latent = ImageEmbedding(encoder, pretrained).embed(image.split(_PICTURES))
    elif "latent" in batch:
        latent = batch["latent"].float()
    elif "label" in batch:
        latent = F.one_hot(batch["label"], max(2, len(dataset.classes or ()), int(batch["label"].max()) + 1)).float()
        latent = latent - latent.mean(1, keepdim=True)
    else:
        raise UserError(
            f"{source} has no latent, image or label to predict; see the docstring of isthmus.data.readers.recordings."
        )
    # With labels alone, all trials of a class show one thing.
    alone = batch["label"] if "label" in batch and not encoder and "latent" not in batch else batch["index"]
    start = torch.zeros(count, dtype=torch.int64)
    before = bool((dataset.times < 0).any())
    return Trials(
        baseline(batch["signal"], dataset.times) if before else batch["signal"],
        batch.get("subject", start),
        batch.get("stimulus", alone),
        latent,
        batch.get("positions", torch.full((count, channels, 2), 0.5)),
        dataset.times[:length],
        batch.get("label"),
        batch.get("low"),
        image,
        None if dataset.classes is None else tuple(dataset.classes),
        getattr(dataset, "geometry", ""),
        getattr(dataset, "people", None),
    )


def _pictures(source: str, images: Any) -> Tensor:
    """Pictures as one tensor; paths are opened."""
    if isinstance(images, Tensor):
        return images
    opened = []
    for path in images:
        try:
            opened.append(decode_image(Path(path)))
        except (Unreadable, OSError) as error:
            raise UserError(f"{source}: its column image names {path}, which cannot be read ({error}).") from error
    if len({picture.shape for picture in opened}) > 1:
        opened = [F.interpolate(p[None].float(), (224, 224), mode="bilinear", antialias=True)[0].byte() for p in opened]
    return torch.stack(opened)


# ---------------------------------------------------------------------------------------------------------- retrieval


def retrieve(predicted: Tensor, trials: Trials, k: int = 5, more: Tensor | None = None) -> float:
    """Top-k accuracy by cosine among the latents of all stimuli of ``trials`` and of ``more`` ``(M, F)`` others."""
    first, place = trials.stimuli()
    candidates = trials.latent[first]
    if more is not None:
        candidates = torch.cat([candidates, more])
    return topk_accuracy(cosine(predicted, candidates), k, place)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """``(N, M)``."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).mT


def averaged_predictions(predicted: Tensor, trials: Trials) -> Tensor:
    """Predictions averaged over the repeats of a stimulus by a subject, in the order of :meth:`Trials.averaged`."""
    return replace(trials, signal=predicted[:, :, None]).averaged().signal[..., 0]


# ---------------------------------------------------------------------------------------------------- linear baseline


def ridges(train: Trials, targets: Tensor | None = None, span: tuple[float, float] | None = None) -> dict[int, Ridge]:
    """A ridge for each subject on the flattened window, or a part of it; penalties by leave-one-out on the training.

    Args:
        train: trials.
        targets: ``(N, M)``; the latents where left out.
        span: seconds.
    """
    signal = train.signal if span is None else train.window(*span)
    targets = train.latent if targets is None else targets
    return {
        int(who): Ridge(ALPHAS).fit(signal[train.subject == who], targets[train.subject == who])
        for who in train.subject.unique()
    }


def predict(models: dict[int, Ridge], trials: Trials, span: tuple[float, float] | None = None) -> Tensor:
    """Predictions of each trial by the ridge of its subject ``(N, M)``; of strangers by the mean of all."""
    signal = trials.signal if span is None else trials.window(*span)
    width = next(iter(models.values())).weight.shape[1]
    found = torch.zeros(len(trials), width)
    for who in trials.subject.unique().tolist():
        rows = trials.subject == who
        known: Sequence[Ridge] = [models[who]] if who in models else list(models.values())
        found[rows] = torch.stack([model(signal[rows]) for model in known]).mean(0)
    return found


@torch.no_grad()
def predict_latents(codec: Codec, scale: RobustScale | None, trials: Trials) -> tuple[Tensor, Tensor]:
    """Latents of the retrieval and the generation head for every trial: two ``(N, F)``."""
    found: list[Any] = []
    for rows in torch.arange(len(trials.signal)).split(_TRIALS):
        signal, subject = trials.signal[rows], trials.subject[rows]
        signal = signal if scale is None else scale(signal, subject)
        found.append(codec(signal, {"subject": subject, "positions": trials.positions[rows]}).prediction)
    return torch.cat([f.retrieval for f in found]), torch.cat([f.generation for f in found])
