"""What was measured before: the verdict files in ``results/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isthmus.catalog.entries import Claim, System
from isthmus.errors import UserError


def results_folder() -> Path:
    """Where measured results are read from: ``./results`` if it is one of ours, else what came with the package."""
    package = Path(__file__).parents[1]
    for folder in (Path("results"), package / "_results", package.parents[1] / "results"):
        if (folder / "claims").is_dir():
            return folder
    return Path("results")


def measured(system: System, results: Path | None = None) -> dict[str, Any] | None:
    """The newest verdict file of a system (its form is in ``cli/claiming.py``); ``None`` where nothing was measured.

    Raises:
        UserError: the file is not JSON of the known form.
    """
    path = (results or results_folder()) / "claims" / f"{system.name}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); measure it again or restore it.") from error
    if not isinstance(found, dict) or found.get("format") != "isthmus-claims":
        raise UserError(f"{path} was not written by `isthmus claim`; move it away.")
    return found


def verdict_of(claim: Claim, record: dict[str, Any] | None) -> bool | None:
    """Whether a claim was found to hold; ``None`` if it was not measured, or had another bar when it was."""
    for verdict in (record or {}).get("verdicts", ()):
        if verdict["name"] == claim.name and (verdict["metric"], verdict["bar"], verdict["rule"]) == (
            claim.metric,
            claim.bar,
            claim.rule,
        ):
            return verdict["holds"]
    return None


def figure_of(verdict: dict[str, Any]) -> str:
    """Mean and spread over seeds as people read them."""
    if verdict["mean"] is None:
        return "not finite"
    return (
        f"{verdict['mean']:.4g} ± {verdict['spread']:.2g}" if len(verdict["values"]) > 1 else f"{verdict['mean']:.4g}"
    )
