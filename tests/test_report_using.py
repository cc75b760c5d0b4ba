"""What a run wrote comes with a line that works when it is pasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from isthmus import saved
from isthmus.codec import Codec
from isthmus.compression.relevance_pruning import FORMAT
from isthmus.data.inputs import Inputs
from isthmus.decoders.metamixer_sr import MetaMixerSR
from isthmus.encoders.images.pixels import Pixels
from isthmus.report.using import PRUNED, line_for


def pasted(folder: Path, text: str = "") -> str:
    return line_for(folder, text) or ""


def test_what_was_kept_comes_with_the_line_that_loads_it(tmp_path: Path) -> None:
    saved.save(tmp_path / "kept" / "network", nn.Linear(2, 3), Inputs(size=(4, 4)), ["a", "b", "c"])
    Codec(Pixels(3), decoder=MetaMixerSR(2, dim=8, depth=1)).save_pretrained(tmp_path / "codec")
    save_file({"x": torch.ones(2)}, tmp_path / "some.safetensors")
    found: dict[str, Any] = {}
    exec(pasted(tmp_path / "codec"), found)
    assert isinstance(found["codec"], Codec)
    exec(pasted(tmp_path / "codec" / "model.safetensors").replace("codec =", "again ="), found)
    assert isinstance(found["again"], Codec)
    exec(pasted(tmp_path / "some.safetensors"), found)
    assert found["tensors"]["x"].tolist() == [1, 1]
    assert pasted(tmp_path / "kept" / "network") == f"import isthmus; saved = isthmus.load('{tmp_path}/kept/network')"
    assert line_for(tmp_path / "missing.txt") is None


def test_a_call_of_timm_gets_the_place_of_the_file_and_its_imports(tmp_path: Path) -> None:
    path = tmp_path / "it's here.safetensors"
    network = timm.create_model("test_vit", num_classes=3)
    save_file(network.state_dict(), path)
    said = "the network: timm.create_model('test_vit', num_classes=3, checkpoint_path=...), as published"
    found: dict[str, Any] = {}
    exec(pasted(path, said), found)
    assert torch.equal(found["network"].head.weight, network.head.weight)


def test_a_pruned_network_is_told_by_its_header(tmp_path: Path) -> None:
    assert PRUNED == FORMAT
    path = tmp_path / "pruned.safetensors"
    save_file({"x": torch.ones(2)}, path, {"format": FORMAT})
    assert pasted(path, "the pruned network; load_pruned reads it") == (
        f"from isthmus.compression.relevance_pruning import load_pruned; network = load_pruned('{path}')"
    )


def test_a_file_cut_short_is_told_of_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"\xff" * 4)
    assert "load_file" in pasted(path)
