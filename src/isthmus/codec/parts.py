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
from isthmus.codec.timm_models import create_timm, described

_Made = TypeVar("_Made", bound=Callable[..., Any])
_PREFIX = "isthmus:"

_registered: dict[str, Callable[..., Any]] = {}


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
            return {key: spec_of(item) for key, item in value.__dict__["_timm_spec"].items()}
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


def spec_or_name(module: nn.Module | None) -> Any:
    """:func:`spec_of`; ``{"given": "Class"}`` for what cannot be described and has to be given again at loading."""
    try:
        return spec_of(module)
    except UserError:
        return {"given": type(module).__name__}


def build_or_take(spec: Any, given: Mapping[str, nn.Module], name: str) -> Any:
    """The part ``name`` of a model: the one of ``given``, else made of its :func:`spec_or_name` form.

    Raises:
        UserError: it could not be described and is not given; or see :func:`build`.
    """
    if name in given:
        return given[name]
    if isinstance(spec, Mapping) and "target" not in spec and "given" in spec:
        kind = spec["given"]
        raise UserError(
            f"the {name} of this model is a {kind} of code outside isthmus, which a file cannot describe; make one as "
            f"it was and give it at loading: {name}={kind}(…)."
        )
    return build(spec)


def build(spec: Any) -> Any:
    """Make a part from its ``spec_of`` form. Only parts of isthmus, parts of your own and ``timm:`` names are made.

    Raises:
        UserError: for any other target, so that a model file can never run code of its own, nor read others or the
            network; for arguments that the part does not take; for a description that is nested without end.
    """
    token = described.set(True)
    try:
        return _built(spec)
    except RecursionError as error:
        raise UserError("this description of a model is nested too deep.") from error
    finally:
        described.reset(token)


def _built(spec: Any) -> Any:
    if isinstance(spec, list):
        return [_built(item) for item in spec]
    if not isinstance(spec, Mapping):
        return spec
    if "target" not in spec:
        return {key: _built(item) for key, item in spec.items()}
    target, kwargs = spec["target"], spec.get("kwargs", {})
    if not isinstance(target, str) or not isinstance(kwargs, Mapping):
        raise UserError(f"a part is described by a target and an object of kwargs, got {spec!r:.120}.")
    made = {str(key): _built(item) for key, item in kwargs.items()}
    try:
        if target.startswith("timm:"):
            return create_timm(target.removeprefix("timm:"), **made)
        return _named(target)(**made)
    except (UserError, RecursionError):
        raise
    except Exception as error:  # whatever a constructor says of arguments that it cannot use
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{target} cannot be made of what its description says: {reason}") from error


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
