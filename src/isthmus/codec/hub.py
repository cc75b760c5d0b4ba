"""A folder of one's own, or one of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from isthmus.codec.errors import UserError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def folder_of(source: str | os.PathLike[str], files: Sequence[str], revision: str | None = None) -> Path:
    """A folder as it is; ``OWNER/NAME`` as a folder with those files of the hub's repository.

    Raises:
        UserError: there is neither. What cannot be a repository is told without asking the network: a path, a single
            word, or a name in a folder that is here.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; give the folder that it is in.")
    name = str(source)
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(name) or Path(name).parent.is_dir():
        raise UserError(f"there is no folder {name}, and it is no OWNER/NAME of a repository on the Hugging Face hub.")
    return _download(name, files, revision)


def _download(repository: str, files: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path([hf_hub_download(repository, name, revision=revision) for name in files][-1]).parent
    except EntryNotFoundError as error:
        raise UserError(f"the repository {repository} of the hub does not hold {' and '.join(files)}.") from error
    except Exception as error:  # no such repository, no network, no access: the hub's client has many ways to fail
        raise UserError(
            f"{repository} is no folder here, and no repository of the Hugging Face hub that can be reached "
            f"({type(error).__name__})."
        ) from error
