"""The recipe of relevance pruning: the plane, a person's own network, and pictures to explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import isthmus
from isthmus.codec import UserError, create_timm
from isthmus.data import load
from isthmus.engine import Run, Training
from isthmus.recipes import lrp_pruning
from isthmus.recipes.lrp_pruning import Config
from isthmus.tasks import applying

SHORT = Training(steps=4, batch_size=32, optimizer="sgd", lr=0.05)


def finished(folder: Path, config: Config, **options: Any) -> tuple[Path, dict[str, float], dict[str, Any]]:
    lrp_pruning.check(config)
    with Run.quick(folder, name="lrp-pruning", config=config, **options) as run:
        lrp_pruning.run(config, run)
    report = json.loads((run.dir / "report.json").read_text())
    return run.dir, {name: entry["value"] for name, entry in report["metrics"].items()}, report


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], dict[str, Any]]:
    short = Training(steps=60, batch_size=400, optimizer="momentum", lr=0.05, schedule="constant")
    config = Config(
        width=24, shots=(1, 3), draws=1, plane=short, training=SHORT, test_images=60, step=0.5, others=("random",)
    )
    return finished(tmp_path_factory.mktemp("plane"), config)


def test_the_plane_compares_every_criterion(plane: tuple[Path, dict[str, float], dict[str, Any]]) -> None:
    metrics = plane[1]
    for few in (1, 3):
        taylors = [metrics[f"plane_accuracy_{name}_{few}"] for name in ("taylor", "taylor_plain", "taylor_sample")]
        gain = metrics[f"plane_accuracy_relevance_{few}"] - max(taylors)
        assert metrics[f"plane_gain_over_taylor_{few}"] == pytest.approx(gain)
        assert metrics[f"plane_accuracy_weight_{few}"] == metrics["plane_accuracy_weight_1"]  # needs no references
    assert metrics["plane_cut_difference"] < 1e-5
    names = {figure["name"] for figure in plane[2]["figures"]}
    assert {"plane", "decisions", "pruning", "relevance_before", "relevance_after", "layers"} <= names


def test_the_kept_network_is_smaller_and_explains_pictures(
    plane: tuple[Path, dict[str, float], dict[str, Any]], tmp_path: Path
) -> None:
    folder, metrics, _ = plane
    network = isthmus.load(folder).model
    assert sum(p.numel() for p in network.parameters()) == metrics["parameters_after"] < metrics["parameters_before"]
    assert metrics["macs_after"] < metrics["macs_before"]
    digit = load("digits", "test")[3]["image"].permute(1, 2, 0).numpy()
    Image.fromarray(digit).save(tmp_path / "three.png")
    written = applying.apply(folder, [tmp_path / "three.png"], tmp_path / "out", lrp_pruning.answer)
    assert [path.name for path in written] == ["answers.json", "three-answer.png"]
    found = json.loads(written[0].read_text())
    assert found[str(tmp_path / "three.png")]["class"] in {str(n) for n in range(10)}


def test_a_persons_own_network_is_pruned_and_fine_tuned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(create_timm("cifar_resnet20", num_classes=10).state_dict(), tmp_path / "mine.safetensors")
    own = {
        "model": "timm:cifar_resnet20",
        "checkpoint": str(tmp_path / "mine.safetensors"),
        "data": "digits",
        "size": 8,
    }
    config = Config(**own, keep=0.6, step=0.2, references=1, finetune=True, finetuning=SHORT, others=(), test_images=40)
    _, metrics, report = finished(tmp_path, config)
    assert metrics["filters_left"] == pytest.approx(0.6, abs=0.01)
    assert {"finetune_relevance_1", "finetune_relevance_2"} <= {curve.split("/")[0] for curve in report["curves"]}


def test_the_built_in_network_keeps_its_stream_and_a_persons_own_does_not() -> None:
    network = create_timm("cifar_resnet20", num_classes=3)
    own = Config(data="digits", model="timm:cifar_resnet20")
    assert {name.rpartition(".")[2] for name in lrp_pruning._layers(Config(), network)} == {"conv1"}
    assert len(lrp_pruning._layers(own, network)) == 19
    assert lrp_pruning._layers(Config(layers="linear"), network) == ["head.classifier"]


def test_the_papers_networks_have_its_stem_and_its_number_of_filters() -> None:
    for name, filters, parameters in (("resnet18_cifar", 4800, 11_173_962), ("resnet50_cifar", 26_560, 23_520_842)):
        with torch.device("meta"):
            network = create_timm(name, num_classes=10)
        convs = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
        assert sum(conv.out_channels for conv in convs) == filters
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert network.forward_features(torch.zeros(1, 3, 32, 32, device="meta")).shape[-2:] == (4, 4)
    assert Config.paper().model == "timm:resnet50_cifar"


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "needs the name of its network": {"checkpoint": "x.safetensors"},
        "takes timm:NAME": {"model": "hub:thing", "data": "digits"},
        "give pictures with --data": {"model": "timm:resnet18"},
        "all three sets": {"data": "planar:moon"},
        r"does not take pictures of 30×30 pixels .* give --size": {
            "data": "digits",
            "model": "timm:vit_tiny_patch16_224",
            "size": 30,
        },
        "no criterion 'magnitude'": {"criterion": "magnitude"},
        "there is no checkpoint": {"data": "digits", "model": "timm:resnet18", "checkpoint": "none.safetensors"},
    }
    for i, (message, settings) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=message):
            finished(tmp_path / str(i), Config(**settings))
    three = create_timm("cifar_resnet20", num_classes=3).state_dict()
    save_file(three, tmp_path / "three.safetensors")
    settings: dict[str, Any] = {
        "data": "digits",
        "model": "timm:cifar_resnet20",
        "checkpoint": str(tmp_path / "three.safetensors"),
    }
    with pytest.raises(UserError, match="is for 3 classes, digits has 10"):
        finished(tmp_path / "three", Config(**settings))
