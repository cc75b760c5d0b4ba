"""From pictures to tokens to new pictures: a tokenizer, a prior of its tokens, and what stands between them.

Recipes that sample images train both here and then try their sampler on :class:`ImageTokens`. The vocabulary of the
prior is the tokenizer's codes, then one token for every class, then one for no class; a sequence is the class and the
codes of the picture, line by line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import saved
from isthmus.bottlenecks.vq import VQ
from isthmus.codec import Codec, Loss, UserError
from isthmus.data import Dataset, Memory, evaluation_batches
from isthmus.data.inputs import Inputs
from isthmus.data.subsets import class_names
from isthmus.data.transforms import CenterCrop, Compose, Resize, Transform
from isthmus.decoders.conv_tokenizer import ConvDetokenizer
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.tokenizers.conv_tokenizer import ConvTokenizer
from isthmus.engine import Run, Training
from isthmus.engine.fit import FitResult, fit
from isthmus.layers.random import rows
from isthmus.priors.tiny_lm import tiny_llama
from isthmus.samplers.feed import Guidance
from isthmus.samplers.raster import Raster
from isthmus.samplers.transformers_models import CausalModel

_PIXELS = 256 * 16 * 16  # of pictures that go through a tokenizer at once


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: convolutional encoder, code book, convolutional decoder."""

    size: int = 16
    """Pixels a side."""
    reduction: int = 2
    """Pixels a side of a token; a power of two."""
    codes: int = 128
    """Codes in the book."""
    dim: int = 8
    """Numbers in a code."""
    width: int = 16
    """Channels of the first convolution."""
    encoder: str = ""
    """Any timm convnet as encoder, in place of ours; its level of that reduction is quantised."""


@dataclass(frozen=True)
class PriorConfig:
    """The prior: a Llama over the tokens."""

    layers: int = 4
    """Blocks."""
    width: int = 128
    """Width of the tokens."""
    drop: float = 0.1
    """Share of training pictures whose class is hidden, so that guidance has something to subtract."""


class Tokenizing(nn.Module):
    """Objective: the picture back from its tokens, mean squared error and the bottleneck's own loss."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """``image`` ``(B, C, H, W)`` in [0, 1] to the loss."""
        out = self.codec(batch["image"])
        error = F.mse_loss(out.prediction.float(), batch["image"])
        return Loss(error + out.code.loss, {"error": error.detach()}, {"codes": out.code.indices})


class NextToken(nn.Module):
    """Objective: cross entropy of every token of a picture given its class and the tokens before.

    Args:
        model: a causal language model of transformers.
        codes: number of codes; the class tokens follow them.
        classes: number of classes.
        drop: share of rows whose class is hidden.
    """

    def __init__(self, model: nn.Module, codes: int, classes: int, drop: float = 0.0) -> None:
        super().__init__()
        self.model, self.codes, self.none, self.drop = model, codes, codes + classes, drop

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator, turn: str | None = None) -> Loss:
        """``tokens`` ``(B, T)`` and, where there are classes, ``label`` ``(B,)`` to nats a token."""
        tokens = batch["tokens"]
        first = torch.full_like(tokens[:, 0], self.none)
        if "label" in batch:
            hidden = rows(lambda n: torch.rand(n, generator=generator), len(tokens), generator) < self.drop
            first = torch.where(hidden.to(first.device), first, self.codes + batch["label"])
        fed = torch.cat([first[:, None], tokens[:, :-1]], 1)
        logits = self.model(input_ids=fed, use_cache=False).logits
        return Loss(F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()))


class ImageTokens:
    """A trained tokenizer and its prior.

    Attributes:
        codec, prior: the two networks.
        classes: names of the classes; empty without labels.
        side: tokens of a line.
        raster: the grammar of a picture, for samplers.
        model: the prior as a LogitModel.
    """

    def __init__(self, codec: Codec, prior: Any, classes: Sequence[str], size: int, reduction: int) -> None:
        self.codec, self.prior = codec.eval(), prior.eval()
        self.classes, self.size, self.reduction = list(classes), size, reduction
        self.codes: int = codec.bottleneck.num_codes  # type: ignore[assignment]
        self.side = size // reduction
        self.raster = Raster(self.side, self.side, tokens=range(self.codes))
        self.model = CausalModel(prior)

    @property
    def length(self) -> int:
        """Tokens of a picture."""
        return self.side**2

    @property
    def device(self) -> torch.device:
        """Where the prior is."""
        return next(self.prior.parameters()).device

    def prompt(self, labels: Tensor | int) -> Tensor:
        """``(B, 1)``: the class tokens of labels ``(B,)``, or so many pictures, of all classes in turn."""
        if isinstance(labels, int):
            labels = torch.arange(labels) % max(1, len(self.classes))
        return (self.codes + labels)[:, None].to(self.device)

    def guidance(self, scale: float) -> Guidance | None:
        """Away from pictures of no class; none where there are no classes or the scale is 1."""
        if scale == 1 or not self.classes:
            return None
        return Guidance(scale, torch.tensor([[self.codes + len(self.classes)]], device=self.device))

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> Tensor:
        """Codes ``(B, T)`` to pictures ``(B, C, H, W)`` in [0, 1]."""
        parts = tokens.view(-1, self.side, self.side).split(at_once(self.size))
        embed: Any = self.codec.bottleneck.embed
        decoder: Any = self.codec.decoder
        return torch.cat([decoder(embed(part)).clamp(0, 1) for part in parts])

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Pictures ``(B, C, H, W)`` in [0, 1] to codes ``(B, T)``."""
        found = self.codec.encode(images.to(self.device)).indices
        assert found is not None
        return found.flatten(1)

    def save(self, run: Run) -> None:
        """Keep both networks in the run's folder, for :meth:`load`."""
        inputs = Inputs(size=(self.size, self.size), mean=(0.0,) * 3, std=(1.0,) * 3)
        folder = run.dir / saved.KEPT
        if run.is_first:
            saved.save(folder / "prior", self.prior, Inputs("tokens"), self.classes)
            saved.save(folder / "tokenizer", self.codec, inputs, self.classes, {"reduction": self.reduction})
        run.artifact("tokenizer", folder / "tokenizer", "pictures to tokens and back")
        run.artifact("prior", folder / "prior", "the prior of those tokens; `isthmus apply` draws with both")

    @classmethod
    def load(cls, run_dir: Path) -> ImageTokens:
        """The tokenizer and the prior that a run kept.

        Raises:
            UserError: the run did not come to its end, or a file is damaged.
        """
        tokenizer, prior = (saved.load(run_dir / saved.KEPT / name) for name in ("tokenizer", "prior"))
        size, codec = tokenizer.inputs.size, tokenizer.model
        if size is None or not isinstance(codec, Codec) or not isinstance(tokenizer.facts.get("reduction"), int):
            raise UserError(f"{tokenizer.folder} keeps no tokenizer of pictures; run the recipe again.")
        return cls(codec, prior.model, tokenizer.labels or [], size[0], tokenizer.facts["reduction"])


def at_once(size: int) -> int:
    """Pictures of so many pixels a side that go through a tokenizer at once."""
    return max(1, _PIXELS // size**2)


def picture_transform(size: int) -> Transform:
    """Pictures of any form to the middle square of so many pixels."""
    return Compose([Resize(size), CenterCrop(size)])


def train(
    run: Run,
    source: Dataset,
    tokenizer: TokenizerConfig,
    prior: PriorConfig,
    tokenizer_training: Training,
    prior_training: Training,
) -> ImageTokens:
    """Train a tokenizer on pictures and a prior on their tokens, and keep both in the run's folder.

    Raises:
        UserError: sizes that do not fit together.
    """
    if tokenizer.size % tokenizer.reduction:
        raise UserError(f"size {tokenizer.size} must be a multiple of the reduction {tokenizer.reduction}.")
    transform = picture_transform(tokenizer.size)
    if run.options.max_steps is not None:  # a smoke test need not turn a whole source into tokens
        wanted = run.options.max_steps * max(tokenizer_training.batch_size, prior_training.batch_size)
        source = source.select(np.arange(min(len(source), max(wanted, 2))))
    run.seed_everything("tokenizer")
    codec = make_codec(tokenizer)
    fitted = fit(run, "tokenizer", Tokenizing(codec), source, tokenizer_training, transform)
    codec = averaged(fitted).codec
    assert isinstance(codec, Codec)
    classes = list(source.classes or []) if "label" in source.columns else []
    if "label" in source.columns and not classes:
        classes = class_names(source)

    held = tokenized(run, codec, source, tokenizer.size, bool(classes))
    run.seed_everything("prior")
    side = tokenizer.size // tokenizer.reduction
    model = tiny_llama(tokenizer.codes + len(classes) + 1, prior.layers, prior.width, length=max(1024, 2 * side**2))
    objective = NextToken(model, tokenizer.codes, len(classes), prior.drop)
    trained = averaged(fit(run, "prior", objective, held, prior_training))
    tokens = ImageTokens(codec, trained.model, classes, tokenizer.size, tokenizer.reduction)
    tokens.save(run)
    return tokens


def averaged(result: FitResult) -> Any:
    """The trained objective, with the moving average of its weights where the training asks for one."""
    return result.objective if result.ema is None else result.ema


def make_codec(config: TokenizerConfig) -> Codec:
    """A tokenizer with new weights.

    Raises:
        UserError: the timm network has no level of that reduction.
    """
    if not config.encoder:
        encoder: nn.Module = ConvTokenizer(config.dim, config.reduction, config.width)
        dim = config.dim
    else:
        backbone = Backbone(config.encoder, reductions=(config.reduction,))
        encoder, dim = backbone, backbone.feature_info[0].channels
    return Codec(encoder, VQ(config.codes, dim), ConvDetokenizer(dim, config.reduction, config.width))


@torch.no_grad()
def tokenized(run: Run, codec: Codec, source: Dataset, size: int, labels: bool) -> Memory:
    """The tokens ``(N, T)`` of every picture of a source at ``size`` pixels, with labels where asked for."""
    transform = picture_transform(size)
    codec.eval().to(run.fabric.device)
    found: dict[str, list[Tensor]] = {"tokens": [], "label": []}
    for batch in evaluation_batches(source, at_once(size), transform=transform):
        indices = codec.encode(run.fabric.to_device(batch["image"])).indices
        assert indices is not None
        found["tokens"].append(indices.flatten(1).cpu())
        if labels:
            found["label"].append(batch["label"])
    return Memory(f"tokens of {source.name}", {name: torch.cat(parts) for name, parts in found.items() if parts})
