"""Ordinary ancestral sampling, a token a pass, with a key-value cache: what every faster sampler has to equal. ::

decoded = sample(model, prompt, 64, Sampling(temperature=1.0, top_k=100), generator=generator)
decoded.tokens  # (B, 64)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from isthmus.samplers import LogitModel
from isthmus.samplers.feed import Feed, Guidance
from isthmus.samplers.logits import draw, top_k_top_p
from isthmus.samplers.raster import Raster


class Scores(Protocol):
    """What is done to logits before anything is drawn; a fast sampler and ordinary sampling share one.

    ``scores(logits (B, L, V), place (B, L), sequence (B, N)) -> logits``: row ``[b, i]`` predicts the generated token
    ``place[b, i]``, counted from 0; ``sequence`` holds the prompt and all tokens before that place.
    """

    @property
    def raster(self) -> Raster | None: ...

    def __call__(self, logits: Tensor, place: Tensor, sequence: Tensor, /) -> Tensor: ...


Stop = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``stop(sequence (B, N), before (B,), after (B,)) -> (after, done)``: whether a row ends among the tokens
``sequence[b, before[b]:after[b]]``, and with which of them; both counts include the prompt."""


@dataclass(frozen=True)
class Sampling:
    """Grammar, temperature, top-k and top-p, in this order."""

    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int | None = None
    """Keep so many tokens; ``None`` keeps all."""
    top_p: float | None = None
    """Keep tokens up to this probability; ``None`` keeps all."""
    raster: Raster | None = None
    """Grammar of the image; ``None`` for text."""

    def __call__(self, logits: Tensor, place: Tensor, sequence: Tensor) -> Tensor:
        """Logits ``(B, L, V)`` in float32 with -inf for what must not be drawn."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.raster is not None:
            logits = self.raster.constrain(logits, place + self.raster.begun)
        return top_k_top_p(logits, self.top_k, self.top_p, self.temperature)


@dataclass
class Decoded:
    """Generated tokens and what they cost."""

    tokens: Tensor
    """``(B, T)``, without the prompt; after a row's end there is padding."""
    lengths: Tensor
    """``(B,)`` tokens of every row up to its end."""
    passes: int
    """Forward passes of the model, that of the prompt included."""
    advances: list[Tensor] = field(default_factory=list)
    """``(B,)`` tokens that every pass added to each row."""

    @property
    def passes_per_token(self) -> float:
        """Forward passes per token of the longest row: 1 for ordinary sampling."""
        return self.passes / max(1, int(self.lengths.max()))


@torch.no_grad()
def sample(
    model: LogitModel,
    prompt: Tensor,
    length: int,
    scores: Scores | None = None,
    *,
    greedy: bool = False,
    guidance: Guidance | None = None,
    mask: Tensor | None = None,
    stop: Stop | None = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Draw up to ``length`` tokens after ``prompt`` ``(B, P)``, one a pass.

    Args:
        model: gives logits.
        prompt: int64 ids, padded on the left where rows are shorter.
        length: number of tokens, at least 1.
        scores: what is done to logits; temperature 1 without filters by default.
        greedy: take the likeliest token.
        guidance: classifier-free guidance.
        mask: ``(B, P)``, False over padding.
        stop: ends rows early, see :func:`at_any`.
        pad: id that fills what follows a row's end.
        generator: for the draws.

    Raises:
        ValueError: settings out of range, or logits that are NaN.
    """
    scores = Sampling() if scores is None else scores
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}.")
    feed = Feed(model, prompt, mask, guidance)
    batch, begin = prompt.shape
    sequence = torch.cat([prompt, prompt.new_full((batch, length), pad)], 1)
    lengths = torch.full_like(prompt[:, 0], begin)
    running = torch.ones_like(lengths, dtype=torch.bool)
    advances = []
    for step in range(length):
        if step == 0:
            logits = feed.first()
        else:  # padding need not be a token that the model knows, but the first token drawn is one
            last = sequence[:, begin + step - 1 : begin + step]
            logits = feed(torch.where(running[:, None], last, sequence[:, begin : begin + 1]))
            feed.keep(torch.ones_like(lengths))
        place = torch.full((batch, 1), step, device=prompt.device)
        row = finite(scores(finite(logits), place, sequence))[:, 0]
        token = row.argmax(-1) if greedy else draw(row.softmax(-1), generator)
        sequence[:, begin + step] = torch.where(running, token, pad)
        before, lengths = lengths, lengths + running
        advances.append(lengths - before)
        if stop is not None:
            lengths, ended = stop(sequence, before, lengths)
            running = running & ~ended
            if not bool(running.any()):
                break
    return Decoded(sequence[:, begin:], lengths - begin, len(advances), advances)


def at_any(ids: Sequence[int]) -> Stop:
    """A row ends with the first of these tokens, which stays part of it."""

    def stop(sequence: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(sequence.shape[1], device=sequence.device)
        new = (place >= before[:, None]) & (place < after[:, None])
        ends = new & torch.isin(sequence, torch.as_tensor(list(ids), device=sequence.device))
        done = ends.any(1)
        return torch.where(done, ends.long().argmax(1) + 1, after), done

    return stop


def finite(logits: Tensor) -> Tensor:
    """The logits, if a token can be drawn from every row of them.

    Raises:
        ValueError: NaN, +inf, or nothing but -inf.
    """
    top = logits.amax(-1)
    if not bool(top.isfinite().all()):
        what = "NaN or infinite" if bool((top.isnan() | top.isposinf()).any()) else "-inf for every token"
        raise ValueError(f"the logits are {what}: the model's weights, its precision or a filter is at fault.")
    return logits
