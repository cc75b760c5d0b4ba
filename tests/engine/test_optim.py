"""Schedules, parameter groups and optimisers: the published values, and what follows from their definition."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from isthmus.codec import UserError
from isthmus.engine import optim
from tests.conftest import shared


def golden(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = shared("parity/01-spark")
    return json.loads((folder / f"{case}.json").read_text())["config"], load_file(folder / f"{case}.safetensors")


def test_lamb_takes_the_published_steps() -> None:
    config, tensors = golden("lamb_3_steps")
    named = {name: nn.Parameter(tensors[f"in/{name}0"]) for name in ("W", "b", "Z")}
    groups = [
        {"params": [named["W"], named["Z"]], "weight_decay": 0.04},
        {"params": [named["b"]], "weight_decay": 0.0},
    ]
    options = {key: config[key] for key in ("betas", "eps", "max_grad_norm", "bias_correction", "always_adapt")}
    optimizer = optim.create_optimizer("lamb", groups, lr=config["lr"], **options)
    for step in (1, 2, 3):
        for name, parameter in named.items():
            parameter.grad = tensors[f"in/grad_{name}_{step}"].clone()
        assert torch.allclose(optim.global_norm(named.values()), tensors[f"out/global_grad_norm_{step}"], rtol=1e-5)
        optimizer.step()
        for name, parameter in named.items():
            torch.testing.assert_close(parameter.data, tensors[f"out/{name}_after_{step}"], rtol=1e-5, atol=1e-6)


def test_schedules_are_the_published_ones() -> None:
    config, tensors = golden("schedules")
    for phase in ("pretrain", "finetune"):
        c = config[phase]
        schedule = optim.Schedule(c["peak_lr"], c["max_it"], c["wd"], c.get("wd_end"), warmup_steps=c["warmup_it"])
        at = [schedule.at(int(step)) for step in tensors["in/iteration"]]
        torch.testing.assert_close(torch.tensor([lr for lr, _ in at]), tensors[f"out/lr_{phase}"], rtol=1e-5, atol=0)
        if "wd_end" in c:
            torch.testing.assert_close(torch.tensor([w for _, w in at]), tensors[f"out/wd_{phase}"], rtol=1e-5, atol=0)


def test_layers_of_resnet_and_convnext_are_the_published_ones() -> None:
    config, tensors = golden("param_groups")
    for model, entry in config["names"].items():
        names = entry["param_names"]
        ids = optim.layer_ids(names)
        assert [ids[name] for name in names] == tensors[f"out/{model}/layer_id"].tolist()
        top = max(ids.values())
        assert [top - ids[name] for name in names] == tensors[f"out/{model}/scale_exponent"].tolist()


def named_module(names: list[str], vectors: set[str]) -> nn.Module:
    """A module whose parameters have these dotted names; those in ``vectors`` are one-dimensional."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(torch.zeros(3) if name in vectors else torch.zeros(3, 3)))
    return root


def test_what_decays_in_pretraining_is_the_published_split() -> None:
    config, _ = golden("param_groups")
    bare, decayed = config["pretrain_small_convnext_no_decay"], config["pretrain_small_convnext_decay"]
    # Only what the names do not tell is left to the shape: norms' weights.
    vectors = {n for n in bare if "norm" in n or ".conv." in n or "downsample" in n}
    groups = optim.param_groups(named_module(bare + decayed, vectors), 0.04)
    assert {group["wd_scale"]: set(group["names"]) for group in groups} == {0.0: set(bare), 1.0: set(decayed)}


def test_layer_decay_of_a_real_timm_model_matches_the_official_names() -> None:
    _, tensors = golden("param_groups")
    model = timm.create_model("resnet50")
    ids = optim.layer_ids(model)
    assert list(ids.values()) == tensors["out/resnet50/layer_id"].tolist()
    groups = optim.param_groups(model, 0.02, layer_decay=0.7, lr=1.0)
    by_name = {name: group for group in groups for name in group["names"]}
    assert by_name["fc.weight"]["lr"] == 1.0
    assert by_name["conv1.weight"]["lr"] == pytest.approx(0.7**7)
    assert by_name["layer2.3.bn1.weight"]["weight_decay"] == 0.0
    assert by_name["layer2.3.conv1.weight"]["weight_decay"] == 0.02
    scale = torch.tensor([by_name[name]["wd_scale"] for name, _ in model.named_parameters()])
    assert scale.tolist() == tensors["out/resnet50/weight_decay_scale"].tolist()


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_small"])
def test_timm_convnext_has_thirteen_or_seven_layers(name: str) -> None:
    with torch.device("meta"):
        ids = optim.layer_ids(timm.create_model(name))
    assert max(ids.values()) == (13 if name == "convnext_small" else 7)
    assert ids["stem.0.weight"] == 0
    assert ids["stages.0.blocks.0.gamma"] == 1
    assert ids["stages.2.downsample.1.weight"] == 3
    assert ids["head.fc.weight"] == max(ids.values())


@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_b0", "vit_tiny_patch16_224", "resnet18"])
def test_other_timm_models_are_ordered_by_their_own_rule(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    ids = optim.layer_ids(model)
    assert set(ids) == {n for n, _ in model.named_parameters()}
    assert min(ids.values()) == 0
    head = next(n for n in ids if n.startswith(("head", "fc", "classifier")))
    assert ids[head] == max(ids.values())


def test_parameters_around_a_model_keep_the_full_rate() -> None:
    outer = nn.Sequential(timm.create_model("resnet18"), nn.Linear(4, 4))
    by_name = {n: g["lr_scale"] for g in optim.param_groups(outer, 0.1, layer_decay=0.5) for n in g["names"]}
    assert by_name["1.weight"] == 1.0
    assert by_name["0.conv1.weight"] < by_name["0.layer1.0.conv1.weight"] < by_name["0.layer4.0.conv1.weight"]


def test_layer_decay_without_a_timm_model_is_an_error() -> None:
    with pytest.raises(UserError, match="Linear holds none"):
        optim.param_groups(nn.Linear(2, 2), 0.1, layer_decay=0.5)
    with pytest.raises(UserError, match="no ResNet or ConvNeXt"):
        optim.layer_ids(["a.weight"])


def test_frozen_parameters_are_left_out_and_everything_may_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert [g["names"] for g in optim.param_groups(model, 0.1)] == [["1.weight"], ["1.bias"]]
    assert [g["names"] for g in optim.param_groups(model, 0.1, no_decay=None)] == [["1.weight", "1.bias"]]


def test_multistep_is_the_rotation_papers_table() -> None:
    # arXiv 1803.07728 on CIFAR-10: 0.1 until epoch 60, 0.02 until 120, 0.004 until 160, then 0.0008.
    schedule = optim.Schedule(0.1, 200, shape="multistep", milestones=(60, 120, 160), gamma=0.2)
    at = {step: schedule.at(step)[0] for step in (0, 59, 60, 119, 120, 160, 199)}
    assert list(at.values()) == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008])


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_ends_of_the_falling_shapes(shape: str) -> None:
    schedule = optim.Schedule(2.0, 11, 0.1, 0.3, shape=shape, final_lr_ratio=0.01)
    assert schedule.at(0) == pytest.approx((2.0, 0.1))
    assert schedule.at(5) == pytest.approx((1.01, 0.2))
    assert schedule.at(10) == pytest.approx((0.02, 0.3))
    assert optim.Schedule(2.0, 1, shape=shape).at(0) == (2.0, 0.0)


def test_rates_are_the_schedule_times_each_groups_factors() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = optim.complete_groups([{"params": [a], "lr": 0.05}, {"params": [b], "weight_decay": 0.0}], 0.1, 0.2)
    optimizer = optim.create_optimizer("adamw", groups, lr=0.1, weight_decay=0.2)
    optim.set_rates(optimizer, 1.0, 0.4)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.4), (1.0, 0.0)]


def test_unknown_optimisers_and_arguments_are_told() -> None:
    weights = [nn.Parameter(torch.ones(1))]
    with pytest.raises(UserError, match="Nearest: adamw"):
        optim.create_optimizer("adamww", weights, lr=0.1)
    with pytest.raises(UserError, match="does not take"):
        optim.create_optimizer("adamw", weights, lr=0.1, max_grad_norm=1.0)
    with pytest.raises(UserError, match="takes no betas"):
        optim.create_optimizer("sgd", weights, lr=0.1, betas=(0.9, 0.95))
