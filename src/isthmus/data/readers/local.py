"""Real data sets that a person keeps at hand; nothing needs them, and nothing downloads them."""

from __future__ import annotations

import os
from pathlib import Path


def local(path: str) -> Path | None:
    """A file or folder such as ``cifar10/test.parquet`` among the data sets at hand; ``None`` where it is not there.

    They are looked for in ``$ISTHMUS_SHARED/data``, or in ``shared/data`` beside a checkout of the repository.
    """
    checkout = Path(__file__).resolve().parents[4]
    shared = Path(os.environ.get("ISTHMUS_SHARED") or checkout.parent / "shared")
    found = shared / "data" / path
    return found if found.exists() else None
