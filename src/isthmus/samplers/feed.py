"""Feeding a causal model token by token or window by window, and taking tokens back.

:class:`Feed` keeps what the model remembers, which of it every row may see, and where every row stands, so that
samplers think about tokens only. Rows of a batch may keep different numbers of tokens of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.codec import UserError
from isthmus.samplers import LogitModel
from isthmus.samplers.cache import can_select, held, prepare, select, truncate
from isthmus.samplers.logits import guide


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance u + s (c - u): the model is fed twice, once with another prompt."""

    scale: float
    """Weight s; 1 is no guidance."""
    prompt: Tensor | None = None
    """Ids ``(B, P')`` or ``(1, P')`` of the prompt without the condition; ``None`` is the prompt's last token."""
    mask: Tensor | None = None
    """Which of them may be seen, ``(B, P')``; ``None`` is all. Zeros over a prompt mask its condition."""


class Feed:
    """A model in the middle of a sequence.

    Args:
        model: a :class:`~isthmus.samplers.LogitModel`.
        prompt: int64 ``(B, P)``, at least one token; shorter rows are padded on the left.
        mask: ``(B, P)``, True (or 1) where a token is no padding.
        guidance: feeds every row a second time, without its condition.

    Raises:
        ValueError: an empty or misshapen prompt.
    """

    def __init__(
        self, model: LogitModel, prompt: Tensor, mask: Tensor | None = None, guidance: Guidance | None = None
    ) -> None:
        if prompt.ndim != 2 or not prompt.shape[1] or not len(prompt) or prompt.is_floating_point():
            raise ValueError(f"a prompt is integer ids (B, P) with at least one token, got {tuple(prompt.shape)}.")
        if mask is not None and mask.shape != prompt.shape:
            raise ValueError(f"the mask {tuple(mask.shape)} must have the shape of the prompt {tuple(prompt.shape)}.")
        if mask is not None and not bool((mask[:, -1] != 0).all()):
            raise ValueError("the last token of every prompt must be seen; pad shorter prompts on the left.")
        self.model, self.batch, self.guidance = model, len(prompt), guidance
        seen = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        if guidance is not None and guidance.scale == 1:
            self.guidance = None
        if self.guidance is not None:
            prompt, seen = _beside(prompt, seen, self.guidance)
        self._prompt, self._seen = prompt, seen
        self.copies = len(prompt) // self.batch
        self.cache: Any = None
        self.mask = None if bool(seen.all()) else seen
        self.counts = seen.sum(1)
        self.added = 0
        self._prepared = False

    def first(self) -> Tensor:
        """Feed the prompt; logits ``(B, 1, V)`` of the first token after it."""
        positions = (self._seen.long().cumsum(1) - 1).clamp_min(0)
        logits, self.cache = self.model(self._prompt, None, positions, self.mask)
        return self._guided(logits[:, -1:])

    @property
    def rows_part(self) -> bool:
        """Whether rows of a batch may keep different numbers of tokens; asked after :meth:`first`."""
        return getattr(self.model, "takes_positions", True) and can_select(self.cache)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Feed ids ``(B, L)``; logits ``(B, L, V)`` of the tokens after each. Say with :meth:`keep` which may stay.

        Raises:
            UserError: several tokens, and the model's cache cannot be cut to those that stay.
        """
        if self.added:
            raise RuntimeError("say with keep() how many of the last inputs stay before more are fed.")
        if inputs.shape[1] > 1 and not self._prepared:
            reason = getattr(self.model, "one_by_one", None)
            if reason is not None:
                raise UserError(f"this model takes one token a pass (window=1) only: {reason}.")
            self.cache, self._prepared = prepare(self.cache), True
        inputs = inputs.repeat(self.copies, 1)
        positions = self.counts[:, None] + torch.arange(inputs.shape[1], device=inputs.device)
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, inputs.shape[1]), value=True)
        logits, self.cache = self.model(inputs, self.cache, positions, self.mask)
        self.added = inputs.shape[1]
        return self._guided(logits)

    def keep(self, kept: Tensor) -> None:
        """Keep the first ``kept`` ``(B,)`` of the inputs fed last; the others are as if they had never been there."""
        kept = kept.repeat(self.copies)
        least, most = int(kept.min()), int(kept.max())
        self.counts = self.counts + kept
        if least < self.added or self._prepared:
            total = held(self.cache) - self.added + most
            if least < most:
                self._align(total, most - kept)
            else:
                self.cache = truncate(self.cache, total)
                self.mask = None if self.mask is None else self.mask[:, :total]
        self.added = 0

    def _align(self, total: int, shift: Tensor) -> None:
        """Move every row to the right by ``shift``, so that all end together, and hide what that leaves on the left."""
        index = torch.arange(total, device=shift.device) - shift[:, None]
        source = index.clamp_min(0)
        mask = index >= 0 if self.mask is None else (index >= 0) & self.mask.gather(1, source)
        unseen = int((~mask).long().cumprod(1).sum(1).min())  # leading places that no row sees
        self.cache = select(self.cache, source[:, unseen:])
        self.mask = mask[:, unseen:]

    def _guided(self, logits: Tensor) -> Tensor:
        if self.guidance is None:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        return guide(conditional, unconditional, self.guidance.scale)


def _beside(prompt: Tensor, seen: Tensor, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """Prompts with and without condition in one batch, padded on the left to one length."""
    other = prompt[:, -1:] if guidance.prompt is None else guidance.prompt.to(prompt.device)
    mask = torch.ones_like(other, dtype=torch.bool) if guidance.mask is None else guidance.mask.to(prompt.device) != 0
    if other.ndim != 2 or len(other) not in (1, len(prompt)) or mask.shape != other.shape:
        raise ValueError(
            f"the prompt without condition must be (1 or {len(prompt)}, P) with a mask of that shape, "
            f"got {tuple(other.shape)} and {tuple(mask.shape)}."
        )
    other, mask = other.expand(len(prompt), -1), mask.expand(len(prompt), -1)
    width = max(prompt.shape[1], other.shape[1])

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (width - x.shape[1], 0))

    return torch.cat([padded(prompt), padded(other)]), torch.cat([padded(seen), padded(mask)])


class WholeSequence:
    """A :class:`~isthmus.samplers.LogitModel` from a function that sees the whole sequence and remembers nothing.

    ``WholeSequence(lambda ids, mask: logits)``; its cache is the ids themselves, so any causal function of ids will do:
    tables, networks without key-value cache, remote models.
    """

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.function = function

    def __call__(
        self, inputs: Tensor, cache: Tensor | None, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ids ``(B, L)`` after those of the cache ``(B, S)`` to logits ``(B, L, V)``."""
        ids = inputs if cache is None else torch.cat([cache, inputs], 1)
        return self.function(ids, mask)[:, -inputs.shape[1] :], ids
