"""Folders of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isthmus.codec.errors import UserError


def download(repo_id: str, files: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path([hf_hub_download(repo_id, name, revision=revision) for name in files][-1]).parent
    except Exception as error:
        raise UserError(
            f"{repo_id!r} is neither a folder nor a reachable Hugging Face repository with {files}."
        ) from error
