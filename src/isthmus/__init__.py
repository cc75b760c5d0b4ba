"""Isthmus: encoders, bottlenecks and decoders that cross."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # brings torch, which `isthmus list` and `isthmus show` do without
        from isthmus.saved import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
