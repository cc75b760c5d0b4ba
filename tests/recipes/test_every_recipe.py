"""What every recipe has to be, so that the command line can run, show and resume it."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from types import ModuleType

import pytest

from isthmus import catalog, recipes
from isthmus.cli.running import restored
from isthmus.engine.options import RunOptions
from isthmus.report import plain

COLUMNS = {"image", "label", "mask", "boxes", "labels", "caption", "audio", "signal", "tokens", "subject", "index"}


@pytest.fixture(params=recipes.names(), scope="module")
def recipe(request: pytest.FixtureRequest) -> ModuleType:
    return recipes.load(request.param)


def test_it_has_the_functions_that_commands_call(recipe: ModuleType) -> None:
    assert list(inspect.signature(recipe.run).parameters) == ["config", "run"]
    assert list(inspect.signature(recipe.apply).parameters) == ["run_dir", "inputs", "out"]
    if hasattr(recipe, "convert"):
        assert list(inspect.signature(recipe.convert).parameters)[:2] == ["path", "out"]
    assert isinstance(recipe.needs, tuple)
    assert set(recipe.needs) <= COLUMNS


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


def test_every_claim_is_about_a_metric_that_the_recipe_names(recipe: ModuleType) -> None:
    system = catalog.find(recipe.__name__.rpartition(".")[2])
    assert system.claims, f"{system.name} is ready and claims nothing"
    folder = Path(catalog.__file__).parent
    source = system.recipe.read_text(encoding="utf-8")
    source += "".join(path.read_text(encoding="utf-8") for path in folder.glob(f"recipes/_{system.module}*.py"))
    for claim in system.claims:
        assert f'"{claim.metric}"' in source, f"no run.metric records {claim.metric!r}"
