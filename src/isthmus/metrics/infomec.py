"""InfoMEC: are latents modular, explicit, compact? (Hsu et al., arXiv 2305.18378, section 4)

    from isthmus.metrics.infomec import infomec
    scores = infomec(sources, latents, discrete=True)      # (n, S) true causes, (n, L) latents
    print(scores.infom, scores.infoe, scores.infoc)

InfoM (modularity): every latent tells of one source. InfoE (explicitness): sources can be read off linearly. InfoC
(compactness): every source is told by one latent. 1 is best, 0 is chance. Sources are categories; latents are either
discrete, where mutual information is that of the table of counts, or continuous, where it is estimated from nearest
neighbours (Ross 2014; ``metrics/mutual_information.py``). The readers of InfoE are in ``metrics/explicitness.py``; as
published, they read all latents, active or not.

Cases that the paper leaves open: a constant source is left out; a latent that varies and tells of nothing adds 0 to
the mean of InfoM (its preference is even), and so does a source that nothing tells of to InfoC; without an active
latent all three are 0; InfoM of one source and InfoC of one active latent are NaN, because nothing can be mixed up.
All of these are told in ``notes`` and as warnings.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from isthmus.metrics.explicitness import explained_variance, explicitness
from isthmus.metrics.mutual_information import binned, codes, nmi_continuous, nmi_discrete

__all__ = [
    "InfoMEC",
    "active_latents",
    "binned",
    "compactness",
    "dci_completeness",
    "dci_disentanglement",
    "explained_variance",
    "explicitness",
    "gini",
    "infomec",
    "modularity",
    "nmi_continuous",
    "nmi_discrete",
]

Array = np.ndarray | Tensor
Rule = Literal["range", "range8", "iqr"]
Form = Literal["ratio", "gap"]


@dataclass(frozen=True)
class InfoMEC:
    """The three scores and what they come from.

    Attributes:
        infom, infoe, infoc: modularity, explicitness, compactness.
        nmi: ``(S, L)``, mutual information over the source's entropy; NaN for constant sources.
        active: bool ``(L,)``, latents that vary enough to count.
        varies: bool ``(S,)``, sources with more than one value.
        notes: a sentence for every case above that was met.
    """

    infom: float
    infoe: float
    infoc: float
    nmi: np.ndarray
    active: np.ndarray
    varies: np.ndarray
    notes: tuple[str, ...] = ()


def infomec(
    sources: Array,
    latents: Array,
    discrete: bool,
    *,
    rule: Rule = "range",
    form: Form = "ratio",
    neighbours: int = 10,
    steps: int | None = 100,
    source_bins: int | None = None,
    seed: int = 0,
) -> InfoMEC:
    """All three scores.

    Args:
        sources: ``(n, S)`` true causes, any numbers, taken as categories.
        latents: ``(n, L)``; discrete ones best as indices. Values of floats that rounding alone parts count as one.
        discrete: whether latents take few values.
        rule: which latents are active, see :func:`active_latents`.
        form: of InfoM and InfoC, see :func:`modularity`.
        neighbours: of the estimate for continuous latents.
        steps: of the optimiser behind InfoE, 100 as published; ``None`` goes on until it has converged.
        source_bins: cut continuous sources into so many bins of equal width for InfoM and InfoC; InfoE is then the
            explained variance of a linear regression on the uncut sources.
        seed: of the noise that parts equal values of continuous latents.

    Raises:
        ValueError: arrays of other shapes, NaN, no varying source, fewer samples than neighbours, or discrete latents
            nearly all of whose values differ.
    """
    s, z = _checked(sources, "sources"), _checked(latents, "latents")
    if len(s) != len(z):
        raise ValueError(f"sources and latents must be of the same samples, got {len(s)} and {len(z)}.")
    if discrete:
        _check_discrete(z)
    if neighbours < 1 or (steps is not None and steps < 1) or (source_bins is not None and source_bins < 2):
        raise ValueError(
            f"neighbours and steps must be 1 or more, source_bins 2 or more, got {neighbours}, {steps}, {source_bins}."
        )
    notes: list[str] = []
    numbers = binned(s, source_bins) if source_bins else codes(s)
    varies = numbers.max(0) > 0
    if not varies.any():
        raise ValueError("no source varies; give samples in which at least one has several values.")
    if not varies.all():
        notes.append(f"sources {np.flatnonzero(~varies).tolist()} are constant and left out")
    active = active_latents(z, discrete, rule)
    nmi = np.full((s.shape[1], z.shape[1]), np.nan)
    kept = numbers[:, varies]
    nmi[varies] = nmi_discrete(kept, z) if discrete else nmi_continuous(kept, z, neighbours, seed)
    if not active.any():
        notes.append("no latent is active; all scores are 0")
        return _told(InfoMEC(0.0, 0.0, 0.0, nmi, active, varies, tuple(notes)))
    told = nmi[varies][:, active]
    if (told.sum(0) == 0).any():
        notes.append(f"{int((told.sum(0) == 0).sum())} active latents tell of no source and count 0 in InfoM")
    if (told.sum(1) == 0).any():
        notes.append(f"{int((told.sum(1) == 0).sum())} sources are told by no latent and count 0 in InfoC")
    infom, infoc = modularity(nmi[varies], active, form), compactness(nmi[varies], active, form)
    if np.isnan(infom):
        notes.append("there is one source, so InfoM is undefined")
    if np.isnan(infoc):
        notes.append("there is one active latent, so InfoC is undefined")
    infoe = explained_variance(s[:, varies], z) if source_bins else explicitness(kept, z, discrete, steps)
    return _told(InfoMEC(infom, infoe, infoc, nmi, active, varies, tuple(notes)))


def active_latents(latents: Array, discrete: bool, rule: Rule = "range") -> np.ndarray:
    """Which latents vary enough to count, bool ``(L,)``.

    Args:
        latents: ``(n, L)``.
        discrete: whether they take few values.
        rule: ``range``, as published: a range above 0, or above a twentieth of the largest for continuous latents;
            ``range8``, of the code before: above an eighth of the largest for both; ``iqr``, of the code after (arXiv
            2404.10282): an inter-quartile range above 0.1, or above a tenth of the largest for continuous latents.

    Raises:
        ValueError: an unknown rule.
    """
    z = _checked(latents, "latents")
    if rule == "iqr":
        upper, lower = np.percentile(z, (75, 25), axis=0)
        width, bound = upper - lower, 0.1 if discrete else (upper - lower).max() / 10
    elif rule in ("range", "range8"):
        width = z.max(0) - z.min(0)
        if discrete:
            width = np.where(codes(z).max(0) > 0, width, 0.0)
        bound = width.max() / 8 if rule == "range8" else 0.0 if discrete else width.max() / 20
    else:
        raise ValueError(f"the rule of active latents is range, range8 or iqr, got {rule!r}.")
    return width > bound


def modularity(nmi: np.ndarray, active: np.ndarray, form: Form = "ratio") -> float:
    """InfoM from ``(S, L)``: how much of what a latent tells is of one source, rescaled so that chance is 0.

    Args:
        nmi: normalised mutual information.
        active: bool ``(L,)``.
        form: ``ratio`` of the largest to the sum; or ``gap``, the largest minus the second, without rescaling.
    """
    return _concentrated(nmi[:, active], form)


def compactness(nmi: np.ndarray, active: np.ndarray, form: Form = "ratio") -> float:
    """InfoC from ``(S, L)``: how much of what is told of a source comes from one latent; as :func:`modularity`."""
    return _concentrated(nmi[:, active].T, form)


def _concentrated(columns: np.ndarray, form: Form) -> float:
    """Mean over columns of how much stands in their largest entry."""
    count = columns.shape[0]
    if columns.size == 0:
        return 0.0
    if count < 2:
        return float("nan")
    if form == "gap":
        ordered = np.sort(columns, 0)
        return float((ordered[-1] - ordered[-2]).mean())
    if form != "ratio":
        raise ValueError(f"the form is ratio or gap, got {form!r}.")
    total = columns.sum(0)
    share = np.where(total > 0, columns.max(0) / np.where(total > 0, total, 1), 1 / count)
    return float((share.mean() - 1 / count) / (1 - 1 / count))


# ------------------------------------------------------------------------------------- reductions of other measures


def dci_disentanglement(importance: np.ndarray) -> float:
    """D of DCI from importances ``(L, S)``: 1 - entropy of every latent's row, weighted by the row's sum."""
    return _pure(np.asarray(importance, np.float64))


def dci_completeness(importance: np.ndarray) -> float:
    """C of DCI from importances ``(L, S)``: 1 - entropy of every source's column, weighted by the column's sum."""
    return _pure(np.asarray(importance, np.float64).T)


def _pure(rows: np.ndarray) -> float:
    share = rows + 1e-11
    share = share / share.sum(1, keepdims=True)
    purity = 1 + (share * np.log(share)).sum(1) / np.log(rows.shape[1])
    weight = rows.sum(1) / rows.sum() if rows.sum() else np.full(len(rows), 1 / len(rows))
    return float((purity * weight).sum())


def gini(rows: np.ndarray) -> np.ndarray:
    """Gini coefficient of every row of ``(S, L)``, over its largest possible value: 0 even, 1 all in one entry."""
    ordered = np.sort(np.asarray(rows, np.float64), 1)
    count = ordered.shape[1]
    rank = np.arange(1, count + 1)
    return ((2 * rank - count - 1) * ordered).sum(1) / (count * ordered.sum(1)) * count / (count - 1)


# -------------------------------------------------------------------------------------------------------------- checks


def _checked(values: Any, what: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    array = array.astype(np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{what} must have a row a sample and a column each, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{what} hold NaN or infinite values, first in row {int(np.argwhere(~np.isfinite(array))[0, 0])}."
        )
    return array


def _check_discrete(z: np.ndarray) -> None:
    distinct = codes(z).max(0) + 1
    if len(z) > 20 and distinct.max() > len(z) / 2:
        raise ValueError(
            f"latent {int(distinct.argmax())} takes {int(distinct.max())} values in {len(z)} samples, so a table of "
            "counts tells nothing; give discrete=False."
        )


def _told(scores: InfoMEC) -> InfoMEC:
    for note in scores.notes:
        warnings.warn(f"InfoMEC: {note}.", stacklevel=3)
    return scores
