"""Speculative Jacobi decoding: several tokens a pass from one model, exactly as ordinary sampling would draw them
(Teng et al., arXiv 2410.01699).

A window of guessed tokens follows the accepted ones. One causal pass predicts all of them anew; a guess stays with
probability min(1, p/q), where q is the distribution that it was drawn from *one pass earlier*, by the same model. At
the first refusal the token comes from the normalised max(p - q, 0), and every guess behind it is drawn again from its
newest distribution. No second model, no training. ::

    decoder = SpeculativeJacobi(window=16, start="repeat_horizon")
    decoded = decoder.sample(model, prompt, 64, Sampling(top_k=100, raster=Raster(8, 8)), generator=generator)
    decoded.tokens, decoded.passes  # (B, 64), and about half as many passes

Why it is exact: given the accepted tokens, a guess was drawn from its q independently of the uniforms that judge it
now, so the lemma of speculative sampling applies whatever q is. That asks for three things: q is kept after all
filters, p went through the same filters, and first guesses (whose q is one-hot) do not look at this pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.samplers import LogitModel
from isthmus.samplers.acceptance import verify
from isthmus.samplers.feed import Feed, Guidance
from isthmus.samplers.logits import draw, uniform
from isthmus.samplers.ordinary import Decoded, Sampling, Scores, Stop, finite
from isthmus.samplers.raster import STARTS, Raster, Start, starts

Scheme = Literal["speculative", "jacobi", "matching"]
Accept = Callable[[Tensor, Tensor, Tensor, torch.Generator | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SpeculativeJacobi:
    """The decoder; it holds settings only, so one serves any model.

    Raises:
        ValueError: a setting out of range.
    """

    window: int = 16
    """Inputs of a pass, so the most tokens that it can add; 1 is ordinary decoding."""
    scheme: Scheme = "speculative"
    """``speculative`` is the paper's. ``jacobi`` is greedy: a guess stays where it is the likeliest token, which gives
    greedy decoding exactly. ``matching`` is Jacobi decoding with sampling, the paper's straw man: a guess stays where
    an ordinary draw gives the same token; exact, but seldom faster."""
    start: Start = "random"
    """First guesses: uniform among image tokens, or from the neighbour to the left or above."""
    advance: Literal["own", "together"] = "own"
    """In a batch every row goes on by its own number of tokens, or all by the smallest (as released); so they do where
    the model's cache has no room for rows that part, as with sliding windows."""
    after: int = 0
    """Tokens drawn one a pass before windows begin."""
    until: int | None = None
    """Number of tokens after which windows end; ``None`` is never."""
    accept: Accept = verify
    """The test of the guesses; see :func:`isthmus.samplers.acceptance.verify`."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}.")
        if self.scheme not in ("speculative", "jacobi", "matching"):
            raise ValueError(f"scheme must be speculative, jacobi or matching, got {self.scheme!r}.")
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}.")
        if self.advance not in ("own", "together"):
            raise ValueError(f"advance must be own or together, got {self.advance!r}.")

    @torch.no_grad()
    def sample(
        self,
        model: LogitModel,
        prompt: Tensor,
        length: int,
        scores: Scores | None = None,
        *,
        guidance: Guidance | None = None,
        mask: Tensor | None = None,
        stop: Stop | None = None,
        pad: int = 0,
        generator: torch.Generator | None = None,
    ) -> Decoded:
        """Draw up to ``length`` tokens after ``prompt`` ``(B, P)``; arguments as for ``samplers.ordinary.sample``.

        Raises:
            ValueError: settings out of range, logits that are NaN, or a cache that cannot be cut.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1 token, got {length}.")
        scores = Sampling() if scores is None else scores
        if self.start.endswith("vertical") and scores.raster is None:
            raise ValueError(f"{self.start} needs to know the width of the image: give Sampling(raster=Raster(…)).")
        feed = Feed(model, prompt, mask, guidance)
        logits = feed.first()
        state = _State(self, scores, prompt, length, logits.shape[-1], pad, generator)
        begin = prompt.shape[1]
        before, advances = state.known, []
        state.begin(logits)
        state.together = self.advance == "together" or not feed.rows_part
        done = torch.zeros_like(before, dtype=torch.bool)
        while True:
            if stop is not None:
                state.known, ended = stop(state.sequence, before, state.known)
                state.wipe(ended)
                done = done | ended
            advances.append(state.known - before)
            done = done | (state.known >= state.end)
            if bool(done.all()):
                break
            before = state.known
            behind = int(before[~done].min())
            logits = feed(state.inputs(self._width(behind - begin, state.end - behind), ~done))
            feed.keep(state.judge(logits))
        return Decoded(state.sequence[:, begin : state.end], state.known - begin, len(advances), advances)

    def _width(self, generated: int, remaining: int) -> int:
        """Inputs of the next pass, from the row that is furthest behind."""
        inside = generated >= self.after and (self.until is None or generated < self.until)
        return min(self.window, remaining) if inside else 1


def settled(guesses: Tensor, count: Tensor, following: Tensor, later: Tensor, added: Tensor) -> Tensor:
    """Tokens ``(B, W)`` at the W places that a pass predicted: guesses that stay, the token after them, new guesses.

    Args:
        guesses: ``(B, W - 1)``, what was tested.
        count: ``(B,)``, how many of them stay.
        following: ``(B,)``, the token after those.
        later: ``(B, W - 1)``, drawn from the newest distributions of the places from the second on.
        added: ``(B,)``, how many of the places are final: ``count + 1``, or fewer where a batch goes on together.
    """
    step = torch.arange(guesses.shape[1] + 1, device=guesses.device)
    newest = torch.cat([following[:, None], later], 1)
    tokens = torch.where(step < count[:, None], torch.cat([guesses, newest[:, -1:]], 1), following[:, None])
    return torch.where(step < added[:, None], tokens, newest)


class _State:
    """Accepted tokens and guesses behind them, in one sequence a row, and the distributions of the guesses.

    Row b has ``known[b]`` tokens, prompt included; the places behind hold ``pending[b]`` guesses, guess i drawn from
    ``rows[b, i]``.
    """

    def __init__(
        self,
        settings: SpeculativeJacobi,
        scores: Scores,
        prompt: Tensor,
        length: int,
        vocabulary: int,
        pad: int,
        generator: torch.Generator | None,
    ) -> None:
        self.settings, self.scores, self.pad, self.generator = settings, scores, pad, generator
        self.prompt, self.end, self.vocabulary = prompt.shape[1], prompt.shape[1] + length, vocabulary
        self.sequence = F.pad(prompt, (0, length + settings.window), value=pad)
        self.best = torch.zeros_like(self.sequence) if settings.start.startswith("sample") else None
        self.known = torch.full_like(prompt[:, 0], self.prompt)
        self.running = torch.ones_like(self.known, dtype=torch.bool)
        self.width, self.together = 1, False
        self.pending = torch.zeros_like(self.known)
        self.rows: Tensor | None = None
        self.ids: Tensor | None = None

    def begin(self, logits: Tensor) -> None:
        """Draw the token after the prompt from ``(B, 1, V)``."""
        row = self._scores(logits, self.known[:, None])
        greedy = self.settings.scheme == "jacobi"
        token = row.argmax(-1) if greedy else draw(row.softmax(-1), self.generator)
        self.sequence[:, self.prompt] = token[:, 0]
        self.known = self.known + 1
        if not greedy:
            shape = (len(token), self.settings.window - 1, self.vocabulary)
            self.rows = torch.zeros(shape, dtype=row.dtype, device=row.device)

    def inputs(self, width: int, running: Tensor) -> Tensor:
        """``(B, width)``: the last accepted token and guesses behind it, those that are missing made now."""
        self.width, self.running = width, running
        if width > 1:
            self._fill(width - 1)
        inputs = self.sequence.gather(1, self._places(width) - 1)
        # What is fed for rows that have ended does not matter, but the model has to know it. Padding need not be a
        # token, and the prompt may be of another vocabulary; the first token that was drawn is always known.
        return torch.where(running[:, None], inputs, self.sequence[:, self.prompt : self.prompt + 1])

    def wipe(self, ended: Tensor) -> None:
        """Nothing stays behind the last token of rows that have ended."""
        if bool(ended.any()):
            place = torch.arange(self.sequence.shape[1], device=ended.device)
            self.sequence.masked_fill_(ended[:, None] & (place >= self.known[:, None]), self.pad)

    def judge(self, logits: Tensor) -> Tensor:
        """Accept what stays, add the token after it and draw new guesses; returns ``(B,)`` how many inputs stay."""
        width, settings, running = self.width, self.settings, self.running
        place = self._places(width)
        scores = self._scores(logits, place)
        old = self.sequence.gather(1, place)
        guesses = old[:, : width - 1].masked_fill(~running[:, None], 0)
        probabilities = None if settings.scheme == "jacobi" else scores.softmax(-1)
        if settings.scheme == "speculative":
            assert probabilities is not None
            assert self.rows is not None
            count, residual = settings.accept(probabilities, self.rows[:, : width - 1], guesses, self.generator)
            following = draw(residual, self.generator)
            later = draw(probabilities[:, 1:], self.generator)
        else:
            new = scores.argmax(-1) if probabilities is None else draw(probabilities, self.generator)
            count = (guesses == new[:, :-1]).long().cumprod(1).sum(1)
            following, later = new.gather(1, count[:, None])[:, 0], new[:, 1:]

        added = torch.minimum(count + 1, self.end - self.known)
        if self.together:
            added = added.masked_fill(~running, width).amin().expand_as(added)
        added = added * running
        tokens = settled(guesses, count, following, later, added)
        self.sequence.scatter_(1, place, torch.where(running[:, None], tokens, old))
        if self.best is not None:
            self.best.scatter_(1, place, scores.argmax(-1))
        if probabilities is not None and settings.scheme == "speculative" and width > 1:
            assert self.rows is not None
            step = torch.arange(width - 1, device=place.device)
            index = (added[:, None] + step).clamp_max(width - 1)
            each = torch.arange(len(index), device=index.device)[:, None]
            self.rows[:, : width - 1] = probabilities[each, index]
        self.known = self.known + added
        self.pending = torch.where(running, width - added, 0)
        return torch.where(running, added, added.amax())  # rows that have ended go along with the others

    def _scores(self, logits: Tensor, place: Tensor) -> Tensor:
        return finite(self.scores(finite(logits), place - self.prompt, self.sequence))

    def _places(self, width: int) -> Tensor:
        """Places ``(B, width)`` in the sequence that a pass predicts."""
        return self.known[:, None] + torch.arange(width, device=self.known.device)

    def _fill(self, count: int) -> None:
        """First guesses for the places behind ``pending``, up to ``count`` guesses in all; their rows are one-hot."""
        place = self._places(count)
        raster = self.scores.raster
        tokens = self._fresh(place, raster)
        if raster is not None:
            forced = raster.forced(place - self.prompt + raster.begun)
            tokens = torch.where(forced >= 0, forced, tokens)
        fresh = (torch.arange(count, device=place.device) >= self.pending[:, None]) & self.running[:, None]
        self.sequence.scatter_(1, place, torch.where(fresh, tokens, self.sequence.gather(1, place)))
        if self.rows is not None and self.settings.scheme == "speculative":
            rows = self.rows[:, :count]
            rows.masked_fill_(fresh[..., None], 0)
            chosen = torch.where(fresh, tokens, 0)[..., None]
            rows.scatter_(2, chosen, torch.where(fresh[..., None], 1.0, rows.gather(2, chosen)).to(rows.dtype))

    def _fresh(self, place: Tensor, raster: Raster | None) -> Tensor:
        if self.ids is None:
            whole = Raster(1, 1) if raster is None else raster
            self.ids = whole.ids(place.device, self.vocabulary)
        chance = uniform(place.shape, self.generator, torch.empty((), device=place.device))
        random = self.ids[(chance * len(self.ids)).long().clamp_max(len(self.ids) - 1)]
        start = self.settings.start
        if start == "random":
            return random
        # Counted from the first token of the first line; without a raster all is one line, from the prompt on.
        origin = 0 if raster is None else self.prompt - raster.begun + len(raster.header)
        line = self.sequence.shape[1] if raster is None else raster.line
        shift = max(0, origin)
        tokens = self.sequence[:, shift:] if shift else F.pad(self.sequence, (-origin, 0))
        best = self.best if self.best is None else (self.best[:, shift:] if shift else F.pad(self.best, (-origin, 0)))
        known = self.known + self.pending - origin
        return starts(start, random, place - origin, line, known, tokens, best)
