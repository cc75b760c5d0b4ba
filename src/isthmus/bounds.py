"""What a setting may be, written at its type: ``depth: Annotated[int, at_least(1)]``, or shorter ``depth: Count``.

``check_fields`` refuses a setting that is out of bounds and names its flag; ``--help`` and ``isthmus show`` tell the
bounds of every flag; ``checked`` does the same for the arguments of a function or a constructor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from isthmus.errors import UserError

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Bound(ABC):
    """What holds for a value; ``str(bound)`` completes "the value is …"."""

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether a value is within; NaN and infinity are not, nor is what cannot be compared."""


@dataclass(frozen=True)
class Range(Bound):
    """Numbers from ``least`` to ``most``; the two ends belong to it unless they are open."""

    least: float = -math.inf
    most: float = math.inf
    least_open: bool = False
    most_open: bool = False

    def holds(self, value: Any) -> bool:
        try:
            if isinstance(value, bool) or not math.isfinite(value):
                return False
        except (TypeError, OverflowError):
            return False
        low = value > self.least if self.least_open else value >= self.least
        high = value < self.most if self.most_open else value <= self.most
        return low and high

    def __str__(self) -> str:
        low, high = f"{self.least:g}", f"{self.most:g}"
        if (self.least, self.most) == (-math.inf, math.inf):
            return "a finite number"
        if self.most == math.inf:
            return f"above {low}" if self.least_open else f"at least {low}"
        if self.least == -math.inf:
            return f"below {high}" if self.most_open else f"at most {high}"
        if not self.least_open and not self.most_open:
            return f"from {low} to {high}"
        first, last = "above" if self.least_open else "at least", "below" if self.most_open else "at most"
        return f"{first} {low} and {last} {high}"


@dataclass(frozen=True)
class OneOf(Bound):
    """One of a few words or numbers."""

    choices: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in self.choices)

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}"


@dataclass(frozen=True)
class Whole(Bound):
    """Whole numbers of any kind, numpy's too."""

    def holds(self, value: Any) -> bool:
        return isinstance(value, numbers.Integral)

    def __str__(self) -> str:
        return "a whole number"


@dataclass(frozen=True)
class Listing(Bound):
    """Several values in an order, ``length`` of them where that is given."""

    length: int | None = None

    def holds(self, value: Any) -> bool:
        if isinstance(value, (str, bytes, numbers.Number)):
            return False
        return self.length is None or (isinstance(value, Sequence) and len(value) == self.length)

    def __str__(self) -> str:
        return "a list of values" if self.length is None else f"a list of {self.length} values"


def at_least(least: float) -> Range:
    """``least`` or more."""
    return Range(least=least)


def at_most(most: float) -> Range:
    """``most`` or less."""
    return Range(most=most)


def above(least: float) -> Range:
    """More than ``least``."""
    return Range(least=least, least_open=True)


def below(most: float) -> Range:
    """Less than ``most``."""
    return Range(most=most, most_open=True)


def between(least: float, most: float) -> Range:
    """From ``least`` to ``most``, both included."""
    return Range(least=least, most=most)


def one_of(choices: Iterable[Any]) -> OneOf:
    """A key of a table, or a member of a list."""
    return OneOf(tuple(choices))


#: A share of a whole.
share = between(0, 1)

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Share = Annotated[float, between(0, 1)]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]


def bounds(annotation: Any) -> list[Bound]:
    """All bounds inside a type, from the outside in."""
    if typing.get_origin(annotation) is Annotated:
        inner, *extra = typing.get_args(annotation)
        return [bound for bound in extra if isinstance(bound, Bound)] + bounds(inner)
    if typing.get_origin(annotation) is Literal:
        return []
    return [bound for inner in typing.get_args(annotation) for bound in bounds(inner)]


def check_fields(config: Any, prefix: str = "--") -> None:
    """Refuse a dataclass with a field out of bounds, nested dataclasses included.

    Args:
        config: an instance.
        prefix: of the flags that set its fields.

    Raises:
        UserError: names the flag, its bound, and the value: ``--training.batch-size is at least 1, got -3.``
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = field.name.replace("_", "-") if prefix.startswith("--") else field.name
        _check(f"{prefix}{name}", hints[field.name], value)
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
                check_fields(inner, f"{prefix}{name}.")


def check_made(config: Any) -> None:
    """For ``__post_init__``: as ``check_fields``, by the fields' own names; left to the caller of :func:`later`."""
    if not _later.get():
        check_fields(config, "")


_later: ContextVar[bool] = ContextVar("later", default=False)


@contextlib.contextmanager
def later() -> Iterator[None]:
    """Within it, dataclasses do not check themselves: who makes them calls ``check_fields``, which knows the flags."""
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def checked(function: _Function) -> _Function:
    """Refuse arguments that are out of the bounds in a function's or a constructor's annotations.

    Plain annotations bound too: an ``int`` is a whole number, a ``float`` a finite one, a ``Literal`` one of its words.

    Raises:
        UserError: when called; names the argument, its bound, and the value.
    """
    target: Any = function.__init__ if isinstance(function, type) else function
    signature = inspect.signature(target)

    @functools.cache
    def kinds() -> dict[str, Any]:
        return {name: _strict(hint) for name, hint in typing.get_type_hints(target, include_extras=True).items()}

    @functools.wraps(target)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*arguments, **named).arguments
        except TypeError:  # Python's own sentence names the function
            return target(*arguments, **named)
        for name, value in given.items():
            if name in kinds():
                _check(name, kinds()[name], value)
        return target(*arguments, **named)

    if isinstance(function, type):
        function.__init__ = call  # type: ignore[misc]
        return function  # type: ignore[return-value]
    return call  # type: ignore[return-value]


def _strict(annotation: Any) -> Any:
    """A type with what it says of its values written out as bounds."""
    if annotation is int:
        return Annotated[int, Whole()]
    if annotation is float:
        return Annotated[float, Range()]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return Annotated[annotation, OneOf(inner)]
    if origin is Annotated:
        return functools.reduce(lambda kind, bound: Annotated[kind, bound], inner[1:], _strict(inner[0]))
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(_strict, inner))
    if origin is Sequence:
        return Annotated[Sequence[_strict(inner[0])], Listing()]  # type: ignore[misc]
    if origin is tuple and inner[-1] is not Ellipsis:
        return Annotated[tuple[tuple(map(_strict, inner))], Listing(len(inner))]  # type: ignore[misc]
    return annotation


def _check(name: str, annotation: Any, value: Any) -> None:
    if (broken := _broken(annotation, value)) is not None:
        bound, what = broken
        finite = "finite and " if what in (math.inf, -math.inf) and "finite" not in str(bound) else ""
        raise UserError(f"{name} is {finite}{bound}, got {what!r}.")


def _broken(annotation: Any, value: Any) -> tuple[Bound, Any] | None:
    """The first bound that does not hold, and for what."""
    if value is None:
        return None
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for bound in inner[1:]:
            if isinstance(bound, Bound) and not bound.holds(value):
                return bound, value
        return _broken(inner[0], value)
    if origin in (typing.Union, types.UnionType):
        plain = tuple(value) if isinstance(value, list) else value  # files have lists where code has pairs
        found = [_broken(member, value) for member in inner if fits(member, plain)]
        stated = [] if found else bounds(annotation)
        return (stated[0], value) if stated else None if None in found else next(iter(found), None)
    if isinstance(value, Mapping) and len(inner) == 2:
        pairs = [(kind, item) for entry in value.items() for kind, item in zip(inner, entry, strict=True)]
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and inner:
        kinds = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
        pairs = list(zip(kinds, value, strict=False))
    else:
        return None
    return next((broken for kind, item in pairs if (broken := _broken(kind, item)) is not None), None)


def fits(annotation: Any, value: Any) -> bool:
    """Whether a value is of a type, as far as the outermost layer tells."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(fits(member, value) for member in typing.get_args(annotation))
    if annotation is None:
        return value is None
    plain = typing.get_origin(annotation) or annotation
    if plain is Sequence and isinstance(value, (str, bytes)):
        return False
    if plain is float:
        return isinstance(value, (int, float))
    return isinstance(value, plain) if isinstance(plain, type) else True
