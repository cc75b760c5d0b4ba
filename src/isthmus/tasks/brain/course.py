"""When can what be decoded: ridges on windows that slide, and on windows that grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from isthmus.metrics.retrieval import columnwise_correlation
from isthmus.tasks.brain.trials import Trials, predict, ridges

WIDTH, STRIDE = 0.1, 0.05
FLOOR = 0.01
"""Correlations below this are noise; a ratio to them means nothing."""


class Course(NamedTuple):
    """Scores over time: the windows' spans, and for every kind of feature a mean correlation for each window."""

    spans: list[tuple[float, float]]
    scores: dict[str, list[float]]


def spans(times: Tensor, width: float, stride: float) -> list[tuple[float, float]]:
    """Windows of ``width`` seconds every ``stride`` that lie within the trial, one of them beginning at 0."""
    step = float(times[1] - times[0])
    first, last = float(times[0]), float(times[-1]) + step
    begin = -int((0 - first) / stride + 1e-6) * stride if first < 0 else first
    found = []
    while begin + width <= last + 1e-6:
        found.append((round(begin, 6), round(begin + width, 6)))
        begin += stride
    return found


def sliding(
    train: Trials, test: Trials, kinds: Mapping[str, str], width: float = WIDTH, stride: float = STRIDE
) -> Course:
    """An independent ridge on every window; score: mean over features of the correlation with the truth.

    Args:
        train, test: trials.
        kinds: name of a kind of feature → the attribute of :class:`Trials` that holds it.
    """
    windows = spans(train.times, width, stride)
    return Course(windows, _scores(train, test, kinds, windows))


def growing(train: Trials, test: Trials, kinds: Mapping[str, str], stride: float = 2 * STRIDE) -> Course:
    """The same on windows that begin with the trial and end later and later."""
    start = float(train.times[0])
    windows = [(start, stop) for _, stop in spans(train.times, stride, stride) if stop > 0]
    return Course(windows, _scores(train, test, kinds, windows))


def _scores(
    train: Trials, test: Trials, kinds: Mapping[str, str], windows: list[tuple[float, float]]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in kinds}
    trained = {name: getattr(train, of) for name, of in kinds.items()}
    true = torch.cat([getattr(test, of) for of in kinds.values()], 1)
    joined, widths = torch.cat(list(trained.values()), 1), [t.shape[1] for t in trained.values()]
    for span in windows:  # one factorisation serves all kinds
        predicted = predict(ridges(train, joined, span), test, span)
        for name, share in zip(kinds, columnwise_correlation(predicted, true).split(widths), strict=True):
            found[name].append(float(share.mean()))
    return found


def peaks(course: Course, onset: float, offset: float) -> dict[str, float]:
    """Where a sliding course of ``low`` and ``semantic`` peaks, and what it does before the onset and after the offset.

    Args:
        course: of :func:`sliding`.
        onset, offset: of the stimulus, seconds.

    Returns:
        ``low_peak`` and ``semantic_peak`` (centres of the best windows, seconds), ``before`` (largest magnitude in
        windows that end by the onset), ``bump`` (largest semantic score 0.1 to 0.3 s after the offset), ``trough``
        (smallest semantic score 0.05 to 0.1 s after the offset, at least :data:`FLOOR`).
    """
    centres = torch.tensor([(a + b) / 2 for a, b in course.spans])
    ends = torch.tensor([b for _, b in course.spans])
    low, semantic = (torch.tensor(course.scores[name]) for name in ("low", "semantic"))
    first = (centres > onset) & (centres < offset)
    after = (centres >= offset + 0.1 - 1e-6) & (centres <= offset + 0.3 + 1e-6)
    before = ends <= onset + 1e-6
    between = (centres >= offset + 0.05 - 1e-6) & (centres <= offset + 0.1 + 1e-6)
    return {
        "low_peak": float(centres[first][low[first].argmax()]),
        "semantic_peak": float(centres[first][semantic[first].argmax()]),
        "before": float(torch.stack([low[before], semantic[before]]).abs().max()),
        "bump": float(semantic[after].max()),
        "trough": max(FLOOR, float(semantic[between].min())),
    }


def draw(course: Course, grown: Course | None, offset: float | None = None) -> Figure:
    """Sliding scores as lines over the centres of their windows, growing ones dotted over their ends.

    ``offset`` is when the stimulus ended, where that is known, seconds.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    centres = [(a + b) / 2 for a, b in course.spans]
    for number, (name, values) in enumerate(course.scores.items()):
        axis.plot(centres, values, color=f"C{number}", label=f"{name}, sliding")
        if grown is not None:
            ends = [b for _, b in grown.spans]
            axis.plot(ends, grown.scores[name], ":", color=f"C{number}", label=f"{name}, growing")
    for moment in (0.0, offset):
        if moment is not None and centres[0] <= moment <= centres[-1]:
            axis.axvline(moment, color="tab:gray", linewidth=0.8)
    axis.axhline(0, color="tab:gray", linewidth=0.8)
    axis.set_xlabel("seconds from the onset")
    axis.set_ylabel("correlation with the truth")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure
