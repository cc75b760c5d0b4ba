"""What the README tells people to type exists and works."""

from __future__ import annotations

import re
import shlex

import pytest

from isthmus import catalog
from isthmus.cli.parser import build_parser

from .conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs_as_it_stands() -> None:
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    gradients = [parameter.grad for parameter in names["encoder"].model.parameters()]  # type: ignore[attr-defined]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if "isthmus " in line])
def test_every_command_of_the_readme_is_understood(line: str) -> None:
    words = shlex.split(line.replace('eval "$(', "").replace(')"', ""), comments=True)
    words = words[[word.endswith("isthmus") for word in words].index(True) + 1 :]
    parser = build_parser()
    if words[0] != "run":
        assert parser.parse_args(words).handler is not None
        return
    system = catalog.find(words[1])
    if not system.ready:
        pytest.skip(f"{system.name} has no recipe yet")
    options = catalog.settings(ROOT / "src/isthmus/engine/options.py", "RunOptions")
    known = {setting.name for setting in [*catalog.settings(system.recipe), *options]} | {"scale"}
    assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= known


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake (demo|test|lint|claims|bench|\w+ing)\b", README)) <= targets


def test_the_files_that_the_documents_point_to_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"
