"""A Markov chain of tables: a model of tokens whose distribution is known exactly, for the testing of samplers. ::

chain = MarkovChain(vocab=4, order=2, generator=generator)
sequences, probabilities = chain.exact(5)  # all 1,024 of them
sample(chain, chain.prompt(12_000), 5)  # any sampler
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MarkovChain(nn.Module):
    """Logits of the next token that depend on the last ``order`` tokens, at random once and for all.

    It is a :class:`~isthmus.samplers.LogitModel`; its cache is the ids seen so far. Before the first token stands the
    id ``vocab``, which is never drawn.

    Args:
        vocab: number of tokens V.
        order: how many tokens back it looks.
        scale: standard deviation of the logits; larger is more predictable.
        generator: of the tables.

    Raises:
        ValueError: fewer than two tokens, or an order below 1.
    """

    table: Tensor

    def __init__(
        self, vocab: int, order: int = 2, scale: float = 1.5, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if vocab < 2 or order < 1:
            raise ValueError(f"a chain needs two tokens and an order of 1 or more, got {vocab} and {order}.")
        self.vocab, self.order = vocab, order
        self.register_buffer("table", scale * torch.randn(*[vocab + 1] * order, vocab, generator=generator))

    def prompt(self, batch: int) -> Tensor:
        """``(batch, 1)``, the id before the first token."""
        return torch.full((batch, 1), self.vocab, device=self.table.device)

    def forward(
        self, inputs: Tensor, cache: Tensor | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids ``(B, L)`` after those of the cache ``(B, S)`` to logits ``(B, L, V)`` and ids ``(B, S + L)``."""
        seen = inputs if cache is None else torch.cat([cache, inputs], 1)
        ids = seen if mask is None else torch.where(mask, seen, self.vocab)
        before = torch.cat([ids.new_full((len(ids), self.order - 1), self.vocab), ids], 1)
        last = before.unfold(1, self.order, 1)[:, -inputs.shape[1] :]
        return self.table[tuple(last.unbind(-1))], seen

    def exact(self, length: int, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """All sequences, counted up with the last token fastest, and the probability of each.

        Args:
            length: tokens T.
            change: what is done to logits before sampling (temperature, filters).

        Returns:
            int64 ``(V^T, T)`` and float64 ``(V^T,)``.
        """
        tokens = torch.arange(self.vocab, device=self.table.device)
        sequences = torch.cartesian_prod(*[tokens] * length).view(-1, length)
        fed = torch.cat([self.prompt(len(sequences)), sequences[:, :-1]], 1)
        logits = self(fed)[0].double()
        logs = (logits if change is None else change(logits)).log_softmax(-1)
        return sequences, logs.gather(2, sequences[..., None]).sum((1, 2)).exp()

    def number(self, sequences: Tensor) -> Tensor:
        """Which of the sequences of :meth:`exact` each of ``(N, T)`` is, ``(N,)``."""
        weights = self.vocab ** torch.arange(sequences.shape[1] - 1, -1, -1, device=sequences.device)
        return (sequences * weights).sum(1)
