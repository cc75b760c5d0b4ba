"""One file a paper: `Config`, `run()`, `apply()`; the only place that knows about everything.

Importing this package imports no recipe and no torch; :func:`load` imports the one that is asked for.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from isthmus import catalog
from isthmus.errors import UserError


def names() -> list[str]:
    """The systems that have a recipe, in the order of their numbers."""
    return [system.name for system in catalog.systems() if system.ready]


def load(name: str) -> ModuleType:
    """Import the recipe of a system, given by name, number or slug.

    Raises:
        UnknownSystem: no system is called that.
        UserError: the system is in the catalog but has no recipe yet.
    """
    system = catalog.find(name)
    if not system.ready:
        raise UserError(f"{system.name} has no recipe yet; `isthmus list --ready` shows the systems that have one.")
    return importlib.import_module(f"{__name__}.{system.module}")
