"""What is known of an image before it is drawn token by token: where its lines end, and what stands beside a token.

A raster is a header, ``height`` lines of ``width`` image tokens, each with an end-of-line token where the model has
one, and an end-of-image token where it has one. ``place`` counts from the first token of the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Start = Literal["random", "repeat_horizon", "sample_horizon", "repeat_vertical", "sample_vertical"]
STARTS: tuple[Start, ...] = ("random", "repeat_horizon", "sample_horizon", "repeat_vertical", "sample_vertical")


@dataclass(frozen=True)
class Raster:
    """The grammar of an image's tokens.

    Raises:
        ValueError: a size below 1, or no image tokens.
    """

    height: int
    """Lines of image tokens."""
    width: int
    """Image tokens in a line, without the end of line."""
    tokens: Sequence[int] | None = None
    """Ids that image tokens may have, a range where possible; ``None`` is all of them."""
    end_of_line: int | None = None
    """Id after every line."""
    end: int | None = None
    """Id after the last line."""
    header: tuple[int, ...] = ()
    """Ids before the first line (start of image, its size)."""
    begun: int = 0
    """How many tokens of header and lines the prompt ends with already."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.begun < 0:
            raise ValueError(f"a raster needs at least one line of one token, got {self.height} x {self.width}.")
        if self.tokens is not None and not len(self.tokens):
            raise ValueError("a raster needs at least one id for its image tokens.")

    @property
    def line(self) -> int:
        """Tokens of a line with its end."""
        return self.width + (self.end_of_line is not None)

    def __len__(self) -> int:
        return len(self.header) + self.height * self.line + (self.end is not None)

    def forced(self, place: Tensor) -> Tensor:
        """The only id that may stand at a place, -1 where several may; any shape, int64."""
        inside = place - len(self.header)
        found = torch.full_like(place, -1)
        lines = (inside >= 0) & (inside < self.height * self.line)
        if self.end_of_line is not None:
            found = found.masked_fill(lines & (inside % self.line == self.width), self.end_of_line)
        if self.end is not None:
            found = found.masked_fill(inside == self.height * self.line, self.end)
        for number, token in enumerate(self.header):
            found = found.masked_fill(place == number, token)
        return found

    def constrain(self, logits: Tensor, place: Tensor) -> Tensor:
        """Logits ``(…, V)`` of the tokens at ``place`` ``(…)``, -inf where the grammar has no such token there.

        Outside the raster all tokens are free.

        Raises:
            ValueError: the model has fewer tokens than the grammar names.
        """
        vocabulary = logits.shape[-1]
        ids = self.ids(logits.device, vocabulary)
        forced, inside = self.forced(place), place - len(self.header)
        if int(forced.max()) >= vocabulary:
            raise ValueError(f"the raster's token {int(forced.max())} is beyond the model's {vocabulary}.")
        free = (inside >= 0) & (inside < self.height * self.line) & (forced < 0)
        image = torch.zeros(vocabulary, dtype=torch.bool, device=logits.device).index_fill(0, ids, True)
        logits = logits.masked_fill(free[..., None] & ~image, -torch.inf)
        if not bool((forced >= 0).any()):
            return logits
        # A forced token gets a finite logit of its own: the model may think it impossible.
        only = torch.full_like(logits, -torch.inf).scatter(-1, forced.clamp_min(0)[..., None], 0.0)
        return torch.where((forced >= 0)[..., None], only, logits)

    def ids(self, device: torch.device, vocabulary: int) -> Tensor:
        """Ids of the image tokens, int64 ``(N,)``.

        Raises:
            ValueError: one of them is no token of the model.
        """
        chosen = range(vocabulary) if self.tokens is None else self.tokens
        ends = (chosen[0], chosen[-1]) if isinstance(chosen, range) else chosen  # a pass must not walk a whole range
        if min(ends) < 0 or max(ends) >= vocabulary:
            raise ValueError(f"the raster has image tokens beyond the model's {vocabulary}.")
        if isinstance(chosen, range):
            return torch.arange(chosen.start, chosen.stop, chosen.step, device=device)
        return torch.as_tensor(chosen, device=device)


def starts(
    scheme: Start, random: Tensor, place: Tensor, line: int, known: Tensor, tokens: Tensor, best: Tensor | None = None
) -> Tensor:
    """First guesses for places that nothing was predicted for yet (section 3.3 of arXiv 2410.01699).

    ``random`` keeps uniform draws; ``repeat`` copies the token to the left (``horizon``) or above (``vertical``), and
    ``sample`` takes the likeliest token of that neighbour's distribution. Guesses without a neighbour, in the first
    column or line, stay random; a neighbour that is unknown itself is replaced by the last known token.

    Args:
        scheme: one of ``STARTS``.
        random: int64 ``(B, K)``, uniform draws among the image tokens.
        place: ``(B, K)``, counted from the first token of the first line.
        line: tokens of a line with its end.
        known: ``(B,)``, how many tokens are known, counted in the same way.
        tokens: ``(B, N)``, the tokens from the first line on; those up to ``known`` are read.
        best: ``(B, N)``, the likeliest token of every place's distribution, for ``sample``.

    Raises:
        ValueError: an unknown scheme, or ``sample`` without ``best``.
    """
    if scheme not in STARTS:
        raise ValueError(f"fresh tokens start as one of {', '.join(STARTS)}, got {scheme!r}.")
    if scheme == "random":
        return random
    if scheme.startswith("sample") and best is None:
        raise ValueError(f"{scheme} needs the likeliest tokens of the places known.")
    horizon = scheme.endswith("horizon")
    source = place - (1 if horizon else line)
    has = (place % line > 0) & (place > 0) if horizon else source >= 0
    last = (known - 1).clamp_min(0)
    source = torch.minimum(source.clamp_min(0), last[:, None])
    found = (best if scheme.startswith("sample") else tokens).gather(1, source)  # type: ignore[union-attr]
    return torch.where(has & (known > 0)[:, None], found, random)
