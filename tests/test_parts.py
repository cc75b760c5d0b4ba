"""Parts carry names of their own: files say them, tables find them, and files from before modules moved still load."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn

import isthmus
from isthmus.codec import UserError, build, part, parts, spec_of, tables
from isthmus.decoders.probes import LinearProbe
from isthmus.encoders.backbone import Backbone


def test_the_table_names_every_part_of_isthmus() -> None:
    for module in pkgutil.walk_packages(isthmus.__path__, "isthmus."):
        if module.name != "isthmus.cli.__main__":
            importlib.import_module(module.name)
    found = {n: made.__module__ for n, made in parts._registered.items() if made.__module__.startswith("isthmus.")}
    assert found == tables.PARTS


def test_the_table_finds_every_architecture_of_ours_and_none_of_timm() -> None:
    import isthmus.encoders  # noqa: F401 - registers ours

    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        expected = module if module.startswith("isthmus.") else None
        if not name.startswith("convit_"):  # timm's own, which ours replace
            assert tables.module_of(name) == expected, name


def test_our_architectures_are_made_without_importing_them_first() -> None:
    code = 'from isthmus.codec import build; print(type(build({"target": "timm:hornet_tiny_7x7"})).__module__)'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "isthmus.encoders.images.hornet"


def test_a_file_says_the_name_of_a_part_and_not_its_module() -> None:
    spec = spec_of(LinearProbe(8, 3))
    assert spec["target"] == "isthmus:LinearProbe"
    assert isinstance(build(spec), LinearProbe)


@pytest.mark.parametrize(
    ("target", "kwargs", "name"),
    [
        ("isthmus.encoders.backbone:Backbone", {"model": "resnet10t"}, "Backbone"),
        ("isthmus.encoders.pixels:Pixels", {}, "Pixels"),  # before images had a folder of their own
        (
            "isthmus.encoders.embedding:Embedding",
            {"encoder": {"target": "isthmus.encoders.pixels:Pixels"}, "channels": 4},
            "Embedding",
        ),
        ("isthmus.codec:PassThrough", {}, "PassThrough"),
    ],
)
def test_files_that_name_a_module_still_load(target: str, kwargs: dict[str, Any], name: str) -> None:
    assert type(build({"target": target, "kwargs": kwargs})).__name__ == name


def test_a_function_that_makes_a_module_is_a_part_too() -> None:
    @part("two_linear_layers")
    def made(width: int, bias: bool = True) -> nn.Module:
        return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2, bias=bias))

    spec = spec_of(made(3, bias=False))
    assert spec == {"target": "isthmus:two_linear_layers", "kwargs": {"width": 3, "bias": False}}
    assert [tuple(p.shape) for p in build(spec).parameters()] == [(3, 2), (3,), (2, 3)]


def test_a_module_that_describes_itself_keeps_its_own_description() -> None:
    @part("an_early_backbone")
    def made() -> nn.Module:
        return Backbone("resnet10t", reductions=(8,))

    assert spec_of(made())["target"] == "isthmus:Backbone"


def test_a_part_of_ones_own_cannot_take_a_name_of_ours() -> None:
    with pytest.raises(ValueError, match=r"isthmus has a part 'LinearProbe' already"):

        @part
        class LinearProbe(nn.Module):
            pass


def test_a_part_of_ones_own_is_made_again_where_its_code_was_imported() -> None:
    @part("own_scale")
    class Scale(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.by * x

    assert build(spec_of(Scale(2.0))).by == 2.0
    with pytest.raises(UserError, match="has to be imported first"):
        build({"target": "isthmus:another_scale", "kwargs": {}})
