"""Which filters go: one list over all layers, lowest scores first, with a floor under every layer.

Yeom et al. (arXiv 1912.08881) rank globally, because relevance is on one scale in all layers; their code has no floor,
so that it can empty a layer, which it then cannot cut. Ties go by the order of layers, then of filters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def lowest(
    scores: Mapping[str, Tensor], number: int, floor: int | float = 1, equal: bool = False
) -> list[tuple[str, int]]:
    """The ``number`` filters of least score as ``(layer, filter)``, in ascending order.

    Args:
        scores: layer → ``(filters,)``.
        number: how many go.
        floor: filters that stay in every layer at least, a number or a share below 1.
        equal: take the same share of every layer instead of ranking them together.

    Raises:
        ValueError: more than the floor lets go, or scores that are not finite.
    """
    names = list(scores)
    picked = choose([scores[name] for name in names], [1] * len(names), number, floor, equal)
    return [(names[group], unit) for group, unit in picked]


def choose(
    scores: Sequence[Tensor],
    costs: Sequence[int],
    number: int,
    floor: int | float | Sequence[int] = 1,
    equal: bool = False,
) -> list[tuple[int, int]]:
    """Units ``(group, unit)`` of least score whose costs add up to ``number``, or a little more.

    Args:
        scores: of every group's units.
        costs: filters that a unit of a group takes with it.
        number: filters to remove.
        floor: as in :func:`lowest`, of units; or one number for each group.
        equal: as in :func:`lowest`.

    Raises:
        ValueError: as in :func:`lowest`.
    """
    for score in scores:
        if score.ndim != 1 or not torch.isfinite(score).all():
            raise ValueError("scores must be one finite number a filter.")
    floors = [kept(len(s), floor) for s in scores] if isinstance(floor, int | float) else list(floor)
    spare = [max(0, len(score) - least) for score, least in zip(scores, floors, strict=True)]
    most = sum(s * c for s, c in zip(spare, costs, strict=True))
    if number < 0 or number > most:
        raise ValueError(
            f"{number} filters were asked to go, {most} can, because every layer keeps its floor; keep more filters, "
            "or lower the floor."
        )
    if equal:
        total = sum(len(score) * c for score, c in zip(scores, costs, strict=True))
        spare = [min(s, math.ceil(len(score) * number / total)) for s, score in zip(spare, scores, strict=True)]
        if sum(s * c for s, c in zip(spare, costs, strict=True)) < number:  # floors held some back
            return choose(scores, costs, number, floor)
        ranked = [
            (rank / max(1, len(score)), group, int(unit))
            for group, score in enumerate(scores)
            for rank, unit in enumerate(score.cpu().argsort(stable=True))
        ]
    else:
        ranked = [
            (value, group, unit) for group, score in enumerate(scores) for unit, value in enumerate(score.tolist())
        ]
    picked: list[tuple[int, int]] = []
    removed = 0
    for _, group, unit in sorted(ranked):
        if removed >= number:
            break
        if spare[group]:
            spare[group] -= 1
            removed += costs[group]
            picked.append((group, unit))
    return picked


def kept(units: int, floor: int | float) -> int:
    """Units that have to stay.

    Raises:
        ValueError: a floor below zero.
    """
    if floor < 0:
        raise ValueError(f"the floor must be 0 or more filters, or a share below 1, got {floor}.")
    return math.ceil(floor * units - 1e-9) if floor < 1 else min(units, int(floor))


def one_at_a_time(plan: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The same filters for removal one by one: each index counts what went from its layer before.

    Layers come in the order in which the plan first names them, the filters of a layer in ascending order.
    """
    layers = dict.fromkeys(layer for layer, _ in plan)
    return [
        (layer, unit - before)
        for layer in layers
        for before, unit in enumerate(sorted(unit for name, unit in plan if name == layer))
    ]
