"""Does a claim hold? The bar stands in the catalog before anything is run; here it meets the measured values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.catalog import Claim


@dataclass(frozen=True)
class Verdict:
    """What came of a claim.

    Attributes:
        claim: the claim that was judged.
        values: the metric's value for every seed.
        mean: over seeds; ``nan`` if one of them is not finite.
        spread: sample standard deviation over seeds; 0 for a single seed.
        holds: whether the bar is cleared by the mean, or by every seed, as the claim's rule says.
    """

    claim: Claim
    values: Mapping[int, float]
    mean: float
    spread: float
    holds: bool

    def as_json(self) -> dict[str, Any]:
        """The verdict as it stands in ``results/claims/NAME.json``; values that are not finite become null."""
        return {
            "name": self.claim.name,
            "text": self.claim.text,
            "metric": self.claim.metric,
            "bar": self.claim.bar,
            "rule": self.claim.rule,
            "published": self.claim.published,
            "values": {str(seed): finite(value) for seed, value in self.values.items()},
            "mean": finite(self.mean),
            "spread": finite(self.spread),
            "holds": self.holds,
        }


def judge(claim: Claim, values: Mapping[int, float]) -> Verdict:
    """Compare a claim with the values that its metric took, one for every seed.

    Args:
        claim: what was claimed, with its bar and its rule.
        values: ``{seed: value}``. A value that is not a finite number never clears a bar.

    Raises:
        ValueError: there is no value to judge by.
    """
    if not values:
        raise ValueError(f"claim {claim.name!r} cannot be judged: no run recorded the metric {claim.metric!r}.")
    numbers = [float(value) for value in values.values()]
    sound = all(math.isfinite(number) for number in numbers)
    mean = statistics.fmean(numbers) if sound else math.nan
    spread = (statistics.stdev(numbers) if len(numbers) > 1 else 0.0) if sound else math.nan
    judged = [mean] if claim.rule == "mean" else numbers
    return Verdict(claim, dict(values), mean, spread, sound and all(_clears(claim, number) for number in judged))


def finite(value: float | None) -> float | None:
    """The value, or ``None`` where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def _clears(claim: Claim, value: float) -> bool:
    over = claim.at_least is None or value >= claim.at_least
    return over and (claim.at_most is None or value <= claim.at_most)
