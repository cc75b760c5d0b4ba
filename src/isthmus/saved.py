"""A kept model with all that it needs to be used: ``isthmus.load("runs/x")`` gives a :class:`Saved`.

One folder a model: ``model.safetensors``, and ``saved.json`` with how the model is made (isthmus parts and timm names
only, so that a file is never code), what it is fed, the names of its labels, and further facts. A run keeps its models
under ``kept/NAME``. ::

    saved = isthmus.load("runs/mine")
    logits = saved.model(saved.inputs.transform()({"image": pictures}, torch.Generator())["image"])
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.codec import Codec, UserError, load_weights, save_weights, write_atomically
from isthmus.codec.files import read_object
from isthmus.codec.hub import folder_of
from isthmus.codec.parts import build_or_take, spec_or_name
from isthmus.data.inputs import Inputs

#: The folder of a run that holds its models, one folder each.
KEPT = "kept"
WEIGHTS = "model.safetensors"
FACTS = "saved.json"
_FORMAT = 1
_CODEC = "isthmus:Codec"


@dataclass
class Saved:
    """A model that was kept.

    Attributes:
        model: in evaluation mode, on the CPU.
        inputs: what it is fed; ``inputs.transform()`` is what it was measured with.
        labels: names of its classes, where it has some.
        facts: what else the recipe kept, plain values.
        folder: where it was read.
    """

    model: nn.Module
    inputs: Inputs
    labels: list[str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def save(
    folder: Path,
    model: nn.Module,
    inputs: Inputs,
    labels: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Keep a model; a folder that holds one already gets the new one in its place.

    Args:
        folder: made where it is not there.
        model: an isthmus part, a timm model made by ``isthmus.codec.create_timm``, or a Codec. What is neither is kept
            by its weights only, and given again to :func:`load`.
        inputs: what it is fed.
        labels: names of its classes.
        facts: plain values that a recipe's ``answer`` needs.

    Raises:
        UserError: a fact is no plain value.
    """
    told = {
        "format": _FORMAT,
        "model": _description(model),
        "inputs": inputs.as_json(),
        "labels": None if labels is None else [str(label) for label in labels],
        "facts": _plain(dict(facts or {})),
    }
    text = json.dumps(told, indent=1, allow_nan=False)
    (folder / FACTS).unlink(missing_ok=True)  # a kill from here on leaves no model, rather than two halves
    save_weights(model, folder / WEIGHTS)
    write_atomically(folder / FACTS, text.encode())
    return folder


def load(source: str | Path, *, revision: str | None = None, **parts: nn.Module) -> Saved:
    """A kept model: from its folder, from a run (its first model), or from the Hugging Face hub (``OWNER/NAME``).

    Args:
        source: where it is.
        revision: of the hub's repository.
        parts: what a file cannot describe because its code is outside isthmus: ``decoder=Mine(…)`` (or ``encoder``,
            ``bottleneck``) of a Codec, ``model=Mine(…)`` where it is the whole.

    Raises:
        UserError: there is none, or what is there is damaged or of another kind.
    """
    folder = _find(source, revision)
    path = folder / FACTS
    told = read_object(path, "the folder of a kept model")
    if not {"model", "inputs"} <= told.keys():
        raise UserError(f"{path} describes no model of isthmus: it lacks model or inputs.")
    if told.get("format") != _FORMAT:
        raise UserError(f"{path} is of format {told.get('format')!r}; this version reads {_FORMAT}.")
    labels, facts = told.get("labels"), told.get("facts") or {}
    if not (labels is None or (isinstance(labels, list) and all(isinstance(label, str) for label in labels))):
        raise UserError(f"{path}: labels are a list of names.")
    if not isinstance(facts, dict):
        raise UserError(f"{path}: facts are an object.")
    inputs = Inputs.from_json(told["inputs"])
    model = _made(told["model"], parts)
    if not isinstance(model, nn.Module):
        raise UserError(f"{path} describes no model.")
    load_weights(model, folder / WEIGHTS)
    return Saved(model.eval(), inputs, labels, facts, folder)


def _description(model: nn.Module) -> Any:
    """How the model is made; of a Codec, part by part, because one of them may be of code outside isthmus."""
    if type(model) is not Codec:
        return spec_or_name(model)
    return {"target": _CODEC, "kwargs": {name: spec_or_name(part) for name, part in model.part_arguments().items()}}


def _made(spec: Any, parts: Mapping[str, nn.Module]) -> Any:
    kwargs = spec.get("kwargs") if isinstance(spec, dict) and spec.get("target") == _CODEC else None
    known = ("model", *(kwargs if isinstance(kwargs, dict) else ()))
    if unknown := sorted(parts.keys() - set(known)):
        raise UserError(f"this model has no part {', '.join(unknown)}; its parts are {', '.join(known)}.")
    if "model" in parts or not isinstance(kwargs, dict):
        return build_or_take(spec, parts, "model")
    return Codec(**{name: build_or_take(part, parts, name) for name, part in kwargs.items()})


def _find(source: str | Path, revision: str | None) -> Path:
    folder = Path(source)
    if (folder / FACTS).is_file():
        return folder
    kept = sorted(path.parent for path in (folder / KEPT).glob(f"*/{FACTS}"))
    if kept:
        return _first(folder, kept)
    if (folder / Codec.CONFIG).is_file():
        raise UserError(f"{folder} is a Codec without inputs; isthmus.codec.Codec.from_pretrained({str(folder)!r}).")
    if earlier := [file.name for file in sorted(folder.glob("*.safetensors")) if file.name != WEIGHTS]:
        raise UserError(
            f"{folder} holds {earlier[0]} without what it is fed, as earlier versions left it; run the recipe again "
            "or load those weights yourself with isthmus.codec.checkpoints.read_checkpoint."
        )
    if folder.exists():
        raise UserError(f"{folder} holds no kept model; let the run end first, or name the folder with {FACTS}.")
    return folder_of(source, (FACTS, WEIGHTS), revision)


def _first(run: Path, kept: Sequence[Path]) -> Path:
    """The model that the run kept first, as its report lists them; in the order of names where there is none."""
    try:
        artifacts = json.loads((run / "report.json").read_text(encoding="utf-8"))["artifacts"]
        listed = [artifact["name"] for artifact in artifacts]
    except (OSError, ValueError, KeyError, TypeError):
        listed = []
    names = [path.name for path in kept]
    listed = [name for name in listed if name in names]
    return kept[names.index(listed[0])] if listed else kept[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UserError(f"a fact of a kept model is a number, a word, or a list of them, got {value!r:.80}.")
