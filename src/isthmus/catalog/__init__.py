"""The 52 systems as data: what each is, what its paper reports, what we claim of it, and whether it can be run.

Everything here is read from TOML, from the recipes' source and from ``results/``; nothing imports torch, so
``isthmus list`` and ``isthmus show`` answer at once.
"""

from isthmus.catalog.entries import PARTS, Claim, System, UnknownSystem, find, published, systems
from isthmus.catalog.readme import MARKS, markdown_table, update_readme
from isthmus.catalog.recipe import Setting, docstring, settings, told
from isthmus.catalog.results import figure_of, measured, results_folder, verdict_of

__all__ = [
    "MARKS",
    "PARTS",
    "Claim",
    "Setting",
    "System",
    "UnknownSystem",
    "docstring",
    "figure_of",
    "find",
    "markdown_table",
    "measured",
    "published",
    "results_folder",
    "settings",
    "systems",
    "told",
    "update_readme",
    "verdict_of",
]
