"""Surgery and schedules: networks that really shrink, keep their function, save, load and export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers cifar_resnet20
from isthmus.codec import UserError, create_timm
from isthmus.compression.filter_scores import layers_of
from isthmus.compression.relevance_pruning import compress, load_pruned, save_pruned
from isthmus.compression.surgery import Surgery

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_resnet20": {},  # shortcuts that append channels
    "resnet10t": {},  # residual sums
    "densenet121": {"growth_rate": 4, "block_config": (2, 2)},  # concatenations
    "mobilenetv3_small_050": {},  # depthwise, squeeze and excite
    "regnetx_002": {},  # grouped convolutions
}


def data(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(5)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm_shrink_save_and_load(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (x, label) = create_timm(name, num_classes=5, **NETWORKS[name]), data(32)
    before = sum(p.numel() for p in model.parameters())
    small = compress(model, x, [(x, label)], keep=0.6, step=0.4)
    report = small.report
    assert report["filters"]["after"] <= 0.6 * report["filters"]["before"] + 1
    assert report["after"]["macs"] < 0.9 * report["before"]["macs"]
    assert report["after"]["parameters"] == sum(p.numel() for p in small.model.parameters()) < before
    assert sum(p.numel() for p in model.parameters()) == before  # the model given is as it was
    assert small.bits == sum(8 * t.numel() * t.element_size() for t in small.model.state_dict().values())
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded(x), small.model.eval()(x))
    assert loaded.num_features == loaded.forward_features(x).shape[1]  # type: ignore[operator]


class Sums(nn.Module):
    """A residual sum, a concatenation, a grouped convolution, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(x + self.branch(x))
        y = torch.cat([y, F.relu(self.side(x))], 1)
        return self.head(F.max_pool2d(F.relu(self.grouped(y)), 2).flatten(1))


def silenced(model: nn.Module, filters: dict[str, list[int]]) -> nn.Module:
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, index in filters.items():
            silent.get_submodule(name).weight[index] = 0  # type: ignore[index]
            silent.get_submodule(name).bias[index] = 0  # type: ignore[index]
    return silent


def test_coupled_filters_go_together_and_the_function_is_that_of_silenced_ones() -> None:
    model, x = Sums(), torch.randn(2, 3, 8, 8)
    surgery = Surgery(copy.deepcopy(model), x, ["stem", "branch", "side", "grouped"])
    groups = {g.root: g for g in surgery.groups}
    assert set(groups["stem"].members) == {"stem", "branch"} or set(groups["branch"].members) == {"stem", "branch"}
    assert surgery.excluded == {"head": "it makes the answer"}
    assert groups["grouped"].units.shape == (4, 4)  # one channel of each of four groups at once
    surgery.remove({"grouped": [1]})
    silent = silenced(model, {"grouped": [1, 5, 9, 13]})
    torch.testing.assert_close(surgery.model(x), silent(x))
    assert surgery.left["grouped"].tolist() == [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15]
    assert surgery.model.grouped.weight.shape == (12, 4, 3, 3)


def test_residual_sums_lose_the_channel_on_both_sides() -> None:
    torch.manual_seed(0)
    model = Sums()
    model.grouped = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    surgery = Surgery(copy.deepcopy(model), x)
    surgery.remove({"branch": [2, 5]})
    surgery.remove({"side": [0], "stem": [0]})
    torch.testing.assert_close(
        surgery.model(x), silenced(model, {"stem": [0, 2, 5], "branch": [0, 2, 5], "side": [0]})(x)
    )
    assert surgery.left["stem"].tolist() == [1, 3, 4, 6, 7]  # original numbers, whatever went before


def test_streams_with_appended_channels_lose_them_in_every_stage() -> None:
    torch.manual_seed(0)
    model: Any = create_timm("cifar_resnet20", num_classes=5, width=8, blocks=2).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    surgery = Surgery(copy.deepcopy(model), x, layers_of(model))
    assert surgery.excluded == {"head.classifier": "it makes the answer"}
    assert surgery.filters == sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    streams = [group for group in surgery.groups if "stages.conv4.1.conv2" in group.members]
    assert sorted((len(group.units), group.cost) for group in streams) == [(8, 4), (8, 7), (16, 2)]
    surgery.remove({"stages.conv1.0": [0, 5], "stages.conv2.0.conv1": [1]})  # 4 and 12 in front of it further on
    surgery.remove({"stages.conv3.1.conv2": [1, 13], "stages.conv4.0.conv2": [29]})
    small: Any = surgery.model
    gone = {name: set(range(len(_weight(model, name)))) - set(left.tolist()) for name, left in surgery.left.items()}
    assert gone["stages.conv2.1.conv2"] == {0, 5}
    assert gone["stages.conv3.0.conv2"] == {1, 4, 9, 15}
    assert gone["stages.conv4.1.conv2"] == {9, 12, 17, 23, 31}
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, filters in gone.items():
            norm = "stages.conv1.1" if name == "stages.conv1.0" else name[:-5] + name[-5:].replace("conv", "bn")
            for part in (name, norm):
                for parameter in silent.get_submodule(part).parameters() if filters else ():
                    parameter[sorted(filters)] = 0
        expected = silent(x)
        assert float((expected - model(x)).abs().max()) > 1
        torch.testing.assert_close(small(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="would lose all its filters"):
        surgery.remove({"stages.conv2.0.conv2": range(6)})


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight  # type: ignore[return-value]


def test_floors_are_shares_of_what_a_layer_had() -> None:
    model, (x, label) = create_timm("cifar_resnet20", num_classes=5, width=4, blocks=1), data()
    small = compress(model, x, [(x, label)], keep=0.8, step=0.1, floor=0.6)
    for module, before in zip(small.model.modules(), model.modules(), strict=True):
        if isinstance(module, nn.Conv2d) and isinstance(before, nn.Conv2d):
            assert module.out_channels >= 0.6 * before.out_channels
    grouped = nn.Sequential(nn.Conv2d(3, 12, 3, groups=1), nn.Conv2d(12, 12, 3, groups=4), nn.Flatten())
    grouped.append(nn.Linear(12 * 144, 3))
    with pytest.raises(ValueError, match="can, because every layer keeps"):
        compress(grouped, data()[0], keep=0.4, step=1.0, floor=0.5, criterion="weight")


def test_groups_join_scores_by_sum_maximum_or_mean() -> None:
    group = next(g for g in Surgery(Sums(), torch.randn(1, 3, 8, 8)).groups if "branch" in g.members)
    scores = {"stem": torch.arange(8.0), "branch": torch.ones(8)}
    usual = {how: group.score(scores, how) for how in ("sum", "max", "mean")}
    per_channel = torch.stack([scores[n][i] for n, i in group.members.items()])[:, group.units].sum(-1)
    assert usual["sum"].tolist() == per_channel.sum(0).tolist()
    assert (usual["max"] >= usual["mean"]).all()
    with pytest.raises(ValueError, match="sum, max or mean"):
        group.score(scores, "median")


def test_no_layer_is_emptied() -> None:
    model, x = Sums(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="would lose all"):
        Surgery(model, x).remove({"side": list(range(8))})
    with pytest.raises(ValueError, match="it makes the answer"):
        Surgery(model, x).remove({"head": [0]})
    with pytest.raises(ValueError, match="filters 0 to 7"):
        Surgery(model, x).remove({"side": [8]})
    small = compress(
        nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(2, 4), keep=0.12, criterion="weight"
    )
    assert small.model[0].out_features == 1


def test_the_least_relevant_filters_go_in_steps_with_fine_tuning_between() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad():
        model[2].weight[:, :7] = 0  # nobody reads the first seven units
    x, label = torch.randn(9, 6), torch.arange(9) % 3
    seen: list[int] = []

    def note(network: nn.Module) -> None:
        seen.append(network[0].out_features)  # type: ignore[index]

    small = compress(model, x, [(x, label)], keep=0.65, step=0.1, equal=True, finetune=note)
    assert small.report["steps"] == [{"removed": n, "of": 40} for n in (4, 8, 12, 14)]
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == 4
    assert sum(index in range(7) for index in small.report["kept"]["0"]) == 0
    assert small.report["classes"] == [0, 1, 2]


def test_mode_and_frozen_parameters_stay() -> None:
    model = Sums().train()
    model.stem.weight.requires_grad_(False)
    small = compress(model, data(8)[0], [(data(8)[0], data(8)[1] % 3)], keep=0.7, step=1.0)
    assert small.model.training
    assert not small.model.stem.weight.requires_grad  # type: ignore[union-attr]
    assert small.model.branch.weight.requires_grad  # type: ignore[union-attr]


def test_the_hidden_units_of_a_transformer_can_go() -> None:
    torch.manual_seed(0)
    model = create_timm("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5)
    hidden = [name for name in layers_of(model, "linear") if name.endswith("fc1")]
    x, label = data(32)
    small = compress(model, x, [(x, label)], keep=0.5, step=0.5, layers=hidden)
    assert small.model.blocks[0].mlp.fc1.out_features + small.model.blocks[1].mlp.fc1.out_features == 192  # type: ignore
    assert small.model.blocks[0].attn.qkv.out_features == 144  # type: ignore
    narrow: Any = compress(model, x, [(x, label)], keep=0.5, step=0.5).model
    assert narrow.embed_dim == narrow.num_features == narrow.forward_features(x).shape[-1] < 48
    narrow.reset_classifier(7)
    assert narrow(x).shape == (5, 7)


def test_the_result_exports(tmp_path: Path) -> None:
    model, x = create_timm("cifar_resnet20", num_classes=5, width=4), data(8)[0]
    small = compress(model, x, [data(8)], keep=0.5, step=0.5).model.eval()
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), small(x))


def test_bad_requests_are_told(tmp_path: Path) -> None:
    model, (x, label) = Sums(), data(8)
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        compress(model, x, [(x, label % 3)], keep=0)
    with pytest.raises(ValueError, match="step"):
        compress(model, x, [(x, label % 3)], step=0)
    with pytest.raises(UserError, match="no reference samples"):
        compress(model, x)
    with pytest.raises(ValueError, match="can, because every layer keeps"):
        compress(model, x, [(x, label % 3)], keep=0.2, floor=0.9, step=1)
    with pytest.raises(UserError, match="no filter of Linear can be taken out"):
        compress(nn.Linear(3, 2), torch.randn(1, 3), criterion="weight")
    small = compress(model, x, keep=0.8, criterion="weight", step=1)
    with pytest.raises(UserError, match=r"torch\.export"):
        save_pruned(small, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    (tmp_path / "bad.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="missing or cut short"):
        load_pruned(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_pruned_networks_of_timm_take_another_classifier(name: str) -> None:
    """Their heads state widths of their own, from which the new classifier is made."""
    torch.manual_seed(0)
    model = create_timm(name, num_classes=5).eval()
    surgery = Surgery(model, torch.randn(1, 3, 32, 32))
    surgery.remove_units([(place, 0) for place in range(len(surgery.groups))])
    model.reset_classifier(7)  # type: ignore[operator]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
