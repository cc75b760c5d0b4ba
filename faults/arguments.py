"""Odd arguments, drawn by Hypothesis: constructors and settings take them, or say in one sentence why not."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import random
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from isthmus import catalog, recipes
from isthmus.codec.tables import PARTS

_NUMBERS = st.one_of(st.integers(-3, 12), st.sampled_from([16, 24, 32]))
_REALS = st.one_of(st.sampled_from([0.0, -1.0, 0.1, 0.5, 1.0, 2.0, float("nan"), float("inf")]), st.floats(-2, 2))
_WORDS = st.sampled_from(["", "nonsense", "mean", "none", "a:b", "x" * 30])
_A_TURN = 60  # examples of a constructor or a setting before the next one's turn


def constructors(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """Every part whose required arguments are numbers, words or lists of those."""
    made = {name: getattr(importlib.import_module(module), name, None) for name, module in PARTS.items()}
    usable = {name: each for name, each in ((n, _arguments(m)) for n, m in made.items() if m) if each is not None}
    while True:
        for name, arguments in usable.items():
            yield from _tried(name, lambda given_, make=made[name]: make(**given_), arguments, chance)


def fields(scratch: Path, chance: random.Random) -> Iterator[str | None]:
    """Every setting of every ready recipe that is a number, a word, or a list of those, one at a time."""
    ready = {system.name: recipes.load(system.name) for system in catalog.systems() if system.ready}
    while True:
        for name, recipe in ready.items():
            usual = recipe.Config()
            hints = typing.get_type_hints(recipe.Config)
            for field in dataclasses.fields(usual):
                strategy = _strategy(hints[field.name])
                if strategy is not None:
                    check = _checker(recipe, usual, field.name)
                    yield from _tried(f"{name} --{field.name}", check, {field.name: strategy}, chance, 10)


def _checker(recipe: Any, usual: Any, name: str) -> Callable[[dict[str, Any]], object]:
    def check(given_: dict[str, Any]) -> None:
        config = dataclasses.replace(usual, **given_)
        try:
            bounds = importlib.import_module("isthmus.bounds")
        except ModuleNotFoundError:
            bounds = None
        if bounds is not None:
            bounds.check_fields(config)
        if hasattr(recipe, "check"):
            recipe.check(config)

    return check


def _tried(
    name: str,
    make: Callable[[dict[str, Any]], object],
    arguments: dict[str, st.SearchStrategy[Any]],
    chance: random.Random,
    count: int = _A_TURN,
) -> Iterator[str | None]:
    found: list[str | None] = []

    @seed(chance.randrange(2**31))
    @settings(
        max_examples=count, database=None, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck)
    )
    @given(st.fixed_dictionaries(arguments))
    def once(drawn: dict[str, Any]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make(drawn)
        except (ValueError, ModuleNotFoundError):
            found.append(None)
        except Exception as error:  # any other is a raw one
            told = re.sub(r"-?[\d.]+(e-?\d+)?", "…", " ".join(str(error).split()))
            found.append(f"{name}: {type(error).__name__}: {told[:100]}")
        else:
            found.append(None)

    once()
    yield from found


def _arguments(make: Any) -> dict[str, st.SearchStrategy[Any]] | None:
    """Strategies for the arguments, or nothing where a required one is no plain value."""
    try:
        of = make.__init__ if inspect.isclass(make) else make
        hints, parameters = typing.get_type_hints(of), inspect.signature(make).parameters
    except (NameError, TypeError, ValueError):
        return None
    found = {}
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        strategy = _strategy(hints.get(name))
        if strategy is not None:
            found[name] = strategy
        elif parameter.default is parameter.empty:
            return None
    return found or None


def _strategy(kind: Any) -> st.SearchStrategy[Any] | None:
    plain: dict[Any, st.SearchStrategy[Any]] = {int: _NUMBERS, float: _REALS, str: _WORDS, bool: st.booleans()}
    if kind in plain:
        return plain[kind]
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _strategy(inside[0])
    if origin is Literal:
        return st.one_of(st.sampled_from(inside), _WORDS)
    if origin in (Union, types.UnionType):
        each = [_strategy(one) for one in inside if one is not type(None)]
        known = [one for one in each if one is not None]
        if not known:
            return None
        return st.one_of(*known, *([st.none()] if type(None) in inside else []))
    if origin in (tuple, list) or getattr(origin, "__name__", "") == "Sequence":
        within = _strategy(inside[0]) if inside else None
        if within is None:
            return None
        length = len(inside) if origin is tuple and Ellipsis not in inside else None
        made = st.lists(within, min_size=length or 0, max_size=length or 5)
        return made.map(tuple) if origin is tuple else made
    return None
