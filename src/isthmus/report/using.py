"""The line that makes use of what a run wrote, complete and ready to be pasted; nothing is loaded to find it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from isthmus import catalog
from isthmus.catalog import System
from isthmus.catalog.source import read

PRUNED = "isthmus-pruned"


def line_for(path: Path, text: str = "") -> str | None:
    """Python that loads a file or a folder of a run.

    Args:
        path: a kept model's folder, a codec's folder or its weights, or a file of tensors.
        text: what the run says about it; a call of timm in it is completed.

    Returns:
        One line with its imports; ``None`` where the file is none of these.
    """
    call = _timm_call(text, path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == "model.safetensors":
        if (folder / "saved.json").is_file():
            return f"import isthmus; saved = isthmus.load({str(folder)!r})"
        if (folder / "codec.json").is_file():
            return f"from isthmus.codec import Codec; codec = Codec.from_pretrained({str(folder)!r})"
    if call:
        return f"import isthmus.encoders, timm; network = {call}"
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    if _metadata(path).get("format") == PRUNED:
        load = "from isthmus.compression.relevance_pruning import load_pruned"
        return f"{load}; network = load_pruned({str(path)!r})"
    return f"from safetensors.torch import load_file; tensors = load_file({str(path)!r})"


def apply_line(system: System, run: Path) -> str | None:
    """The command that uses a run on files; ``None`` where its recipe is for no use on files."""
    if not system.ready:
        return None
    module = read(system.recipe)
    usable = {*module.functions, *module.constants, *module.imports} & {"apply", "answer"}
    return f"isthmus apply {shlex.quote(str(run))} FILES" if usable else None


def explained(name: str) -> dict[str, str]:
    """What the metrics of a system's claims mean, by the claims' own sentences."""
    try:
        system = catalog.find(name)
    except catalog.UnknownSystem:
        return {}
    return {claim.metric: claim.text for claim in system.claims}


def _timm_call(text: str, path: Path) -> str:
    """A call of ``timm.create_model`` in a sentence, with the file's own place in it."""
    start = text.find("timm.create_model(")
    depth, end = 0, -1
    for place in range(max(start, 0), len(text) if start >= 0 else 0):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if text[place] == ")" and depth == 0:
            end = place + 1
            break
    if end < 0:
        return ""
    call = text[start:end]
    for unfinished in ("checkpoint_path=...", f"checkpoint_path={path.name!r}"):
        call = call.replace(unfinished, f"checkpoint_path={str(path)!r}")
    return call


def _metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says about it."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
    except (OSError, ValueError):
        return {}
    return header.get("__metadata__") or {} if isinstance(header, dict) else {}
