"""How a part remembers its making, so that a file can say it; how it is made again. A model file is never code."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from torch import nn

from isthmus.codec import tables
from isthmus.codec.errors import UserError

_Made = TypeVar("_Made", bound=Callable[..., Any])
_PREFIX = "isthmus:"

_registered: dict[str, Callable[..., Any]] = {}
_replacements: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


@overload
def part(made: _Made) -> _Made: ...


@overload
def part(made: str) -> Callable[[_Made], _Made]: ...


def part(made: Any) -> Any:
    """Decorator of a class, or of a function that makes a module: what comes out remembers the arguments.

    So a Codec can be saved and made again. The part is known in files by its own name, ``@part("name")`` gives it
    another; the module it stands in may change. Arguments must be JSON values, parts themselves, or lists and
    dictionaries of those; anything else is found out when the part is saved, not when it is made.

    Raises:
        ValueError: another part of isthmus has that name.
    """
    if isinstance(made, str):
        return functools.partial(_mark, name=made)
    return _mark(made, made.__name__)


def _mark(made: Any, name: str) -> Any:
    if tables.PARTS.get(name, made.__module__) != made.__module__:
        raise ValueError(f"isthmus has a part {name!r} already; give this one another name: @part('…').")
    marked = _class(made, name) if isinstance(made, type) else _function(made, name)
    _registered[name] = marked
    return marked


def _class(cls: Any, name: str) -> Any:
    init = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is cls:
            object.__setattr__(self, "_part_arguments", _arguments(name, signature, (self, *args), kwargs, skip=1))
            object.__setattr__(self, "_part_name", name)

    cls.__init__ = remembering
    cls._is_isthmus_part = True
    return cls


def _function(make: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        module = make(*args, **kwargs)
        if not callable(getattr(module, "part_arguments", None)):  # that one describes itself as it is now
            object.__setattr__(module, "_part_arguments", _arguments(name, signature, args, kwargs))
            object.__setattr__(module, "_part_name", name)
        return module

    return remembering


def _arguments(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], skip: int = 0
) -> dict[str, Any]:
    """Arguments by name, without the first so many."""
    given = dict(list(signature.bind(*args, **kwargs).arguments.items())[skip:])
    for key, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(key, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and key in given:
            raise TypeError(f"{name}: a part takes no *{key}; give its arguments names")
    return given


def spec_of(value: Any) -> Any:
    """The JSON form of a part, or of an argument of one: ``{"target": "isthmus:NAME", "kwargs": …}`` for modules.

    Raises:
        UserError: a module that was not made by an isthmus part or by ``build("timm:…")`` cannot be described.
    """
    if isinstance(value, nn.Module):
        if "_timm_spec" in value.__dict__:
            return value.__dict__["_timm_spec"]
        if "_part_name" in value.__dict__:
            now = getattr(value, "part_arguments", None)
            given: Any = now() if callable(now) else value.__dict__["_part_arguments"]
            kwargs = {name: spec_of(argument) for name, argument in given.items()}
            return {"target": _PREFIX + value.__dict__["_part_name"], "kwargs": kwargs}
        raise UserError(
            f"{type(value).__name__} cannot be written to a model file, because only isthmus parts and timm models can "
            'be rebuilt safely; make it with isthmus.codec.build({"target": "timm:NAME", "kwargs": {}}) or from a part.'
        )
    if isinstance(value, Mapping):
        return {str(key): spec_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [spec_of(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"an argument of type {type(value).__name__} cannot be written to a model file: {value!r}")


def build(spec: Any) -> Any:
    """Make a part from its ``spec_of`` form. Only parts of isthmus, parts of your own and ``timm:`` names are made.

    Raises:
        UserError: for any other target, so that a model file can never run code of its own.
    """
    if isinstance(spec, list):
        return [build(item) for item in spec]
    if not isinstance(spec, Mapping):
        return spec
    if "target" not in spec:
        return {key: build(item) for key, item in spec.items()}
    target = str(spec["target"])
    kwargs = {key: build(item) for key, item in spec.get("kwargs", {}).items()}
    if target.startswith("timm:"):
        return create_timm(target.removeprefix("timm:"), **kwargs)
    return _named(target)(**kwargs)


def _named(target: str) -> Callable[..., Any]:
    """The part of a target; earlier files name its module too (``isthmus.module.path:Class``), which may have moved."""
    place, _, name = target.partition(":")
    if place.split(".")[0] != "isthmus" or not name:
        raise UserError(f"target {target!r} is refused: a model file may only name isthmus parts and timm:NAME.")
    if name not in _registered and name in tables.PARTS:
        importlib.import_module(tables.PARTS[name])
    if name not in _registered:
        raise UserError(
            f"this isthmus has no part {name!r} (target {target!r}); the file may come from a newer version, or from "
            "code of its own that has to be imported first."
        )
    return _registered[name]


# ------------------------------------------------------------------------------------------------------ timm's models


def replaces(kind: type[nn.Module], by: Callable[[Any], nn.Module]) -> None:
    """Let :func:`create_timm` hand every model of this very class to ``by`` and give what that returns."""
    _replacements[kind] = by


def create_timm(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` whose result a Codec can save; an unknown name is answered with the nearest ones.

    Our own architectures are among them. ``pretrained=True`` is used while making the model and not recorded, because
    the weights travel in the file.
    """
    import timm

    if (ours := tables.module_of(name)) is not None:
        importlib.import_module(ours)  # registers its architectures with timm
    if not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(f"timm has no model {name!r}." + (f" Nearest: {', '.join(near)}." if near else ""))
    model = timm.create_model(name, **kwargs)
    model = _replacements.get(type(model), lambda same: same)(model)
    kept = {key: value for key, value in kwargs.items() if key not in ("pretrained", "checkpoint_path", "cache_dir")}
    object.__setattr__(model, "_timm_spec", {"target": f"timm:{name}", "kwargs": spec_of(kept)})
    return model
