"""One training loop, checkpoints, resume, distribution.

``Run`` is a run's folder, devices and seed, ``Training`` a phase's settings, :func:`isthmus.engine.fit.fit` the loop.
The names below are imported when they are first used, because ``RunOptions`` alone needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.engine.fit import FitResult
    from isthmus.engine.folder import read_config
    from isthmus.engine.guard import Diverged, Interrupted
    from isthmus.engine.options import RunOptions
    from isthmus.engine.run import Run
    from isthmus.engine.training import Training

_HOMES = {
    "Diverged": "guard",
    "FitResult": "fit",
    "Interrupted": "guard",
    "Run": "run",
    "RunOptions": "options",
    "Training": "training",
    "read_config": "folder",
}

__all__ = ["Diverged", "FitResult", "Interrupted", "Run", "RunOptions", "Training", "read_config"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"isthmus.engine.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
