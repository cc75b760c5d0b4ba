"""Drawing from a prior or a language model, fast (speculative, parallel, distilled) and faithful (contrastive).

What samplers ask of a model is :class:`LogitModel`; ``samplers/transformers_models.py`` makes one of any causal
transformers model, ``samplers/feed.py`` one of a plain function of the whole sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class LogitModel(Protocol):
    """A causal model of tokens with a memory: ``model(inputs, cache, positions, mask) -> (logits, cache)``.

    ``inputs`` are ids ``(B, L)`` or vectors ``(B, L, D)`` that follow what ``cache`` holds (nothing where it is
    ``None``); ``positions`` ``(B, L)`` count each row's own tokens from 0; ``mask`` ``(B, S + L)`` is True where one
    of the S cached and L new tokens may be seen, ``None`` where all may. ``logits`` are ``(B, L, V)``, and
    ``logits[:, i]`` are those of the token after input i. The cache is one that ``samplers/cache.py`` can cut.
    """

    def __call__(
        self, inputs: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None, /
    ) -> tuple[Tensor, Any]: ...
