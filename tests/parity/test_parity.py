"""Golden tensors of the published implementations against ours, and exact parameter counts of the published sizes.

``pytest tests/parity --cases DIR`` runs any directory ``<slug>/<case>.{json,safetensors}`` of that format.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from isthmus import catalog
from tests.conftest import shared_folder
from tests.parity.case import Case


def _folder(config: pytest.Config) -> Path | None:
    given = config.getoption("--cases")
    if given is not None:
        if not Path(given).is_dir():
            raise pytest.UsageError(f"--cases {given}: no such folder")
        return Path(given)
    shared = shared_folder()
    return shared / "parity" if shared is not None and (shared / "parity").is_dir() else None


def _ready() -> dict[str, str]:
    """Slug → adapter module of every system that the catalog calls ready."""
    return {s.slug: f"tests.parity.adapters.{s.module}" for s in catalog.systems() if s.ready}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = _folder(metafunc.config)
    if folder is None:
        absent = pytest.mark.skip(reason="no folder of golden tensors here (--cases DIR, or shared/parity)")
        metafunc.parametrize(metafunc.fixturenames[0], [pytest.param(None, marks=absent)])
        return
    paths = [p for slug in _ready() for p in sorted((folder / slug).glob("*.json"))]
    if "golden" in metafunc.fixturenames:
        cases = [p for p in paths if p.stem != "variants"]
        metafunc.parametrize("golden", cases, ids=[f"{p.parent.name}/{p.stem}" for p in cases])
    if "variant" in metafunc.fixturenames:
        files = [p for p in paths if p.stem == "variants"]
        entries = [(p.parent.name, name, entry) for p in files for name, entry in json.loads(p.read_text()).items()]
        metafunc.parametrize("variant", entries, ids=[f"{slug}/{name}".replace(" ", "_") for slug, name, _ in entries])


def _adapter(slug: str) -> ModuleType:
    return importlib.import_module(_ready()[slug])


def test_outputs_equal_the_published_ones(golden: Path) -> None:
    """An unknown case of a ready system fails: the adapter raises ``UnknownCase``."""
    case = Case.read(golden)
    differences = case.differences(_adapter(golden.parent.name).outputs(case))
    assert not differences, "\n".join(differences)


def test_parameter_counts_are_the_published_ones(variant: tuple[str, str, dict]) -> None:
    """``count`` returns the numbers that the entry names; at least one, and each exactly the published one."""
    slug, name, entry = variant
    stated = {
        **{k: v for k, v in entry.items() if k != "config"},
        **(entry["config"] if isinstance(entry.get("config"), dict) else {}),
    }
    counted = _adapter(slug).count(name, entry)
    assert counted, f"{slug}: the adapter counts nothing of {name}"
    assert {key: stated[key] for key in counted} == counted
