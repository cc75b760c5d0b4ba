"""The catalog tells the truth: about the papers, about the recipes, and about what was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus import catalog
from isthmus.catalog import Claim, System

from .conftest import ROOT, shared


def test_there_are_fifty_two_systems_in_order_with_unique_names() -> None:
    systems = catalog.systems()
    assert [system.number for system in systems] == list(range(1, 53))
    assert len({system.name for system in systems}) == 52
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", system.name) for system in systems)
    assert all(len(system.summary) < 140 and system.summary.endswith(".") for system in systems)
    assert all(system.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", system.arxiv) for system in systems)


def test_number_name_and_arxiv_id_are_those_of_the_sheets() -> None:
    sheets = {path.stem: path.read_text(encoding="utf-8") for path in shared("papers").glob("*.md")}
    assert {system.slug for system in catalog.systems()} == set(sheets)
    for system in catalog.systems():
        assert (system.arxiv or "") in sheets[system.slug], system.slug


def test_a_file_is_named_after_its_system_and_names_each_claim_once(tmp_path: Path) -> None:
    text = (catalog.entries.DATA / "01-spark.toml").read_text(encoding="utf-8")
    (tmp_path / "02-spark.toml").write_text(text)
    with pytest.raises(ValueError, match=r"01-spark\.toml"):
        catalog.entries.read(tmp_path / "02-spark.toml")
    (tmp_path / "01-spark.toml").write_text(text + text[text.index("[[claims]]") :])
    with pytest.raises(ValueError, match="two claims of one name"):
        catalog.entries.read(tmp_path / "01-spark.toml")


def test_published_figures_are_found_by_system_and_metric() -> None:
    assert catalog.published("spark")["accuracy_spark"] == "ImageNet, ResNet-50: 0.806"
    assert "accuracy_ours" not in catalog.published("spark")
    with pytest.raises(catalog.UnknownSystem):
        catalog.published("sprak")


@pytest.mark.parametrize("spelling", ["meg-decoding", "meg_decoding", "02", "2", "02-meg-decoding", " MEG-Decoding "])
def test_a_system_is_found_in_every_spelling_of_its_name(spelling: str) -> None:
    assert catalog.find(spelling).number == 2


@pytest.mark.parametrize(("typo", "meant"), [("sprak", "spark"), ("rot-net", "rotnet"), ("01-sprk", "spark")])
def test_an_unknown_name_is_answered_with_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(catalog.UnknownSystem, match=rf"{typo}.*Nearest:.*\b{meant}\b"):
        catalog.find(typo)


def test_a_name_like_nothing_points_to_the_list() -> None:
    with pytest.raises(catalog.UnknownSystem, match="isthmus list"):
        catalog.find("99")


def test_a_claim_without_a_bar_is_refused() -> None:
    with pytest.raises(ValueError, match="no bar"):
        Claim("faster", "It is faster.", "speed")
    assert Claim("faster", "It is faster.", "speed", at_least=1.25, at_most=3).bar == "≥ 1.25 and ≤ 3"


def test_every_ready_recipe_can_be_described_without_importing_it() -> None:
    for system in catalog.systems():
        if system.ready:
            assert catalog.docstring(system.recipe), f"{system.recipe} needs a docstring"
            undocumented = [s.name for s in catalog.settings(system.recipe) if not s.doc]
            assert not undocumented, f"{system.recipe}: document the fields {undocumented}"


def test_settings_are_read_from_source(tmp_path: Path) -> None:
    recipe = tmp_path / "toy.py"
    recipe.write_text(
        '''"""Toy."""
import torch_is_not_imported
from dataclasses import dataclass

@dataclass(frozen=True)
class Shared:
    data: str = "digits"
    """Where pictures
    come from."""

@dataclass(frozen=True)
class Config(Shared):
    steps: int = 10  # how many
    # more than one line
    # above the field
    widths: tuple[int, ...] = (8, 16)
    #: hash-colon
    keep: float = 0.6
    bare: int = 1

    @classmethod
    def paper(cls):
        return cls(steps=1_000, data="folder:imagenet")
'''
    )
    found = {s.name: s for s in catalog.settings(recipe)}
    assert list(found) == ["data", "steps", "widths", "keep", "bare"]
    assert found["data"] == catalog.Setting("data", "str", "'digits'", "'folder:imagenet'", "Where pictures come from.")
    assert found["steps"] == catalog.Setting("steps", "int", "10", "1000", "how many")
    assert found["widths"].doc == "more than one line above the field"
    assert found["widths"].default == "(8, 16)"
    assert (found["keep"].doc, found["bare"].doc) == ("hash-colon", "")


def test_a_nested_training_becomes_its_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "toy.py"
    recipe.write_text(
        """
from isthmus.engine import Training

_TRAINING = Training(steps=300, lr=1e-3)

class Config:
    pretrain: Training = _TRAINING

    @classmethod
    def paper(cls):
        return cls(pretrain=Training(epochs=1600, lr=2e-4 * 4096 / 256))
"""
    )
    found = {s.name: s for s in catalog.settings(recipe)}
    assert (found["pretrain.steps"].default, found["pretrain.steps"].paper) == ("300", "None")
    assert (found["pretrain.epochs"].default, found["pretrain.epochs"].paper) == ("None", "1600")
    assert (found["pretrain.lr"].default, found["pretrain.lr"].paper) == ("0.001", "0.0032")
    assert "learning rate" in found["pretrain.lr"].doc
    assert {name for name, setting in found.items() if not setting.usual} == {
        "pretrain.steps",
        "pretrain.epochs",
        "pretrain.lr",
    }


def test_bases_functions_and_constants_of_other_files_are_followed(tmp_path: Path) -> None:
    recipe = tmp_path / "toy.py"
    recipe.write_text(
        """
from dataclasses import dataclass, field, replace
from typing import Literal
from isthmus.engine import Training
from isthmus.tasks import classification
from isthmus.tasks.classification import ClassificationConfig

Kind = Literal["one", "two"]
SIDES = (8, 16)

@dataclass(frozen=True)
class Part:
    width: int = 4
    \"\"\"How wide.\"\"\"
    kind: Kind = "one"
    \"\"\"Which.\"\"\"
    training: Training = Training()
    \"\"\"Its training.\"\"\"

def _sgd(lr: float, *, clip: float = 2.0, **more: object) -> Training:
    plain = {"optimizer": "momentum", "lr": lr, "clip": clip}
    return Training(**{"epochs": 60, **plain, **more})

@dataclass(frozen=True)
class Config(ClassificationConfig):
    size: int = SIDES[1]
    part: Part = field(default_factory=lambda: Part(2 * 3, training=_sgd(0.1, epochs=5)))
    \"\"\"A part.\"\"\"
    sides: tuple[int, ...] = SIDES
    \"\"\"Sides.\"\"\"

    @classmethod
    def paper(cls):
        small = {"lr": 0.3}
        return cls(part=Part(kind="two", training=Training(**small)), augmentation=classification.DEIT)
"""
    )
    found = {s.name: s for s in catalog.settings(recipe)}
    assert list(found)[:2] == ["data", "size"]
    assert (found["size"].default, found["size"].doc) == ("16", "Pixels a side of what the networks see.")
    assert (found["part.width"].default, found["part.width"].paper) == ("6", "4")
    assert (found["part.kind"].type, found["part.kind"].paper) == ("Literal['one', 'two']", "'two'")
    assert (found["part.training.lr"].default, found["part.training.lr"].paper) == ("0.1", "0.3")
    assert (found["part.training.epochs"].default, found["part.training.clip"].default) == ("5", "2.0")
    assert found["sides"].default == "(8, 16)"
    assert found["augmentation.mixup"].paper == "0.8"
    assert not found["part.training.lr"].usual
    assert found["part.training.betas"].usual


def verdict_file(folder: Path, system: str, **verdict: object) -> None:
    content = {"format": "isthmus-claims", "version": 1, "system": system, "verdicts": [verdict]}
    (folder / "claims").mkdir(exist_ok=True)
    (folder / "claims" / f"{system}.json").write_text(json.dumps(content))


def test_a_verdict_counts_only_for_the_bar_it_was_measured_against(tmp_path: Path) -> None:
    claim = Claim("gain", "It helps.", "gain", at_least=4)
    system = System(99, "toy", "Toy", "Nobody", 2000, "lens", "Nothing.", claims=(claim,))
    assert catalog.measured(system, tmp_path) is None
    verdict_file(tmp_path, "toy", name="gain", metric="gain", bar="≥ 4", rule="mean", mean=5.0, holds=True)
    record = catalog.measured(system, tmp_path)
    assert catalog.verdict_of(claim, record) is True
    assert catalog.verdict_of(Claim("gain", "It helps.", "gain", at_least=6), record) is None
    assert catalog.verdict_of(Claim("other", "It helps.", "gain", at_least=4), record) is None


def test_a_verdict_that_is_no_number_can_still_be_shown() -> None:
    assert catalog.figure_of({"mean": None, "spread": None, "values": {"0": None}}) == "not finite"
    assert catalog.figure_of({"mean": 5.0, "spread": 0.0, "values": {"0": 5.0}}) == "5"
    assert catalog.figure_of({"mean": 5.0, "spread": 0.71, "values": {"0": 4.5, "1": 5.5}}) == "5 ± 0.71"


def test_a_broken_or_foreign_verdict_file_is_named(tmp_path: Path) -> None:
    system = catalog.find("spark")
    (tmp_path / "claims").mkdir()
    path = tmp_path / "claims" / "spark.json"
    path.write_text('{"format": "isth')
    with pytest.raises(ValueError, match=r"spark\.json is no JSON"):
        catalog.measured(system, tmp_path)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not written by"):
        catalog.measured(system, tmp_path)


def test_every_committed_verdict_is_readable_and_belongs_to_a_claim() -> None:
    for path in (ROOT / "results" / "claims").glob("*.json"):
        system = catalog.find(path.stem)
        record = catalog.measured(system, ROOT / "results")
        assert record is not None
        stale = {v["name"] for v in record["verdicts"]} - {claim.name for claim in system.claims}
        assert not stale, f"{path} judges {stale}, which the catalog does not claim; measure it again"


def test_readme_table_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert catalog.markdown_table(ROOT / "results") in readme, "run `python -m isthmus.catalog --readme`"


def test_readme_table_is_rewritten_in_place_and_only_there(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{catalog.MARKS[0]}\nwhat stood here\n{catalog.MARKS[1]}\nafter\n")
    assert catalog.update_readme(readme, tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "what stood here" not in text
    assert text.count("| 52 |") == 1
    assert not catalog.update_readme(readme, tmp_path)
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        catalog.update_readme(readme, tmp_path)


def test_the_catalog_and_the_command_line_import_no_torch() -> None:
    code = (
        "import sys, isthmus.catalog, isthmus.recipes, isthmus.cli\n"
        "from isthmus.cli import main\n"
        "main(['list']); main(['show', 'spark']); main(['list', '--json'])\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'tyro', 'timm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
