"""What every recipe has to be, so that the command line can run, show and resume it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isthmus import catalog, recipes
from isthmus.catalog import System
from isthmus.cli.flags import restored
from isthmus.engine.options import RunOptions
from isthmus.report import plain

COLUMNS = {"image", "label", "mask", "boxes", "labels", "caption", "audio", "signal", "tokens", "subject", "index"}


@pytest.fixture(params=recipes.names(), scope="module")
def recipe(request: pytest.FixtureRequest) -> ModuleType:
    return recipes.load(request.param)


def test_it_has_the_functions_that_commands_call(recipe: ModuleType) -> None:
    assert list(inspect.signature(recipe.run).parameters) == ["config", "run"]
    if hasattr(recipe, "apply"):
        assert list(inspect.signature(recipe.apply).parameters) == ["run_dir", "inputs", "out"]
    else:
        assert len(inspect.signature(recipe.answer).parameters) == 2
    if hasattr(recipe, "check"):
        recipe.check(recipe.Config())
        recipe.check(recipe.Config.paper())
    assert isinstance(recipe.needs, tuple)
    assert {column.removesuffix("?") for column in recipe.needs} <= COLUMNS  # ? marks what may be absent


def test_its_docstring_names_the_paper(recipe: ModuleType) -> None:
    system = catalog.find(recipe.__name__.rpartition(".")[2])
    assert recipe.__doc__
    assert system.arxiv is None or system.arxiv in recipe.__doc__


def test_its_settings_are_frozen_and_no_engine_option_hides_them(recipe: ModuleType) -> None:
    fields = {field.name for field in dataclasses.fields(recipe.Config)}
    options = {field.name for field in dataclasses.fields(RunOptions)} | {"scale", "json", "help"}
    assert not fields & options
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(recipe.Config(), next(iter(fields)), None)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_its_settings_survive_the_file_that_resuming_reads(recipe: ModuleType, scale: str) -> None:
    config = recipe.Config() if scale == "laptop" else recipe.Config.paper()
    assert isinstance(config, recipe.Config)
    saved = json.loads(json.dumps(plain(config)))
    assert restored(recipe.Config(), saved) == config


def flattened(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every flag of a config with its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= flattened(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def test_what_is_read_from_source_is_what_runs(recipe: ModuleType) -> None:
    """Without importing a recipe, `isthmus show` knows all its flags, their defaults and the paper's values."""
    found = {setting.name: setting for setting in catalog.settings(Path(str(recipe.__file__)))}
    here = flattened(recipe.Config())
    there = flattened(recipe.Config.paper()) if hasattr(recipe.Config, "paper") else here
    assert list(found) == list(here)
    for name, setting in found.items():
        assert ast.literal_eval(setting.default) == here[name], name
        if name in there:
            assert ast.literal_eval(setting.default if setting.paper is None else setting.paper) == there[name], name


def test_claims_and_published_figures_are_about_metrics_that_the_recipe_names(recipe: ModuleType) -> None:
    system = catalog.find(recipe.__name__.rpartition(".")[2])
    assert system.claims, f"{system.name} is ready and claims nothing"
    names, arms = named_by(system), named_by(system, shortest=1)

    def named(text: str, by: list[str] = names) -> bool:
        return any(re.fullmatch(name, text) for name in by)

    for metric in [*(claim.metric for claim in system.claims), *system.published]:
        pairs = [(metric[:at], metric[at + 1 :]) for at, letter in enumerate(metric) if letter == "_"]
        composed = any(named(start) and named(end, arms) for start, end in pairs)
        assert composed or named(metric), f"no run.metric records {metric!r}"


def named_by(system: System, shortest: int = 4) -> list[str]:
    """Every string of a system's recipe and of what recipes share, as a pattern."""
    folder = Path(catalog.__file__).parents[1]
    shared = [folder / "engine" / "comparison.py", *folder.glob("tasks/**/*.py")]
    sources = [system.recipe, *folder.glob(f"recipes/_{system.module}*.py"), *shared]
    return [pattern for path in sources for pattern in strings(path.read_text(encoding="utf-8"), shortest)]


def strings(source: str, shortest: int) -> list[str]:
    """Every string of a file as a pattern; what an f-string with a word of so many letters fills in may be anything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.escape(node.value))
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
            if any(part and len(str(part)) >= shortest for part in parts):
                found.append("".join(".+" if part is None else re.escape(str(part)) for part in parts))
    return found
