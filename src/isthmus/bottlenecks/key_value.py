"""Discrete key-value bottleneck (Träuble et al., ICML 2023, arXiv 2207.11240): frozen keys, learned values.

An embedding is split into C small queries; each looks up its nearest key in a codebook of its own and lets the paired
value through. Keys are placed once, without labels, and frozen; a gradient reaches only the values that were looked up,
so that learning one class after another hardly touches what was learned before.

    bottleneck = KeyValueBottleneck(RandomProjection(512, 256, 14), pairs=4096, value_dim=10)
    bottleneck.fit(embeddings)                                  # batches of (B, 512), of any data
    logits = Vote(10)(bottleneck([embedding]).features)         # train the values as you please
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from isthmus.bottlenecks.splitters import Chunk, LearnedProjection, RandomProjection
from isthmus.bounds import Count, NonNegative, Share, checked
from isthmus.codec import Code, part
from isthmus.codec.checkpoints import Checkpoint
from isthmus.codec.published import Published
from isthmus.layers.codebook import EMACodebook, check_finite, nearest, several_processes

Start = Literal["normal", "queries", "kmeans"]


class Lookup(NamedTuple):
    """All that a lookup finds, for C codebooks, N tokens and T pairs each."""

    values: Tensor
    """``(B, C, N, T, V)``; zero where no pair was found."""
    keys: Tensor
    """``(B, C, N, T, K)``."""
    indices: Tensor
    """int64 ``(B, C, N, T)``, nearest first."""
    scores: Tensor
    """``(B, C, N, T)``, minus the squared distance; -inf where no pair was found."""
    counts: Tensor
    """int64 ``(B, C, N, T)``: how often the pair had been fetched before this batch."""
    queries: Tensor
    """``(B, C, N, K)``."""


@part
@checked
class KeyValueBottleneck(nn.Module):
    """Replaces an embedding by the values whose keys it is nearest to.

    In training mode every pair may be fetched, and ``used`` counts how often it was. In evaluation mode pairs that were
    never fetched, whose values nobody trained, are left out.

    Distances are computed in float32 whatever comes in. Train the values without momentum and weight decay, which would
    move values that were not looked up; :meth:`check_optimizer` warns.

    Args:
        splitter: tokens to queries: ``RandomProjection``, ``Chunk``, ``LearnedProjection`` or your own.
        pairs: key-value pairs J of a codebook.
        value_dim: width V of a value; the number of classes for the voting decoder.
        topk: pairs T that a query fetches; their values are added.
        temperature: of Gumbel noise on scores / temperature before the choice, whenever it is above 0.
        unused: what evaluation does with pairs that were never fetched. ``drop`` never fetches them: where a codebook
            has fewer than T used pairs, the rest contributes nothing. ``released`` is the published code, which gives
            them the lowest score of the batch, so that they are fetched when nothing else is left.
        value_std: values start normal with this deviation, 0 in all published runs.
        decay, eps: of the moving averages that place the keys.
        dead: keys that win less than this share of what each would win if all won alike are put elsewhere; 0 never.
        revive: ``whole`` or ``released``, see :class:`~isthmus.layers.codebook.EMACodebook`.
        level: which entry of the pyramid is read.

    Attributes:
        keys: the :class:`~isthmus.layers.codebook.EMACodebook` of all codebooks; ``keys.codes`` is ``(C, J, K)``.
        values: parameter ``(C, J, V)``.
        used: buffer, int64 ``(C, J)``.
        num_codes: J.

    Raises:
        ValueError: numbers out of range, more pairs to fetch than there are.
    """

    used: Tensor
    frozen: Tensor

    def __init__(
        self,
        splitter: nn.Module,
        pairs: Count,
        value_dim: Count,
        topk: Count = 1,
        temperature: NonNegative = 0.0,
        unused: Literal["drop", "released"] = "drop",
        value_std: NonNegative = 0.0,
        decay: Share = 0.95,
        eps: NonNegative = 1e-5,
        dead: NonNegative = 0.1,
        revive: Literal["whole", "released"] = "whole",
        level: int = -1,
    ) -> None:
        super().__init__()
        if not 1 <= topk <= pairs:
            raise ValueError(f"topk must lie between 1 and the {pairs} pairs of a codebook, got {topk}.")
        self.splitter: Any = splitter
        self.codebooks, self.num_codes, self.topk = int(self.splitter.codebooks), pairs, topk
        self.temperature, self.unused, self.value_std = temperature, unused, value_std
        self.dead, self.level = dead, level
        self.keys = EMACodebook(pairs, int(self.splitter.dim), self.codebooks, decay, eps, revive=revive)
        self.values = nn.Parameter(torch.zeros(self.codebooks, pairs, value_dim))
        self.register_buffer("used", torch.zeros(self.codebooks, pairs, dtype=torch.int64))
        self.register_buffer("frozen", torch.tensor(False))
        self.reset_values()

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"codebooks={self.codebooks}, pairs={self.num_codes}, value_dim={self.values.shape[-1]}"

    # ----------------------------------------------------------------------------------------------------- the keys

    @property
    def fitted(self) -> bool:
        """Whether the keys are placed and frozen."""
        return bool(self.frozen)

    @torch.no_grad()
    def fit_keys(
        self,
        batches: Iterable[Any],
        epochs: int = 1,
        start: Start = "normal",
        generator: torch.Generator | None = None,
    ) -> Self:
        """Place the keys by moving averages of the queries that they win; values and counters stay as they are.

        Call it before anything is learned: values belong to where their keys are. Ends unfrozen, so that it can be
        called again with more data; with several processes, each gives its share.

        Args:
            batches: pyramids, or tensors of the level that is read; no labels. A list or loader where ``epochs`` > 1.
            epochs: times to go through them.
            start: ``normal`` keys, the published start; on random ``queries`` of the first batch; or on ``kmeans`` of
                it, ten steps. Without effect where keys were placed before.
            generator: draws the start and where dead keys go.

        Raises:
            ValueError: the keys are frozen; no batch; NaN among the embeddings; shapes that do not fit.
        """
        if self.fitted:
            raise ValueError("the keys are frozen, because values depend on them; make a new bottleneck to fit others.")
        if start not in ("normal", "queries", "kmeans"):
            raise ValueError(f"start is normal, queries or kmeans, got {start!r}.")
        if epochs > 1 and isinstance(batches, Iterator):
            raise ValueError("an iterator can be gone through once only; give a list or a loader for several epochs.")
        fresh = bool((self.keys.counts == 1).all())
        steps = 0
        for _ in range(epochs):
            for batch in batches:
                queries = self._queries(self._tokens(batch)).transpose(0, 1).flatten(1, 2)  # (C, B·N, K)
                number = queries.shape[1]
                world = torch.distributed.get_world_size() if several_processes() else 1
                even = number * world / self.num_codes  # what each key wins where all win alike
                if steps == 0 and fresh:
                    self._start(queries, start, even, generator)
                self.keys.update(queries, generator, threshold=self.dead * even)
                steps += 1
        if not steps:
            raise ValueError("fit_keys got no batch; give embeddings, or call freeze_keys to keep random keys.")
        return self

    def _start(self, queries: Tensor, start: Start, even: float, generator: torch.Generator | None) -> None:
        """Put new keys where the first step finds them."""
        if start == "normal":  # they weigh next to nothing: those that win nothing at once are dead
            self.keys.place(self.keys.codes.clone(), torch.full_like(self.keys.counts, (self.dead or 0.1) * even))
            return
        if queries.shape[1] < self.num_codes:
            warnings.warn(
                f"{queries.shape[1]} queries to start {self.num_codes} keys on: some start alike; give larger batches.",
                stacklevel=3,
            )
        self.keys.start(queries, 10 if start == "kmeans" else 0, generator)

    def freeze_keys(self) -> Self:
        """From here on the keys stay where they are, for ever."""
        self.frozen.fill_(True)
        return self

    @torch.no_grad()
    def place_keys(self, keys: Tensor) -> Self:
        """Put the keys ``(C, J, K)`` somewhere of your own choice, and freeze them.

        Raises:
            ValueError: another shape, or values were trained already.
        """
        if keys.shape != self.keys.codes.shape:
            raise ValueError(f"keys are (C, J, K) = {tuple(self.keys.codes.shape)}, got {tuple(keys.shape)}.")
        if bool(self.used.any()):
            raise ValueError("values were trained on the keys as they are; make a new bottleneck to place others.")
        self.keys.place(keys)
        return self.freeze_keys()

    def fit(self, batches: Iterable[Any]) -> Self:
        """:meth:`fit_keys` with its defaults, then :meth:`freeze_keys`."""
        return self.fit_keys(batches).freeze_keys()

    @torch.no_grad()
    def reset_values(self, generator: torch.Generator | None = None) -> None:
        """Forget all that was learned, counters too; in place, so that an optimiser made before keeps working."""
        if self.value_std:
            self.values.normal_(0, self.value_std, generator=generator)
        else:
            self.values.zero_()
        self.used.zero_()

    # ----------------------------------------------------------------------------------------------------- looking up

    def forward(self, features: list[Tensor]) -> Code:
        """A level ``(B, D, H, W)``, ``(B, N, D)`` or ``(B, D)`` to one of the same layout with C·V channels.

        The channels of a codebook stand together. ``indices`` are ``(B, C, N, T)``; ``bits`` is what writing them with
        a fixed length costs.

        Raises:
            ValueError: the keys are not placed yet; NaN or infinity among the features; another number of channels.
        """
        found = self.lookup(features)
        merged = found.values.sum(3).transpose(1, 2).flatten(2)  # (B, N, C·V)
        level = features[self.level]
        if level.ndim == 2:
            merged = merged[:, 0]
        elif level.ndim > 3:
            merged = merged.transpose(1, 2).unflatten(2, level.shape[2:])
        bits = merged.new_full((len(merged),), found.indices[0].numel() * math.log2(self.num_codes))
        return Code([merged], found.indices, merged.new_zeros(()), bits)

    def lookup(self, features: list[Tensor] | Tensor) -> Lookup:
        """What :meth:`forward` finds, before it is added up; counts in training mode."""
        if not self.fitted:
            raise ValueError(
                "the keys of this bottleneck are not placed: call fit(batches of features) first, or freeze_keys() to "
                "keep them random."
            )
        queries = self._queries(self._tokens(features))
        batch, books, number, _ = queries.shape
        flat = queries.transpose(0, 1).flatten(1, 2)
        valid = None if self.training else self.used > 0
        index, score = self._choose(flat, valid)
        place = index + torch.arange(books, device=index.device)[:, None, None] * self.num_codes

        def shaped(x: Tensor) -> Tensor:
            return x.view(books, batch, number, *x.shape[2:]).transpose(0, 1)

        values = nn.functional.embedding(place, self.values.flatten(0, 1))
        values = values * (score > -math.inf)[..., None]
        keys = nn.functional.embedding(place, self.keys.codes.flatten(0, 1))
        counts = self.used.flatten()[place]
        if self.training:
            self._count(place)
        return Lookup(shaped(values), shaped(keys), shaped(index), shaped(score), shaped(counts), queries)

    @property
    def used_share(self) -> float:
        """Share of pairs that training has fetched at least once."""
        return float((self.used > 0).float().mean())

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn where an optimiser would move values that were not looked up.

        Raises:
            ValueError: the values are not among what it trains.
        """
        groups = [g for g in optimizer.param_groups if any(p is self.values for p in g["params"])]
        if not groups:
            raise ValueError("this optimiser does not train the bottleneck's values; make it of its parameters.")
        for name in ("momentum", "weight_decay", "betas"):
            amount = groups[0].get(name, 0)
            if amount and (amount if isinstance(amount, (int, float)) else amount[0]):
                warnings.warn(
                    f"{name} {amount} moves values that a batch did not look up, so that old classes are forgotten; "
                    "plain SGD does not.",
                    stacklevel=2,
                )

    # ------------------------------------------------------------------------------------------------------ in parts

    def _tokens(self, features: Any) -> Tensor:
        """The level that is read, as ``(B, N, D)``."""
        level = features if isinstance(features, Tensor) else features[self.level]
        tokens = level[:, None] if level.ndim == 2 else level if level.ndim == 3 else level.flatten(2).transpose(1, 2)
        channels = getattr(self.splitter, "channels", tokens.shape[-1])
        if level.ndim < 2 or tokens.shape[-1] != channels:
            raise ValueError(
                f"the splitter takes {channels} channels, as (B, D), (B, N, D) or (B, D, H, W), "
                f"got {tuple(level.shape)}."
            )
        check_finite(level, "the key-value bottleneck")
        return tokens

    def _queries(self, tokens: Tensor) -> Tensor:
        """``(B, C, N, K)`` in float32, without gradient."""
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            dtype = next((t.dtype for t in self.splitter.state_dict().values()), torch.float32)
            return self.splitter(tokens.to(dtype)).float()

    def _choose(self, queries: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pairs for ``(C, N, K)``: index and score ``(C, N, T)``."""
        if self.temperature > 0:
            return self._noisy(queries, valid)
        index, score = nearest(queries, self.keys.codes, self.topk, valid=valid)
        if valid is None or self.unused == "drop":
            return index, score
        return self._fill(queries, valid, index, score)

    def _fill(self, queries: Tensor, valid: Tensor, index: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Published code: where used pairs run out, unused ones of lowest index, with the lowest score of all."""
        missing = score == -math.inf
        if not bool(missing.any()):
            return index, score
        lowest = min(float(-torch.cdist(q, k).square().max()) for q, k in zip(queries, self.keys.codes, strict=True))
        spare = valid.to(torch.uint8).argsort(dim=1, stable=True)  # unused pairs first
        taken = valid.sum(1, keepdim=True)
        slot = (torch.arange(self.topk, device=index.device) - taken).clamp_min(0)  # (C, T)
        other = spare.gather(1, slot)[:, None].expand_as(index)
        return torch.where(missing, other, index), score.masked_fill(missing, lowest)

    def _noisy(self, queries: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """With Gumbel noise from the global generator, some queries at a time."""
        found = []
        for part_ in queries.split(max(1, 2**24 // self.keys.codes[..., 0].numel()), dim=1):
            score = -torch.cdist(part_, self.keys.codes.float()).square()
            if valid is not None:
                low = score.min() if self.unused == "released" else score.new_tensor(-math.inf)
                score = torch.where(valid[:, None], score, low)
            noise = -torch.empty_like(score).exponential_().log()
            index = (score / self.temperature + noise).topk(self.topk, dim=2).indices
            found.append((index, score.gather(2, index)))
        index, score = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return index, score

    @torch.no_grad()
    def _count(self, place: Tensor) -> None:
        if several_processes():
            counted = torch.bincount(place.flatten(), minlength=self.used.numel())
            torch.distributed.all_reduce(counted)
            self.used.view(-1).add_(counted)
        else:
            self.used.view(-1).index_add_(0, place.flatten(), torch.ones_like(place.flatten()))


# -------------------------------------------------------------------------------------------- published checkpoints


def from_official(state: Mapping[str, Any], **arguments: Any) -> KeyValueBottleneck:
    """A bottleneck with the weights of a published module, its keys frozen.

    Reads the authors' ``{"bottleneck": …, "splitter": …}`` (or those names with dots), and the state of
    discrete-key-value-bottleneck-pytorch.

    Args:
        state: as ``torch.load`` gives it.
        arguments: further ones of :class:`KeyValueBottleneck`, such as ``topk``, which the file does not tell.

    Raises:
        ValueError: neither of the two.
    """
    flat = {
        f"{outer}.{name}" if isinstance(inner, Mapping) else outer: tensor
        for outer, inner in state.items()
        for name, tensor in (inner.items() if isinstance(inner, Mapping) else [("", inner)])
    }
    renamed = {
        "vq._codebook.embed": "bottleneck.keys",
        "values": "bottleneck.values",
        "rand_proj": "splitter.rand_proj",
        **{n: f"bottleneck.{n}" for n in ("keys", "keys_avg", "cluster_size", "cluster_size_counter")},
    }
    flat = {renamed.get(name, name): tensor for name, tensor in flat.items()}
    if not {"bottleneck.keys", "bottleneck.values"} <= flat.keys():
        raise ValueError(f"no key-value bottleneck: keys and values are missing among {', '.join(sorted(flat)[:6])}.")
    values, keys = (t if t.ndim == 3 else t[None] for t in (flat["bottleneck.values"], flat["bottleneck.keys"]))
    keys = keys.expand(len(values), *keys.shape[-2:])  # one codebook may serve all heads
    books, pairs, dim = keys.shape
    splitter = _splitter(flat, books, dim)
    made = KeyValueBottleneck(splitter, pairs, values.shape[-1], **arguments)
    made.place_keys(keys)
    made.keys.counts.copy_(flat.get("bottleneck.cluster_size", made.keys.counts))
    made.keys.sums.copy_(flat.get("bottleneck.keys_avg", made.keys.sums))
    made.used.copy_(flat.get("bottleneck.cluster_size_counter", torch.ones_like(made.used)))
    with torch.no_grad():
        made.values.copy_(values)
    return made


def _splitter(flat: Mapping[str, Tensor], books: int, dim: int) -> nn.Module:
    """What the file puts in front of its keys; a projection behind a random one is one with it."""
    random, learned = flat.get("splitter.rand_proj"), flat.get("splitter.proj.weight")
    inside = {name.removeprefix("vq.project_in."): t for name, t in flat.items() if name.startswith("vq.project_in.")}
    weight, bias = (inside.get(name, inside.get(f"0.{name}")) for name in ("weight", "bias"))
    if inside.keys() - {"weight", "bias", "0.weight", "0.bias"}:
        raise ValueError("this file normalises behind its projection, which no splitter here does.")
    if weight is not None:
        if random is not None:
            weight = weight.double() @ random.double().transpose(1, 2).reshape(-1, random.shape[1])
        made = LearnedProjection(weight.shape[1], books, dim, bias=bias is not None)
        made.proj.weight.data.copy_(weight.unflatten(0, (books, dim)).transpose(0, 1).flatten(0, 1))
        if bias is not None:
            made.proj.bias.data.copy_(bias.unflatten(0, (books, dim)).T.flatten())
        return made
    if random is not None:
        made = RandomProjection(random.shape[1], books, dim)
        made.weight.copy_(random)
        return made
    if learned is not None:
        made = LearnedProjection(learned.shape[1], books, dim)
        made.proj.weight.data.copy_(learned)
        return made
    return Chunk(books * dim, books)


def _read(found: Checkpoint, topk: int = 1) -> KeyValueBottleneck:
    """The bottleneck.

    Args:
        found: the authors' ``{"bottleneck", "splitter"}``, or a state of discrete-key-value-bottleneck-pytorch.
        topk: pairs that a query fetches, which the file does not tell.
    """
    return from_official(found.state, topk=topk)


PUBLISHED = Published(of="dkvb", marks=r"^(bottleneck\.)?keys$|^vq\._codebook\.embed$", make=_read)
