"""Checkpoints as training scripts of all kinds write them are read, safely; mistakes are blamed on what is wrong."""

from __future__ import annotations

import argparse
import collections
import contextlib
import enum
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.codec import UserError
from isthmus.codec.checkpoints import load_into, read_checkpoint


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


STATE = network().state_dict()
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


class Config(dict):
    """Stands for the configuration class of a package that is not installed where the file is read."""


class Names(list):
    """Likewise."""


class Kind(enum.Enum):
    """Likewise."""

    ONE = 1


def same(state: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "c.pth", **options)
    return folder / "c.pth"


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (STATE, ""),
        ({"model": STATE}, "model"),
        ({"state_dict": STATE, "state_dict_ema": OTHER, "epoch": 3}, "state_dict"),
        ({"model": STATE, "model_ema": OTHER, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "model"),
        ({"teacher": STATE}, "teacher"),
        ({"params_ema": STATE}, "params_ema"),
        ({"params": STATE, "params_ema": OTHER}, "params"),
        ({"student": STATE, "teacher": OTHER}, "student"),
        ({"model": {"state_dict": STATE}}, "model.state_dict"),
        ({"my_network": STATE, "epoch": 1}, "my_network"),
        ({"rng_state": torch.zeros(5, dtype=torch.uint8), "net": STATE}, "net"),
        (collections.OrderedDict(STATE), ""),
        ({"state_dict": STATE, "args": argparse.Namespace(lr=0.1, out=Path("x"))}, "state_dict"),
        ({"state_dict": STATE, "best": np.float64(0.5), "curve": np.arange(3.0)}, "state_dict"),
        ({"state_dict": STATE, "best": np.float32(0.5), "step": np.int64(3)}, "state_dict"),
        (
            {
                "model": STATE,
                "config": Config(a=Config(depth=3)),
                "k": Kind.ONE,
                "other": collections.defaultdict(list, a=[1]),
            },
            "model",
        ),
        ({"model": STATE, "names": Names(["a", Config(x=1)]), "more": Config(n=Names([1]), k=Kind.ONE)}, "model"),
        ({"model": {**STATE, "version": "1.0", "config": {"ratio": 0.5}}}, "model"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_network_is_found_among_what_training_scripts_write(
    content: Any, taken: str, legacy: bool, tmp_path: Path
) -> None:
    found = read_checkpoint(saved(tmp_path, content, _use_new_zipfile_serialization=not legacy))
    assert same(found.state)
    assert found.taken == taken
    assert found.told.startswith("took ")


@pytest.mark.parametrize("prefixes", [("module.",), ("_orig_mod.", "module."), ("module.", "model."), ("model.",) * 3])
def test_prefixes_of_wrappers_are_stripped_until_none_is_left(prefixes: tuple[str, ...], tmp_path: Path) -> None:
    content = {"state_dict": {"".join(prefixes) + name: tensor for name, tensor in STATE.items()}}
    assert same(read_checkpoint(saved(tmp_path, content)).state)


def test_wrappers_inside_and_counters_of_averages_are_seen_through(tmp_path: Path) -> None:
    compiled = {f"0._orig_mod.{name}": tensor for name, tensor in STATE.items()}
    assert same(read_checkpoint(saved(tmp_path, compiled)).state, {f"0.{n}": t for n, t in STATE.items()})
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in STATE.items()}}
    assert same(read_checkpoint(saved(tmp_path, averaged)).state)


def test_the_moving_average_is_taken_by_a_flag_and_said(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": STATE, "state_dict_ema": OTHER})
    assert "left out state_dict_ema (a moving average)" in read_checkpoint(path).told
    averaged = read_checkpoint(path, ema=True)
    assert same(averaged.state, OTHER)
    assert averaged.taken == "state_dict_ema"
    nested = saved(tmp_path, {"ema": {"module": OTHER, "decay": 0.99}, "model": STATE})
    assert same(read_checkpoint(nested, ema=True).state, OTHER)
    assert same(read_checkpoint(nested).state)
    with pytest.raises(UserError, match=r"no moving average of the weights; it holds epoch, model"):
        read_checkpoint(saved(tmp_path, {"model": STATE, "epoch": 3}), ema=True)


def test_plain_values_beside_the_weights_are_kept(tmp_path: Path) -> None:
    content = {"model": {**STATE, "config": {"ratio": 0.5}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    found = read_checkpoint(saved(tmp_path, content))
    assert found.metadata == {"epoch": 3, "args": {"lr": 0.1}, "config": {"ratio": 0.5}}
    assert set(found.left_out) == {"epoch", "args", "config"}
    save_file(STATE, tmp_path / "c.safetensors", {"timm": "resnet18"})
    assert read_checkpoint(tmp_path / "c.safetensors").metadata == {"timm": "resnet18"}
    (tmp_path / "c.safetensors").rename(tmp_path / "misnamed.pth")
    assert same(read_checkpoint(tmp_path / "misnamed.pth").state)


def test_several_networks_come_under_their_names(tmp_path: Path) -> None:
    found = read_checkpoint(saved(tmp_path, {"a": {"x": torch.ones(1)}, "b": {"x": torch.zeros(1)}}))
    assert found.state.keys() == {"a.x", "b.x"}


class Evil:
    """Pickles to a call."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("call", [os.system, eval, exec, os.mkdir, print, Path.touch])
def test_nothing_in_a_file_is_run(call: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    argument = {"system": f"touch {mark}", "mkdir": str(mark), "touch": mark}.get(
        call.__name__, f"__import__('os').mkdir({str(mark)!r})"
    )
    torch.save({"model": STATE, "x": Evil(call, argument)}, tmp_path / "c.pth")
    with contextlib.suppress(UserError):
        assert same(read_checkpoint(tmp_path / "c.pth").state)
    assert not mark.exists()


def test_entries_without_end_are_told(tmp_path: Path) -> None:
    circle: dict[str, Any] = {}
    circle["model"] = circle
    with pytest.raises(UserError, match="holds no network"):
        read_checkpoint(saved(tmp_path, circle))
    deep: dict[str, Any] = dict(STATE)
    for _ in range(5000):
        deep = {"model": deep}
    path = tmp_path / "deep.pth"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        torch.save(deep, path)
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(UserError, match="holds no network"):
        read_checkpoint(path)


def test_each_damage_is_told_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    path = saved(tmp_path, STATE)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cut short"):
        read_checkpoint(path)
    for content in (b"", b"text", b"{}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no checkpoint"):
            read_checkpoint(path)
    with pytest.raises(UserError, match=r"holds no network.*epoch, lr"):
        read_checkpoint(saved(tmp_path, {"epoch": 3, "lr": 0.1}))
    with pytest.raises(UserError, match="holds no network"):
        read_checkpoint(saved(tmp_path, [torch.ones(3)]))
    with pytest.raises(UserError, match="whole pickled model"):
        read_checkpoint(saved(tmp_path, network()))
    save_file(STATE, tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError, match="no readable safetensors"):
        read_checkpoint(tmp_path / "c.safetensors")


def test_counters_that_old_files_lack_are_filled(tmp_path: Path) -> None:
    model = network()
    load_into(model, read_checkpoint(saved(tmp_path, {n: t for n, t in OTHER.items() if "tracked" not in n})))
    assert torch.equal(model[0].weight, OTHER["0.weight"])
    assert model[1].num_batches_tracked == 0


def test_a_model_that_is_a_wrapper_itself_gets_its_prefix_back(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

    wrapper = Wrapper()
    load_into(wrapper, read_checkpoint(saved(tmp_path, {f"module.model.{n}": t for n, t in OTHER.items()})))
    assert torch.equal(wrapper.model[0].weight, OTHER["0.weight"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"2.bias": None}, r"it lacks 2.bias\."),
        ({"2.bias": None, "2.weight": None}, "it lacks 2.weight and 1 more"),
        ({"new": torch.ones(1)}, r"it has new, which the model does not have\."),
        ({"2.weight": torch.ones(7, 4)}, r"2.weight is \(7, 4\), the model's is \(2, 4\)\."),
        (dict.fromkeys(STATE) | {"encoder.weight": torch.ones(1)}, "all names are others, such as encoder.weight"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], told: str, tmp_path: Path) -> None:
    content = {name: tensor for name, tensor in (STATE | change).items() if tensor is not None}
    with pytest.raises(UserError, match="does not fit Sequential: .*" + told):
        load_into(network(), read_checkpoint(saved(tmp_path, content)))


def test_a_file_whose_end_tells_of_several_disks_is_told(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    locator = data.rfind(b"PK\x06\x07")
    end = data.rfind(b"PK\x05\x06")
    if locator < 0:  # the record that zip files of more than 4 GiB have
        data[end:end] = b"PK\x06\x07" + bytes(4) + bytes(8) + (2).to_bytes(4, "little")
    else:
        data[locator + 16 : locator + 20] = (2).to_bytes(4, "little")
    (tmp_path / "w.pth").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"w\.pth is (no checkpoint|cut short)"):
        read_checkpoint(tmp_path / "w.pth")
