"""Models of timm, our own architectures among them, that a file can describe; a file can make them fetch nothing."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

from isthmus.codec import tables
from isthmus.codec.errors import UserError

#: True while a description is built: what reads files or asks the network is refused.
described: ContextVar[bool] = ContextVar("described", default=False)

_COMMON = frozenset(
    {
        *("num_classes", "in_chans", "img_size", "global_pool", "output_stride", "scriptable", "exportable", "no_jit"),
        *("drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate"),
        *("features_only", "out_indices", "feature_cls", "flatten_sequential", "output_fmt"),
    }
)
_FETCHING = frozenset({"checkpoint_path", "cache_dir", "kwargs_filter", "model_cfg", "feature_cfg", "cfg", "self"})

_replacements: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


def replaces(kind: type[nn.Module], by: Callable[[Any], nn.Module]) -> None:
    """Let :func:`create_timm` hand every model of this very class to ``by`` and give what that returns."""
    _replacements[kind] = by


def create_timm(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` whose result a Codec can save; an unknown name is answered with the nearest ones.

    Our own architectures are among them. ``pretrained=True`` is used while making the model and not recorded, because
    the weights travel in the file.

    Raises:
        UserError: timm has no such model; or a file asks for a keyword that is none of the architecture's.
    """
    import timm

    if (ours := tables.module_of(name)) is not None:
        importlib.import_module(ours)  # registers its architectures with timm
    if not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(f"timm has no model {name!r}." + (f" Nearest: {', '.join(near)}." if near else ""))
    if described.get() and (refused := sorted(kwargs.keys() - keywords(name))):
        raise UserError(
            f"a description of {name} may only say how it is built; {', '.join(refused)} is refused, because it is no "
            "keyword of this architecture, or one that reads files or asks the network."
        )
    model = timm.create_model(name, **kwargs)
    model = _replacements.get(type(model), lambda same: same)(model)
    object.__setattr__(model, "_timm_spec", {"target": f"timm:{name}", "kwargs": _recorded(model, kwargs)})
    return model


def headless(model: nn.Module) -> nn.Module:
    """A copy of a timm model without its classifier, for a file of what was trained without one."""
    return with_classes(copy.deepcopy(model), 0)


def with_classes(model: nn.Module, num_classes: int) -> nn.Module:
    """The same timm model with a new classifier of so many classes, which its description says as well."""
    whole: Any = model
    whole.reset_classifier(num_classes)
    if spec := whole.__dict__.get("_timm_spec"):
        spec["kwargs"]["num_classes"] = num_classes
    return model


def line_for_timm(name: str, weights: str | os.PathLike[str], num_classes: int = 10) -> str:
    """Python that loads a file of :func:`headless` weights into timm's model with so many classes."""
    told = f"pretrained=True, pretrained_cfg_overlay={{'file': {os.fspath(weights)!r}, 'num_classes': 0}}"
    first = "import isthmus.encoders; " if tables.module_of(name) else ""
    return f"{first}timm.create_model({name!r}, {told}, num_classes={num_classes})"


def keywords(name: str) -> frozenset[str]:
    """What a description may say of a timm architecture: what its classes and their configurations take."""
    import timm

    found = set(_COMMON)
    for value in vars(sys.modules[timm.model_entrypoint(name).__module__]).values():
        if isinstance(value, type) and issubclass(value, nn.Module):
            for kind in value.__mro__[: value.__mro__.index(nn.Module)]:
                found |= inspect.signature(kind.__init__).parameters.keys()
        elif isinstance(value, type) and dataclasses.is_dataclass(value):
            found |= {field.name for field in dataclasses.fields(value)}
    return frozenset(word for word in found - _FETCHING if not word.startswith("pretrained"))


def _recorded(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords but those that fetch; what an overlaid configuration changed is said by its own keyword."""
    kept = {key: value for key, value in kwargs.items() if key not in _FETCHING and not key.startswith("pretrained")}
    if kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay"):
        kept.setdefault("num_classes", model.num_classes)
    return kept
