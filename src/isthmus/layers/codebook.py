"""Codebooks: the nearest codes of many vectors, k-means, and codes that follow a moving average of what they win.

``index, score = nearest(x, codes)`` never holds all distances at once: 256 codebooks of 4,096 codes and 256 vectors for
each take a few megabytes. ``centres, index = kmeans(x, 512)`` runs one problem or many side by side. Keys of the
discrete key-value bottleneck (arXiv 2207.11240, section 3), image tokenizers (VQ-VAE, arXiv 1711.00937, appendix A.1)
and learned weight codebooks are all made of these.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, NonNegative, Share, checked
from isthmus.codec import part

Metric = Literal["euclidean", "dot", "cosine"]


@torch.no_grad()
def nearest(
    x: Tensor,
    codes: Tensor,
    topk: int | None = None,
    metric: Metric = "euclidean",
    valid: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes that fit every vector best; the lowest index where several fit alike.

    Half precision is computed in float32, under autocast too. Euclidean scores are found with the product
    2 q·k - |k|² around the mean of the codes, and those returned are computed anew from q - k. No gradient passes.

    Args:
        x: vectors ``(…, N, D)``.
        codes: ``(…, K, D)``; leading dimensions broadcast against those of ``x``.
        topk: how many codes for every vector, best first; ``None`` is one, without a dimension for it.
        metric: ``euclidean`` (the score is minus the squared distance), ``dot`` or ``cosine``.
        valid: ``(…, K)`` True where a code may be chosen. Where too few may be, the score is -inf and the index 0.
        chunk: scores held at once; by default what fits a core's cache, and 128 MiB on other devices.

    Returns:
        index: int64 ``(…, N)``, or ``(…, N, topk)``.
        score: likewise, larger is nearer, in float32 (float64 where both are).

    Raises:
        ValueError: shapes that do not fit, an unknown metric, or more codes wanted than there are.
    """
    count = 1 if topk is None else topk
    _check(x, codes, count, metric, valid)
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    if codes.ndim == 2 and (valid is None or valid.ndim == 1):  # one codebook for all: one long list of vectors
        lead, n = x.shape[:-2], x.shape[-2]
        x, codes, valid = x.reshape(1, -1, x.shape[-1]), codes[None], None if valid is None else valid[None]
    else:
        others = () if valid is None else (valid.shape[:-1],)
        lead, n = torch.broadcast_shapes(x.shape[:-2], codes.shape[:-2], *others), x.shape[-2]
        x, codes = (t.expand(*lead, *t.shape[-2:]).flatten(0, -3) for t in (x, codes))
        valid = None if valid is None else valid.expand(*lead, valid.shape[-1]).flatten(0, -2)
    with torch.autocast(x.device.type, enabled=False):
        codes = codes.to(dtype)
        if metric == "cosine":
            codes = F.normalize(codes, dim=-1)
        index, found = _search(x, codes, count, metric, valid, dtype, chunk)
        score = _score(x, codes, index, metric, dtype)
        score = score if found is None else score.masked_fill(~found, -math.inf)
    index, score = index.reshape(*lead, n, count), score.reshape(*lead, n, count)
    return (index, score) if topk is not None else (index[..., 0], score[..., 0])


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    steps: int = 10,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, one problem for every leading index; a centre that wins nothing stays where it is.

    Args:
        x: vectors ``(…, N, D)``; half precision is computed in float32.
        k: centres.
        steps: at most so many rounds of assigning and averaging; fewer where nothing changes any more.
        weight: ``(…, N)`` not negative; what every vector counts, in the averages and in the choice of the start.
        generator: draws the start, vectors without repeats (with, where there are fewer than ``k``).
        start: ``(…, k, D)`` first centres in place of drawn ones.

    Returns:
        centres: ``(…, k, D)`` float32 (float64 for such vectors).
        index: int64 ``(…, N)``, the nearest of these centres.

    Raises:
        ValueError: no vectors, NaN or infinity among them, or shapes that do not fit.
    """
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"kmeans wants vectors (…, N, D) with N of 1 or more, got {tuple(x.shape)}.")
    if k < 1 or steps < 0:
        raise ValueError(f"kmeans wants k of 1 or more and steps of 0 or more, got k={k} and steps={steps}.")
    if weight is not None and (weight.shape != x.shape[:-1] or not bool((weight >= 0).all())):
        raise ValueError(f"weight must be (…, N) = {tuple(x.shape[:-1])} and not negative, got {tuple(weight.shape)}.")
    check_finite(x, "kmeans")
    lead, (n, dim) = x.shape[:-2], x.shape[-2:]
    flat = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, n, dim)
    share = None if weight is None else weight.to(flat).reshape(-1, n)
    if start is None:
        chosen = _draw(flat, k, share, generator)
        centres = flat.gather(1, chosen[..., None].expand(-1, -1, dim))
    elif start.shape == (*lead, k, dim):
        centres = start.to(flat).reshape(-1, k, dim)
    else:
        raise ValueError(f"start must be (…, k, D) = {(*lead, k, dim)}, got {tuple(start.shape)}.")
    index = nearest(flat, centres)[0]
    for _ in range(steps):
        counts, sums = tally(flat, index, k, share)
        centres = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp_min(1e-30), centres)
        before, index = index, nearest(flat, centres)[0]
        if torch.equal(before, index):
            break
    return centres.reshape(*lead, k, dim), index.reshape(*lead, n)


def tally(x: Tensor, index: Tensor, size: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many vectors chose each code, and their sum.

    Args:
        x: ``(G, N, D)``.
        index: ``(G, N)``, the code that each chose.
        size: number of codes K.
        weight: ``(G, N)``; 1 without it.

    Returns:
        counts: ``(G, K)``.
        sums: ``(G, K, D)``.
    """
    groups, n, dim = x.shape
    place = (index + torch.arange(groups, device=x.device)[:, None] * size).reshape(-1)
    ones = x.new_ones(groups * n) if weight is None else weight.reshape(-1)
    counts = x.new_zeros(groups * size).index_add_(0, place, ones)
    weighted = x if weight is None else x * weight[..., None]
    sums = x.new_zeros(groups * size, dim).index_add_(0, place, weighted.reshape(-1, dim))
    return counts.view(groups, size), sums.view(groups, size, dim)


def check_finite(x: Tensor, whose: str) -> None:
    """Refuse vectors with NaN or infinity among them.

    Raises:
        ValueError: there are some; the sentence says how many.
    """
    if not bool(torch.isfinite(x.sum())) and (bad := int((~torch.isfinite(x)).sum())):
        raise ValueError(
            f"{whose} got {bad} values that are NaN or infinite, among {x.numel()}; look at what made them."
        )


@part
@checked
class EMACodebook(nn.Module):
    """Codes that move to the average of the vectors they win, without gradients (VQ-VAE, appendix A.1).

    With n the vectors that chose a code and s their sum, a step does

        counts ← d·counts + (1-d)·n,    sums ← d·sums + (1-d)·s,    codes = sums / smoothed counts,

    smoothed as (counts + ε) / (Σ counts + Kε) · Σ counts. Then codes whose count is below ``threshold`` are put on
    random vectors of the batch. With several processes, counts and sums are added over them.

    Args:
        size: codes K.
        dim: numbers D in a code.
        groups: so many codebooks side by side, ``(groups, K, D)``; ``None`` for a single ``(K, D)``.
        decay: d.
        eps: ε.
        threshold: moving average of the vectors a step that a code has to win to stay; 0 keeps all.
        revive: ``whole`` gives a code that was put elsewhere sums and counts to match; ``released`` moves the code
            alone, so that it falls back with the next step, as the key-value bottleneck's published code does.
        metric: as for :func:`nearest`.

    Attributes:
        codes: buffer ``(groups, K, D)`` or ``(K, D)``, float32; standard normal at first.
        sums, counts: the moving averages behind them.
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        size: Count,
        dim: Count,
        groups: Count | None = None,
        decay: Share = 0.99,
        eps: NonNegative = 1e-5,
        threshold: NonNegative = 0.0,
        revive: Literal["whole", "released"] = "whole",
        metric: Metric = "euclidean",
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}.")
        self.decay, self.eps, self.threshold, self.revive = decay, eps, threshold, revive
        self.metric: Metric = metric
        lead = (size,) if groups is None else (groups, size)
        self.register_buffer("codes", torch.randn(*lead, dim))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("counts", torch.ones(lead))

    def forward(self, x: Tensor, topk: int | None = None, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(…, N, D)`` to the index and score of :func:`nearest`."""
        return nearest(x, self.codes, topk, self.metric, valid)

    @torch.no_grad()
    def place(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Put the codes somewhere, with sums to match.

        Args:
            codes: of the shape of ``codes``.
            counts: what each has won so far; 1 without it.
        """
        self.codes.copy_(codes)
        self.counts.copy_(torch.ones_like(self.counts) if counts is None else counts)
        self.sums.copy_(self.codes * self.counts[..., None])

    @torch.no_grad()
    def start(self, x: Tensor, steps: int = 0, generator: torch.Generator | None = None) -> None:
        """Put the codes on vectors drawn from ``x``, or on their centres after so many steps of k-means.

        Args:
            x: ``(groups, N, D)``, or ``(N, D)`` for a single codebook.
            steps: of k-means.
            generator: of the draw.
        """
        x = self._grouped(x)
        centres, index = kmeans(x, self.codes.shape[-2], steps, generator=generator)
        centres, counts = centres.view_as(self.codes), None
        if steps:
            counts = tally(x, index, self.codes.shape[-2])[0].view_as(self.counts)
        if several_processes():
            torch.distributed.broadcast(centres, 0)
            if counts is not None:
                torch.distributed.broadcast(counts, 0)
        self.place(centres, counts)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        replacement: Tensor | None = None,
        threshold: float | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """One step of the moving average.

        Args:
            x: ``(groups, N, D)``, or ``(N, D)`` for a single codebook.
            generator: draws the vectors that dead codes are put on, with replacement.
            replacement: of the shape of ``codes``, in place of drawn ones.
            threshold: for this step, in place of the codebook's own.
            index: the code of every vector where it was looked up already, as returned.

        Returns:
            ``(groups, N)`` or ``(N,)``, the code that every vector chose before the step.

        Raises:
            ValueError: NaN or infinity among the vectors, or another shape.
        """
        check_finite(x, "the codebook")
        vectors, size = self._grouped(x), self.codes.shape[-2]
        if index is None:
            index = nearest(vectors, self.codes.view(len(vectors), size, -1), metric=self.metric)[0]
        index = index.reshape(vectors.shape[:2])
        counts, sums = tally(vectors, index, size)
        counts, sums = counts.view_as(self.counts), sums.view_as(self.sums)
        if several_processes():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum(-1, keepdim=True)
        smoothed = (self.counts + self.eps) / (total + size * self.eps) * total
        self.codes.copy_(self.sums / smoothed[..., None].clamp_min(1e-30))
        threshold = self.threshold if threshold is None else threshold
        if threshold > 0:
            self._replace(vectors, generator, replacement, threshold)
        return index.view(*self.codes.shape[:-2], -1)

    def _replace(
        self, x: Tensor, generator: torch.Generator | None, replacement: Tensor | None, threshold: float
    ) -> None:
        """Put codes that win too little on random vectors."""
        dead = (self.counts < threshold)[..., None]
        if replacement is None:
            groups, n, dim = x.shape
            drawn = torch.randint(n, (groups, self.codes.shape[-2]), generator=generator).to(x.device)
            replacement = x.gather(1, drawn[..., None].expand(-1, -1, dim))
            if several_processes():
                torch.distributed.broadcast(replacement, 0)
        self.codes.copy_(torch.where(dead, replacement.view_as(self.codes), self.codes))
        if self.revive == "whole":
            self.counts.copy_(torch.where(dead[..., 0], threshold, self.counts))
            self.sums.copy_(torch.where(dead, self.codes * threshold, self.sums))

    def _grouped(self, x: Tensor) -> Tensor:
        """``(groups, N, D)`` in the dtype of the codes."""
        wanted = self.codes.shape
        if x.ndim != len(wanted) or x.shape[-1] != wanted[-1] or x.shape[:-2] != wanted[:-2] or not x.shape[-2]:
            told = ", ".join([*map(str, wanted[:-2]), "N", str(wanted[-1])])
            raise ValueError(f"this codebook learns from vectors ({told}), got {tuple(x.shape)}.")
        return x.to(self.codes.dtype).reshape(-1, *x.shape[-2:])


# ------------------------------------------------------------------------------------------------------------ search


def _search(
    x: Tensor, codes: Tensor, count: int, metric: Metric, valid: Tensor | None, dtype: torch.dtype, chunk: int | None
) -> tuple[Tensor, Tensor | None]:
    """Best codes of ``x (G, N, D)`` among ``codes (G, K, D)``: index ``(G, N, count)``, and with ``valid`` if any.

    Every code becomes a row (k, -|k|²/2), so that one product with the columns (q, 1) orders the codes of a query as
    their distances do. Codes stand in blocks: a pass without indices finds the best of each block, and only one block
    is looked at again. Everything is done for as few codebooks and queries at a time as fit the cache.
    """
    groups, n, _ = x.shape
    size = codes.shape[1]
    block = 1 << (size.bit_length() // 2) if size >= 64 else size  # about the root: two short searches
    length = size + -size % block
    if chunk is None:
        chunk = 2**18 * min(torch.get_num_threads(), 8) if x.device.type == "cpu" else 2**25
    columns = max(1, min(n, max(16, chunk // length)))
    together = max(1, min(groups, chunk // (length * columns)))
    index = torch.empty(groups, count, n, dtype=torch.int64, device=x.device)
    found = None if valid is None else torch.empty(index.shape, dtype=torch.bool, device=x.device)
    scores = x.new_empty(0, dtype=dtype)
    for g in range(0, groups, together):
        some = slice(g, g + together)
        rows, centre = _rows(codes[some], length, metric, None if valid is None else valid[some])
        for i in range(0, n, columns):
            where = (some, slice(None), slice(i, i + columns))
            query = x[some, i : i + columns].to(dtype)
            query = F.pad(query if centre is None else query - centre, (0, 1), value=1.0).transpose(1, 2)
            if query.numel() * length <= 2**16:  # kernels of tiny products round equal rows differently
                scores = (rows[:, :, :, None] * query[:, None]).sum(2)
            else:
                shape = (len(rows), length, query.shape[2])
                scores = scores if scores.shape == shape else scores.new_empty(shape)
                torch.bmm(rows, query, out=scores)
            for j, (best, place) in enumerate(_best(scores.unflatten(1, (-1, block)), count)):
                index[where][:, j] = place
                if found is not None:
                    found[where][:, j] = best > -math.inf
    if found is not None:
        index.masked_fill_(~found, 0)
        found = found.transpose(1, 2)
    return index.transpose(1, 2), found


def _rows(codes: Tensor, length: int, metric: Metric, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows ``(G, length, D + 1)`` that score ``(G, K, D)``, those too many with -inf; and what to take off queries."""
    groups, size, dim = codes.shape
    rows = codes.new_empty(groups, length, dim + 1)
    centre = None
    if metric == "euclidean":
        centre = codes.mean(1, keepdim=True)
        torch.sub(codes, centre, out=rows[:, :size, :dim])
        rows[:, :size, dim] = rows[:, :size, :dim].square().sum(-1).mul_(-0.5)
    else:
        rows[:, :size, :dim] = codes
        rows[:, :size, dim] = 0
    rows[:, size:, :dim] = 0
    rows[:, size:, dim] = -math.inf
    if valid is not None:
        rows[:, :size, dim].masked_fill_(~valid, -math.inf)
    return rows, centre


def _best(scores: Tensor, count: int):
    """Best, second best … of ``(G, blocks, block, N)`` over the two middle dimensions, each as value and place."""
    groups, blocks, block, n = scores.shape
    tops = scores.amax(2)
    for j in range(count):
        value, which = tops.max(1, keepdim=True)
        if blocks == 1:
            inside = scores[:, 0]
        else:
            inside = scores.gather(1, which[:, :, None].expand(groups, 1, block, n))[:, 0]
        place = inside.max(1, keepdim=True)[1]
        yield value[:, 0], (which * block + place)[:, 0]
        if j + 1 < count:
            scores.scatter_(
                1, which[:, :, None].expand(groups, 1, block, n), inside.scatter(1, place, -math.inf)[:, None]
            )
            tops.scatter_(1, which, inside.scatter(1, place, -math.inf).amax(1, keepdim=True))


def _score(x: Tensor, codes: Tensor, index: Tensor, metric: Metric, dtype: torch.dtype) -> Tensor:
    """Scores of the chosen codes, ``(G, N, count)``, without the rounding of the expanded square."""
    groups, n, count = index.shape
    chosen = codes.gather(1, index.reshape(groups, -1, 1).expand(-1, -1, codes.shape[-1])).view(
        groups, n, count, codes.shape[-1]
    )
    query = x.to(dtype)[:, :, None]
    if metric == "euclidean":
        return -(query - chosen).square().sum(-1)
    return ((F.normalize(query, dim=-1) if metric == "cosine" else query) * chosen).sum(-1)


def _check(x: Tensor, codes: Tensor, count: int, metric: str, valid: Tensor | None) -> None:
    if metric not in get_args(Metric):
        raise ValueError(f"metric is one of {', '.join(get_args(Metric))}, got {metric!r}.")
    if x.ndim < 2 or codes.ndim < 2 or x.shape[-1] != codes.shape[-1]:
        raise ValueError(
            f"nearest wants vectors (…, N, D) and codes (…, K, D) of one D, got {tuple(x.shape)} and "
            f"{tuple(codes.shape)}."
        )
    if not (x.is_floating_point() and codes.is_floating_point()):
        raise ValueError(f"nearest wants floating-point numbers, got {x.dtype} and {codes.dtype}.")
    if not 1 <= count <= codes.shape[-2]:
        raise ValueError(f"topk must lie between 1 and the {codes.shape[-2]} codes, got {count}.")
    if valid is not None and (valid.dtype != torch.bool or valid.shape[-1:] != codes.shape[-2:-1]):
        raise ValueError(f"valid must be booleans (…, {codes.shape[-2]}), got {valid.dtype} {tuple(valid.shape)}.")


def _draw(x: Tensor, k: int, weight: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Numbers of vectors to start on, ``(G, k)``: without repeats where there are enough."""
    groups, n, _ = x.shape
    share = torch.ones(groups, n) if weight is None else weight.cpu().float()
    if not bool((share.sum(-1) > 0).all()):
        raise ValueError("all weights of a problem are 0; give at least one vector some weight.")
    repeats = int((share > 0).sum(-1).min()) < k
    # The largest of u^(1/w) are a draw without repeats by weight (Efraimidis and Spirakis); no limit on n.
    if repeats:
        return torch.multinomial(share, k, replacement=True, generator=generator).to(x.device)
    noise = -torch.rand(groups, n, generator=generator).clamp_min(1e-30).log() / share
    return noise.topk(k, largest=False).indices.to(x.device)


def several_processes() -> bool:
    """Whether several processes share the work."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
