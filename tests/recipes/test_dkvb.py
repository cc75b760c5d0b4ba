"""The key-value bottleneck's recipe: the stream, its baselines, any encoder, classifying, teaching, published files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import isthmus
from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.cli.flags import check
from isthmus.codec import UserError
from isthmus.data import load
from isthmus.engine import Run
from isthmus.recipes import dkvb
from isthmus.recipes.dkvb import Config, _sgd
from isthmus.tasks import continual, heaps
from isthmus.tasks.continual import Stream
from tests.encoders.test_trained import published

SMALL = Config(
    codebooks=24,
    pairs=64,
    key_epochs=4,
    stream=_sgd(30.0, 1.0, epochs=5),
    probe=_sgd(0.1, epochs=15),
    finetune=_sgd(0.05, epochs=2),
    baselines=("probe", "finetune"),
    fewer_pairs=(4,),
    toy=False,
)


def _pictures(folder: Path, images: list[Tensor], names: list[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, names, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with Run.quick(tmp_path_factory.mktemp("dkvb"), name="dkvb", config=SMALL) as run:
        dkvb.run(SMALL, run)
    return run.dir, json.loads((run.dir / "report.json").read_text())


def test_the_bottleneck_keeps_what_others_forget(trained: tuple[Path, dict[str, Any]]) -> None:
    metrics = {name: entry["value"] for name, entry in trained[1]["metrics"].items()}
    assert metrics["accuracy_dkvb"] > 0.85
    assert metrics["accuracy_dkvb"] > metrics["accuracy_probe"] + 0.1 > 0.2
    assert metrics["accuracy_finetune"] < 0.4, "the last two classes, of ten"
    assert metrics["forgotten_dkvb"] < 0.1 < metrics["forgotten_probe"]
    assert metrics["gain_over_probe"] == pytest.approx(metrics["accuracy_dkvb"] - metrics["accuracy_probe"])
    assert metrics["gap_to_shuffled_probe"] == pytest.approx(
        metrics["accuracy_probe_shuffled"] - metrics["accuracy_dkvb"]
    )
    assert metrics["least_gain_of_more_pairs"] == pytest.approx(
        metrics["accuracy_dkvb"] - metrics["accuracy_dkvb_4_pairs"]
    )
    assert {"stream", "kept", "pairs", "confusion", "examples"} <= {f["name"] for f in trained[1]["figures"]}


def test_pictures_are_classified(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    test = load("digits", "test", ("image", "label"))
    samples = [test[i] for i in range(12)]
    paths = _pictures(tmp_path / "in", [s["image"] for s in samples], [f"{i}.png" for i in range(12)])
    (tmp_path / "in" / "text.txt").write_text("no picture")
    written = dkvb.apply(trained[0], [*paths, tmp_path / "in" / "text.txt"], tmp_path / "out")
    assert len(written) == 13
    assert all(path.is_file() for path in written)
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    right = sum(answers[str(p)]["class"] == str(int(s["label"])) for p, s in zip(paths, samples, strict=True))
    assert right >= 9
    assert "skipped" in answers[str(tmp_path / "in" / "text.txt")]
    with pytest.raises(UserError, match="none of the inputs can be used"):
        dkvb.apply(trained[0], [tmp_path / "in" / "text.txt"], tmp_path / "out")


def test_a_new_class_is_taught_and_the_old_ones_stay(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    stripes = [(torch.arange(8) % 2 * 255)[None, :, None].expand(3, 8, 8).to(torch.uint8) - i for i in range(6)]
    lessons = _pictures(tmp_path / "teach" / "stripes", stripes[:4], [f"{i}.png" for i in range(4)])
    asked = _pictures(tmp_path / "ask", stripes[4:], ["4.png", "5.png"])
    written = dkvb.apply(trained[0], [*lessons, *asked], tmp_path / "out")
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [answers[str(path)]["class"] for path in asked] == ["stripes", "stripes"]
    assert str(lessons[0]) not in answers
    assert tmp_path / "out" / "classifier" / "saved.json" in written

    before, kept = isthmus.load(trained[0]).model, isthmus.load(tmp_path / "out" / "classifier")
    after = kept.model
    assert kept.labels[-1] == "stripes"
    images = load("digits", "test", ("image",)).fetch(range(200))["image"].float() / 255
    old, new = before(images).prediction.argmax(1), after(images).prediction.argmax(1)
    assert (old == new).float().mean() > 0.95

    empty = tmp_path / "teach" / "stripes" / "note.txt"
    empty.write_text("no picture")
    with pytest.raises(UserError, match="nothing to learn from"):
        dkvb.apply(trained[0], [empty], tmp_path / "other")


def test_any_network_of_timm_is_an_encoder(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SMALL,
        data="random:32?count=60&classes=4",
        key_data="random:32?count=40",
        encoder="resnet10t",
        size=32,
        pool=False,
        codebooks=8,
        pairs=16,
        splitter="chunk",
        stream=_sgd(1.0, 1.0, epochs=1),
        probe=_sgd(0.1, epochs=1),
        key_epochs=1,
        fewer_pairs=(),
    )
    with Run.quick(tmp_path, name="dkvb", config=config, max_steps=1) as run:
        dkvb.run(config, run)
    kept = isthmus.load(run.dir)
    codec = kept.model
    assert kept.inputs.size == (32, 32)
    assert codec(torch.rand(3, 3, 32, 32)).prediction.shape == (3, 4)
    assert isinstance(codec.bottleneck, KeyValueBottleneck)
    assert codec.bottleneck.splitter.channels == 512


BRIEF = dataclasses.replace(
    SMALL,
    data="random:32?count=60&classes=4",
    codebooks=4,
    pairs=8,
    stream=_sgd(1.0, 1.0, epochs=1),
    probe=_sgd(0.1, epochs=1),
    key_epochs=1,
    baselines=(),
    fewer_pairs=(),
)


def test_weights_come_from_a_file_under_published_names(tmp_path: Path) -> None:
    """As those of the CIFAR networks are spread; their normalisation and their 32 pixels come along."""
    torch.manual_seed(0)
    network: Any = timm.create_model("cifar_resnet20").eval()
    save_file(published(network), tmp_path / "published.safetensors")
    weights = str(tmp_path / "published.safetensors")
    config = dataclasses.replace(BRIEF, encoder="cifar_resnet20", weights=weights)
    with Run.quick(tmp_path, name="dkvb", config=config, max_steps=1) as run:
        dkvb.run(config, run)
    kept = isthmus.load(run.dir)
    codec = kept.model
    assert (kept.inputs.size, kept.inputs.mean) == ((32, 32), network.pretrained_cfg["mean"])
    images = torch.rand(2, 3, 32, 32)
    encoder: Any = codec.encoder
    torch.testing.assert_close(encoder(images)[0][:, 0] + encoder.mean, network.forward_features(images).mean((2, 3)))


def test_networks_made_for_one_size_take_another(tmp_path: Path) -> None:
    config = dataclasses.replace(BRIEF, encoder="vit_tiny_patch16_224", size=32)
    with Run.quick(tmp_path, name="dkvb", config=config, max_steps=1) as run:
        dkvb.run(config, run)
    kept = isthmus.load(run.dir)
    codec = kept.model
    assert kept.inputs.size == (32, 32)
    assert codec(torch.rand(1, 3, 32, 32)).prediction.shape == (1, 4)


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(BRIEF, data="random:8?count=200&classes=4", baselines=("probe",), fewer_pairs=(4,))
    with Run.quick(tmp_path / "whole", name="dkvb", config=config) as run:
        dkvb.run(config, run)
    whole = json.loads((run.dir / "report.json").read_text())["metrics"]

    measured = Stream.measure
    calls = itertools.count()

    def until(self: Stream, *arguments: Any) -> Tensor:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return measured(self, *arguments)

    monkeypatch.setattr(Stream, "measure", until)
    with pytest.raises(KeyboardInterrupt), Run.quick(tmp_path, name="dkvb", config=config) as run:
        dkvb.run(config, run)
    monkeypatch.undo()
    with Run.quick(tmp_path, name="dkvb", config=config, resume=True) as run:
        assert run.resumed
        dkvb.run(config, run)
    again = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert {name: entry["value"] for name, entry in again.items()} == {
        name: entry["value"] for name, entry in whole.items()
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"split": 0}, "--split is at least 1"),
        ({"split": 11}, "--split lies between 1 and the 10 classes"),
        ({"encoder": "resnet10"}, "timm has no model"),
        ({"splitter": "chunk", "codebooks": 7}, "64 channels cannot be cut into 7"),
        ({"data": "digits:128"}, "too many to be an embedding"),
        ({"encoder": "resnet10t", "weights": "nowhere.safetensors"}, "there is no checkpoint nowhere.safetensors"),
        ({"encoder": "resnet10t", "pretrained": True}, "weights of resnet10t cannot be had.*give them with --weights"),
        ({"encoder": "resnet10t", "reduction": 5}, "levels of reduction"),
        ({"size": 0}, "--size is at least 1, got 0"),
        ({"weights": "some.pth"}, "pixels have no weights.*--encoder"),
        ({"codebooks": 0}, "--codebooks is at least 1"),
        ({"key_dim": -1}, "--key-dim is at least 1"),
        ({"topk": 8}, "between 1 and the 4 pairs"),
        ({"fewer_pairs": (0,)}, "--fewer-pairs is at least 1"),
        ({"key_epochs": 0}, "--key-epochs is at least 1"),
        ({"key_batch": -2}, "--key-batch is at least 1"),
        ({"smoothing": 1.5}, "--smoothing is at least 0 and below 1"),
    ],
)
def test_impossible_settings_are_told(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, **changes)
    if config.pretrained:
        monkeypatch.setattr(continual, "create_timm", _unreachable)
    with pytest.raises(ValueError, match=told):
        _run(config, tmp_path)
    assert not list(tmp_path.glob("*/checkpoints/*")), "told before anything is trained"


def _run(config: Config, folder: Path) -> None:
    check(dkvb, config)
    with Run.quick(folder, name="dkvb", config=config) as run:
        dkvb.run(config, run)


def _unreachable(name: str, **kwargs: Any) -> None:
    raise OSError("no network")


# ----------------------------------------------------------------------------------------------------------- measures


def test_what_is_forgotten_is_measured_from_the_end_of_a_class_own_task() -> None:
    tasks = [[0, 2], [1, 3]]
    history = torch.tensor([[0.8, 0.0, 1.0, 0.0], [0.3, 0.9, 0.5, 0.7]])
    assert continual.forgotten(history, tasks) == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)
    assert continual.averages(history) == pytest.approx([0.45, 0.6])


def test_passes_differ_in_order_and_stop_at_the_limit() -> None:
    features = torch.arange(10.0)[:, None, None]
    passes = continual.Passes(features, 4, torch.Generator().manual_seed(0), 3, torch.device("cpu"))
    first, second = [b[0] for b in passes], [b[0] for b in passes]
    assert [len(b) for b in first + second] == [4, 4, 4]
    assert not torch.equal(first[0], second[0])


def test_eight_heaps_are_kept_by_the_bottleneck_alone(tmp_path: Path) -> None:
    points, label = heaps.heaps(torch.Generator().manual_seed(0))
    models = {"linear": nn.Linear(2, 8), "MLP": nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 8))}
    found = heaps.draw(models, points, label, steps=30, lr=3e-2)
    assert max(found.accuracy.values()) < 0.6
    assert len(found.figure.axes) == 8
    with Run.quick(tmp_path, name="dkvb", config=SMALL, max_steps=60) as run:
        dkvb._draw_heaps(run)
    metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert set(metrics) == {
        f"heaps_{name}" for name in ("accuracy_bottleneck", "accuracy_mlp", "accuracy_linear", "gain")
    }
