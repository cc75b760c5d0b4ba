"""Published checkpoints of every kind are recognised by their tensors and become what timm or ``build`` makes again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import isthmus
from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.codec import Codec, UserError, build, create_timm, load_weights, published, tables
from isthmus.codec.checkpoints import Checkpoint
from isthmus.codec.published import convert, find
from isthmus.decoders.metamixer_sr import MetaMixerSR
from tests.decoders.test_metamixer_sr import official_enlarger
from tests.encoders import test_hornet, test_metamixer, test_transnext
from tests.encoders.test_large_kernel_nets import TINY, official_replknet, official_unireplknet

State = dict[str, Tensor]


def test_the_table_names_every_file_with_published_checkpoints() -> None:
    found: dict[str, set[str]] = {}
    root = Path(isthmus.__file__).parent
    for file in root.rglob("*.py"):
        if each := re.search(r"^PUBLISHED = Published\(\s*of=\"(.+?)\"", file.read_text(), re.M):
            module = ".".join(["isthmus", *file.relative_to(root).with_suffix("").parts])
            found.setdefault(each[1], set()).add(module)
    assert found == {system: set(modules) for system, modules in tables.PUBLISHED.items()}


def ablation(state: State) -> State:
    """The paper's ConvNeXt-T with another kernel, as its authors name it."""
    found = {}
    for name, tensor in state.items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.fc", "head")
        found[name.replace("head.norm", "norm")] = tensor
    return found


def akamaster(state: State) -> State:
    found = {}
    for name, tensor in state.items():
        if name.startswith("stages.conv1."):
            name = {"0": "conv1", "1": "bn1"}[name.split(".")[2]] + "." + name.split(".")[3]
        elif name.startswith("stages.conv"):
            name = f"layer{int(name[11]) - 1}{name[12:]}"
        found[name.replace("head.classifier", "linear")] = tensor
    return {name: tensor for name, tensor in found.items() if "num_batches_tracked" not in name}


#: timm name, arguments, published names; the files are of the architectures' smallest published sizes.
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "hornet": ("hornet_tiny_gf", {"num_classes": 3}, test_hornet.official),
    "transnext": ("transnext_micro", {"num_classes": 3}, test_transnext.official),
    "unireplknet": (
        "unireplknet_a",
        {"num_classes": 3},
        lambda s: official_unireplknet(s, dict.fromkeys([1, 2, 3], 13)),
    ),
    "convit": ("convit_tiny", {"num_classes": 3}, dict),
    "inceptionnext": ("inception_next_atto", {"num_classes": 3}, dict),
    "ablations of inceptionnext": ("convnext_tiny_k3_par1_8", {"num_classes": 3}, ablation),
    "lrp-pruning": ("cifar_resnet20", {"num_classes": 3}, akamaster),
}


def meta_state(name: str, **arguments: Any) -> State:
    with torch.device("meta"):
        return dict(create_timm(name, **arguments).state_dict())


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_recognised_with_its_size_and_classes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through shapes only: nothing of the published size is ever made."""
    name, arguments, official = CASES[case]
    state = meta_state(name, **arguments)
    found = Checkpoint(Path("file.pth"), official(state), "model", (), {})
    each = find(found)
    assert each.of == case.split(" ")[-1]
    with torch.device("meta"):
        model = each.read(found)
    assert model.__dict__["_timm_spec"] == {"target": f"timm:{name}", "kwargs": arguments}
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in state.items()}


@pytest.mark.parametrize("case", ["hornet", "unireplknet"])
def test_a_backbone_of_a_detector_gets_the_norm_of_a_fresh_head(case: str) -> None:
    name, _, official = CASES[case]
    arguments = {"num_classes": 0, "norm_features": True}
    name = "hornet_tiny_7x7" if case == "hornet" else name
    state = {n: t for n, t in meta_state(name, **arguments).items() if not n.startswith("head.")}
    named = {re.sub(r"^norms\.(\d)", r"norm\1", n): t for n, t in official(state).items()}
    dense = {**{f"backbone.{n}": t for n, t in named.items()}, "neck.x": torch.ones(1)}
    found = Checkpoint(Path("file.pth"), dense, "state_dict", (), {})
    with torch.device("meta"):
        model = find(found, case).read(found)
    assert model.__dict__["_timm_spec"]["kwargs"] == arguments


def test_a_written_file_is_loaded_by_timm(tmp_path: Path) -> None:
    network = timm.create_model("inception_next_atto", num_classes=3)
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "atto.pth")
    out = convert(tmp_path / "atto.pth", tmp_path / "atto.safetensors")
    with safe_open(out, "pt") as file:
        told = file.metadata()
    again = timm.create_model(told["timm"], **json.loads(told["arguments"]), checkpoint_path=str(out))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())


def test_what_keeps_a_file_from_the_nearest_size_is_named(tmp_path: Path) -> None:
    state = meta_state("convit_tiny", num_classes=3)
    one_more = Checkpoint(Path("file.pth"), {**state, "aux.bias": torch.zeros(1, device="meta")}, "", (), {})
    told = (
        r"fits none of convit_tiny.*; the nearest is convit_tiny, but it has aux.bias, which the model does not have\."
    )
    with pytest.raises(UserError, match=told):
        find(one_more).read(one_more)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no published checkpoint that is known here \(it has fc.weight\)"):
        convert(tmp_path / "other.pth", tmp_path / "x")
    with pytest.raises(UserError, match=r"no published checkpoint of convit: nothing there is named like fc.weight"):
        convert(tmp_path / "other.pth", tmp_path / "x", "convit")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("form", ["trained", "merged", "beneath a detector"])
def test_replknet_comes_in_three_forms(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.encoders.images.replknet import LargeKernelBlock
    from tests.layers.test_reparam import trained

    dense = form == "beneath a detector"
    arguments: dict[str, Any] = {"num_classes": 0, "norm_features": True} if dense else {"num_classes": 3}
    network: Any = trained(timm.create_model("replknet_31b", **TINY["replknet_31b"], **arguments))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        levels = network.forward_intermediates(x, intermediates_only=True)
    if form == "merged":
        arguments["deploy"] = True
        for block in [m for m in network.modules() if isinstance(m, LargeKernelBlock)]:
            block.large.reparameterize()
    state = official_replknet(network.state_dict())
    content: dict[str, Any] = {"model": state}
    if dense:
        kept = {k: v for k, v in state.items() if not k.startswith("norm.")}
        content = {"state_dict": {"rpn_head.x": torch.ones(1), **{f"backbone.{k}": v for k, v in kept.items()}}}
    torch.save(content, tmp_path / "published.pth")
    # The published sizes are too large for a test: the same way, with the small one under their name.
    monkeypatch.setattr(published, "create_timm", lambda name, **k: create_timm(name, **{**TINY["replknet_31b"], **k}))
    out = convert(tmp_path / "published.pth", tmp_path / "out.safetensors")
    with safe_open(out, "pt") as file:
        told = file.metadata()
    made = json.loads(told["arguments"])
    assert (told["timm"], {k: made[k] for k in arguments}) == ("replknet_31b", arguments)
    again: Any = timm.create_model("replknet_31b", **made, checkpoint_path=str(out)).eval()
    with torch.no_grad():
        for a, b in zip(again.forward_intermediates(x, intermediates_only=True), levels, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)


def test_a_merged_unireplknet_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    network: Any = create_timm("unireplknet_a", **small, num_classes=3).eval()
    with pytest.warns(UserWarning, match="never updated"):
        network.reparameterize()
    official = official_unireplknet(network.state_dict(), dict.fromkeys(range(1, 4), 13))
    found = Checkpoint(Path("file.pth"), official, "", (), {})
    monkeypatch.setattr(published, "create_timm", lambda name, **k: create_timm(name, **small, **k))
    model = find(found).read(found).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), network(x))


@pytest.mark.parametrize("rest", ["roi_head.x", "decode_head.psp_modules.0.1.conv.weight"])
@pytest.mark.parametrize("dense", [False, True])
def test_metamixer_is_recognised_alone_and_beneath_others(rest: str, dense: bool) -> None:
    arguments: dict[str, Any] = {"num_classes": 0, "norm_features": True} if dense else {"num_classes": 3}
    with torch.device("meta"):
        state = test_metamixer.official(create_timm("metamixer_ffnet_1", **arguments))
    if dense:
        state = {rest: torch.ones(1), **{f"backbone.{name}": tensor for name, tensor in state.items()}}
    found = Checkpoint(Path("file.pth"), state, "", (), {})
    with torch.device("meta"):
        model = find(found).read(found)
    assert model.__dict__["_timm_spec"] == {"target": "timm:metamixer_ffnet_1", "kwargs": arguments}


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_published_enlargers_become_a_codec(norm: str | None, tmp_path: Path) -> None:
    model = MetaMixerSR(3, 8, 2, 2, norm)
    torch.save({"params_ema": official_enlarger(model)}, tmp_path / "sr.pth")
    out = convert(tmp_path / "sr.pth", tmp_path / "sr.safetensors")
    assert out == tmp_path / "sr"
    codec = Codec.from_pretrained(out).eval()
    x = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(codec(x).prediction, model.eval()([x]))


@pytest.mark.parametrize("splitter", [{"rand_proj": torch.randn(3, 9, 4)}, {}])
def test_key_value_bottlenecks_become_a_part(splitter: State, tmp_path: Path) -> None:
    keys, values = torch.randn(3, 6, 4), torch.randn(3, 6, 2)
    torch.save({"bottleneck": {"keys": keys, "values": values}, "splitter": splitter}, tmp_path / "model.pt")
    out = convert(tmp_path / "model.pt", tmp_path / "model.safetensors", topk=2)
    with safe_open(out, "pt") as file:
        made = build(json.loads(file.metadata()["part"]))
    load_weights(made, out)
    assert isinstance(made, KeyValueBottleneck)
    assert (made.topk, made.fitted) == (2, True)
    assert torch.equal(made.values, values)


def test_the_moving_average_is_converted_on_request(tmp_path: Path) -> None:
    state = {"encoders.meg.sequence.0.0.weight": torch.ones(2, 2, 1)}
    averaged = {name: tensor * 2 for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "trunk.th")
    for ema, expected in ((False, 1.0), (True, 2.0)):
        out = convert(tmp_path / "trunk.th", tmp_path / "out.safetensors", ema=ema)
        assert next(iter(load_file(out).values())).unique().tolist() == [expected]
