"""What a person can mend, and the packages that come with an extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from isthmus.errors import UserError as UserError


def extra(module: str, name: str) -> ModuleType:
    """Import an optional package that comes with the extra ``name``: ``extra("constriction", "coding")``.

    Raises:
        UserError: it is not installed; the sentence says what to type.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        package = module.partition(".")[0]
        raise UserError(f"this needs the package {package}: pip install 'isthmus[{name}]'.") from error
