"""What every test shares: one thread a worker, and the optional folder of golden tensors and real data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a script: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", default=None, help="folder of golden tensors: <slug>/<case>.{json,safetensors}")


def shared_folder() -> Path | None:
    """The folder of golden tensors, data and weights: ``ISTHMUS_SHARED``, or ``shared`` beside the repository."""
    folder = Path(os.environ.get("ISTHMUS_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


def shared(path: str) -> Path:
    """A file or folder of the shared folder; the test is skipped where it is absent."""
    folder = shared_folder()
    if folder is None or not (folder / path).exists():
        pytest.skip(f"shared/{path} is not here")
    return folder / path


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
