"""RotNet's recipe: it learns what it should from a folder, turns photographs upright, and reads published files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from isthmus.bounds import check_fields
from isthmus.codec import UserError, create_timm
from isthmus.codec.published import convert
from isthmus.data import Memory
from isthmus.data.transforms.turned import Turned
from isthmus.decoders.probes import NonLinearProbe
from isthmus.encoders.images.alexnet import AlexNet
from isthmus.encoders.images.nin import NetworkInNetwork
from isthmus.engine import Run, Training
from isthmus.recipes import rotnet
from isthmus.recipes.rotnet import Config
from isthmus.tasks import applying, pretraining

FEW = Training(steps=4, batch_size=16, optimizer="sgd", lr=0.05)


def _photographs(folder: Path, count: int = 64, size: tuple[int, int] = (20, 16)) -> Path:
    """Landscapes in the sheet's sense: bright above, dark below, with noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        sky = np.linspace(220, 30, size[1])[:, None, None] + rng.normal(0, 20, (size[1], size[0], 3))
        Image.fromarray(sky.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def _run(tmp_path: Path, config: Config, **options: object) -> tuple[Path, dict]:
    with Run.quick(tmp_path, name="rotnet", config=config, **options) as run:
        rotnet.run(config, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def _checked(config: Config) -> None:
    check_fields(config)
    rotnet.check(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A run on a folder of wide pictures without labels."""
    tmp_path = tmp_path_factory.mktemp("rotnet")
    folder = _photographs(tmp_path / "photographs")
    training = dataclasses.replace(FEW, steps=40)
    config = Config(data=f"folder:{folder}", pretrain=training, eval_split="all")
    return _run(tmp_path, config)


def test_learns_the_upright_orientation_and_nothing_from_turned_images(trained: tuple[Path, dict]) -> None:
    _, report = trained
    metrics = {name: entry["value"] for name, entry in report["metrics"].items()}
    assert metrics["rotation_accuracy"] > 0.9
    assert metrics["control_accuracy"] < 0.6
    assert metrics["four_turns_error"] == 0
    assert any("no labels" in note for note in report["notes"])
    assert {"rotations", "filters", "confusion"} == {figure["name"] for figure in report["figures"]}


def test_timm_loads_the_encoder(trained: tuple[Path, dict]) -> None:
    folder, _ = trained
    network = timm.create_model("nin_cifar_tiny", checkpoint_path=str(folder / pretraining.ENCODER))
    saved = load_file(folder / pretraining.ENCODER)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in network.state_dict().items())


def test_apply_turns_photographs_upright(trained: tuple[Path, dict], tmp_path: Path) -> None:
    folder, _ = trained
    upright = Image.open(next(_photographs(tmp_path / "new", 1).iterdir()))
    inputs = []
    for degrees, turn in (
        (0, None),
        (90, Image.Transpose.ROTATE_90),
        (180, Image.Transpose.ROTATE_180),
        (270, Image.Transpose.ROTATE_270),
    ):
        inputs.append(tmp_path / f"{degrees}.png")
        (upright if turn is None else upright.transpose(turn)).save(inputs[-1])
    written = applying.apply(folder, inputs, tmp_path / "out", rotnet.answer)
    assert all(path.exists() for path in written)
    found = json.loads((tmp_path / "out" / "answers.json").read_text())
    for degrees, path in zip((0, 90, 180, 270), inputs, strict=True):
        entry = found[str(path)]
        assert entry["rotated_by"] == degrees
        assert sum(entry["probability"].values()) == pytest.approx(1, abs=1e-3)
        turned = Image.open(tmp_path / "out" / f"{degrees}-upright.png")
        assert np.array_equal(np.asarray(turned), np.asarray(upright))


def test_few_pictures_without_labels_and_a_moving_average(tmp_path: Path) -> None:
    folder = _photographs(tmp_path / "few", count=4)
    training = dataclasses.replace(FEW, batch_size=2, ema=0.5)
    config = Config(data=f"folder:{folder}", pretrain=training, control=False, train_split="all", eval_split="all")
    run_dir, report = _run(tmp_path, config)
    assert "rotation_accuracy" in report["metrics"]
    averaged = torch.load(run_dir / "checkpoints" / "pretrain.result.pt", weights_only=True)["ema"]
    saved = load_file(run_dir / pretraining.ENCODER)
    assert all(torch.equal(averaged[f"encoder.{name}"], tensor) for name, tensor in saved.items())


def test_size_is_that_of_the_images_up_to_what_the_network_was_made_for(tmp_path: Path) -> None:
    for images, network, size in (
        ((20, 50), "nin_cifar_tiny", 20),
        ((100, 80), "resnet10t", 64),
        ((500, 600), "resnet10t", 160),
        ((500, 600), "nin_cifar_tiny", 32),
    ):
        dataset = Memory("images", {"image": torch.zeros(1, 3, *images, dtype=torch.uint8)})
        assert pretraining.natural_size(dataset, timm.create_model(network)) == size


def test_probe_of_kept_features_is_measured_beside_the_untrained_network(tmp_path: Path) -> None:
    probe = dataclasses.replace(FEW, steps=150, lr=0.1, weight_decay=0.02, batch_size=50)
    config = Config(data="digits:16", size=16, pretrain=FEW, probe=probe, control=False, labels=(20, 5))
    _, report = _run(tmp_path, config)
    metrics = {name: entry["value"] for name, entry in report["metrics"].items()}
    for number in (20, 5):
        probed, untrained = metrics[f"probe_{number}_per_class"], metrics[f"probe_{number}_per_class_untrained"]
        assert metrics[f"gain_{number}_per_class"] == pytest.approx(probed - untrained)
        assert probed > 0.4, "chance is 0.1"
    assert metrics["probe_20_per_class"] > metrics["probe_5_per_class"]
    assert "probes" in {figure["name"] for figure in report["figures"]}
    assert "control_accuracy" not in metrics


def test_published_classifiers_train_with_augmentation_few_labels_and_from_scratch(tmp_path: Path) -> None:
    for head in ("conv", "nonlinear"):
        config = Config(
            data="digits:16",
            size=16,
            padding=2,
            pretrain=FEW,
            probe=FEW,
            control=False,
            head=head,  # type: ignore[arg-type]
            labels=(5,),
            scratch=True,
            augment=True,
            wrap=True,
            eval_split="val",
        )
        folder, report = _run(tmp_path / head, config)
        assert {"probe_5_per_class", "probe_5_per_class_untrained", "scratch_5_per_class"} <= report["metrics"].keys()
        state = torch.load(folder / "checkpoints" / "probe_5_per_class.result.pt", weights_only=True)["model"]
        assert ("head.block.0.conv.weight" in state) == (head == "conv")


@pytest.mark.parametrize(
    ("encoder", "rotations"),
    [
        ("resnet10t", (0, 180)),
        ("vit_tiny_patch16_224", (90, 270)),
        ("rotnet_alexnet", tuple(range(0, 360, 45))),
    ],
)
def test_takes_any_timm_network_and_other_rotations(
    tmp_path: Path, encoder: str, rotations: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder == "rotnet_alexnet":  # its 57 million weights say no more than these
        monkeypatch.setattr(rotnet, "create_timm", lambda name, **kw: create_timm(name, widths=(4,) * 6, **kw))
    size = 64 if encoder == "rotnet_alexnet" else 32
    config = Config(
        data=f"random:{size}?count=64",
        encoder=encoder,
        size=size,
        rotations=rotations,
        circle=len(rotations) == 8,
        pretrain=dataclasses.replace(FEW, batch_size=4),
        probe=dataclasses.replace(FEW, batch_size=4),
    )
    folder, report = _run(tmp_path, config, max_steps=1)
    assert 0 <= report["metrics"]["rotation_accuracy"]["value"] <= 1
    picture = tmp_path / "one.png"
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(picture)
    assert len(applying.apply(folder, [picture], tmp_path / "out", rotnet.answer)) == 2


def test_probes_read_alexnet_by_its_own_end_and_by_pooled_maxima(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotnet, "create_timm", lambda name, **kw: create_timm(name, widths=(4,) * 6, **kw))
    probe = dataclasses.replace(FEW, batch_size=20)
    config = Config(
        "digits:64", encoder="rotnet_alexnet", size=64, pretrain=FEW, probe=probe, control=False, labels=(2,)
    )
    for change in ({"head": "alexnet", "layer": 3}, {"head": "alexnet", "layer": 4}, {"pool": "max", "grid": 3}):
        name = "-".join(map(str, change.values()))
        folder, report = _run(tmp_path / name, dataclasses.replace(config, **change), max_steps=1)
        assert "gain_2_per_class" in report["metrics"]
        state = torch.load(folder / "checkpoints" / "probe_2_per_class.result.pt", weights_only=True)["model"]
        assert ("head.conv.conv.weight" in state) == (change.get("layer") == 3)
        assert state["head.fc.weight"].shape[1] == (4096 if "layer" in change else 4 * 9)


def test_turned_images_keep_their_turn_whatever_the_batch() -> None:
    turn = Turned(7, (0, 90, 180, 270))
    images = torch.rand(256, 3, 8, 8)
    batch = {"image": images, "index": torch.arange(256)}
    turned = turn(batch, torch.Generator())["image"]
    alone = turn({"image": images[40:42], "index": torch.tensor([40, 41])}, torch.Generator().manual_seed(3))["image"]
    assert torch.equal(turned[40:42], alone)
    shares = [float((turned == torch.rot90(images, k, (2, 3))).flatten(1).all(1).float().mean()) for k in range(4)]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0.15
    other = Turned(8, (0, 90, 180, 270))(batch, torch.Generator())["image"]
    assert not torch.equal(other, turned)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": -3}, "--size is at least 1, got -3"),
        ({"labels": (20, -3)}, "--labels"),
        ({"rotations": (0, 360)}, "two different angles"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _checked(dataclasses.replace(Config(), **changes))


def test_a_probe_that_cannot_be_trained_is_refused_before_pretraining(tmp_path: Path) -> None:
    config = Config(data="digits:16", pretrain=FEW, control=False, labels=(5,))
    with pytest.raises(UserError, match=r"--probe: the source has 50 samples, fewer than one batch of 100"):
        _run(tmp_path, config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_published_schedule() -> None:
    config = Config.paper()
    for training, rates in (
        (config.pretrain, {0: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008}),
        (config.probe, {0: 0.1, 34: 0.1, 35: 0.02, 70: 0.004, 85: 0.0008, 99: 0.0008}),
    ):
        epoch = training.steps_per_epoch(50_000)
        schedule = training.schedule_for(50_000, training.length(50_000))
        for number, rate in rates.items():
            lr, weight_decay = schedule.at(number * epoch)
            assert lr == pytest.approx(rate)
            assert weight_decay == 5e-4


def test_no_verdict_without_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_SHARED", str(tmp_path))
    assert "CIFAR-10" in rotnet.no_verdict(Config())
    assert rotnet._source(Config(size=16)) == "digits:16"
    (tmp_path / "data/cifar10").mkdir(parents=True)
    (tmp_path / "data/cifar10/test.parquet").touch()
    assert rotnet.no_verdict(Config()) == ""
    assert rotnet._source(Config()).startswith("parquet:")


# ------------------------------------------------------------------------------------------- published checkpoints


def _official_nin(network: NetworkInNetwork) -> dict[str, torch.Tensor]:
    """Names as the published code wrote them, without the batch counts that PyTorch 0.2 did not have."""
    found = {}
    for name, tensor in network.state_dict().items():
        words = name.split(".")
        if words[0] == "head":
            found[f"_feature_blocks.{len(network.stages)}.Classifier.{words[-1]}"] = tensor
        elif words[-1] != "num_batches_tracked":
            block, kind = int(words[1].removeprefix("conv")), {"conv": "Conv", "bn": "BatchNorm"}[words[3]]
            found[f"_feature_blocks.{block - 1}.Block{block}_ConvB{int(words[2]) + 1}.layers.{kind}.{words[4]}"] = (
                tensor
            )
    return found


def test_converts_a_published_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NetworkInNetwork(depths=(3, 3, 3, 3), widths=(8, 6, 4)).eval()
    path = tmp_path / "model_net_epoch200"
    content = {"epoch": 200, "network": _official_nin(network)}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # as old PyTorch did
    out = convert(path, tmp_path / "nin.safetensors", "rotnet")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    arguments = json.loads(metadata["arguments"])
    again = timm.create_model(metadata["timm"], checkpoint_path=str(out), **arguments).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), network(images))


def test_converts_alexnet_and_heads(tmp_path: Path) -> None:
    network = AlexNet(widths=(4, 6, 8, 5, 5, 16))
    blocks = {"conv1": 0, "conv2": 2, "conv3": 4, "conv4": 5, "conv5": 6}
    official = {}
    for name, tensor in network.state_dict().items():
        words = name.split(".")
        if words[0] == "stages":
            official[f"_feature_blocks.{blocks[words[1]]}.{('conv', 'bn').index(words[2])}.{words[3]}"] = tensor
        elif words[1] == "fc_block":
            official[f"_feature_blocks.8.{int(words[2]) - 1}.{words[3]}"] = tensor
        else:
            official[f"_feature_blocks.9.0.{words[2]}"] = tensor
    torch.save({"epoch": 50, "network": official}, tmp_path / "alexnet")
    saved = load_file(convert(tmp_path / "alexnet", tmp_path / "alexnet.safetensors", "rotnet"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items())

    head = NonLinearProbe(12, 3)
    names = {
        "mlp.0": "Liniear_1",
        "mlp.1": "BatchNorm_1",
        "mlp.3": "Liniear_2",
        "mlp.4": "BatchNorm2d",
        "fc": "Liniear_F",
    }
    official = {}
    for name, tensor in head.state_dict().items():
        prefix, field = name.rsplit(".", 1)
        official[f"classifier.{names[prefix]}.{field}"] = tensor
    torch.save({"epoch": 1, "network": official}, tmp_path / "head")
    saved = load_file(convert(tmp_path / "head", tmp_path / "head.safetensors", "rotnet"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in head.state_dict().items())


def test_refuses_what_is_no_checkpoint_of_rotnet(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="is no checkpoint"):
        convert(tmp_path / "text", tmp_path / "out", "rotnet")
    torch.save({"network": 3}, tmp_path / "number")
    with pytest.raises(UserError, match="holds no network"):
        convert(tmp_path / "number", tmp_path / "out", "rotnet")
    torch.save({"network": {"fc.weight": torch.zeros(2)}}, tmp_path / "other")
    with pytest.raises(UserError, match=r"no (published )?checkpoint of rotnet"):
        convert(tmp_path / "other", tmp_path / "out", "rotnet")
    official = _official_nin(NetworkInNetwork(depths=(3, 1, 1), widths=(8, 6, 4)))
    del official["_feature_blocks.1.Block2_ConvB1.layers.Conv.weight"]
    torch.save({"network": official}, tmp_path / "cut")
    with pytest.raises(UserError, match=r"no (published )?checkpoint of rotnet"):
        convert(tmp_path / "cut", tmp_path / "out", "rotnet")
    assert not (tmp_path / "out").exists()


def test_refuses_networks_and_levels_that_are_not_there(tmp_path: Path) -> None:
    config = Config(data="digits:16", size=16, pretrain=FEW, control=False, layer=9)
    with pytest.raises(UserError, match="has 3 levels; --layer is from 0 to 2"):
        _run(tmp_path, config)
    with pytest.raises(UserError, match="nin_cifar"):
        _run(tmp_path / "other", dataclasses.replace(config, encoder="nin_cifa"))
