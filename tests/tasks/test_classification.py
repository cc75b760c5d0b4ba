"""One place trains classifiers: every setting that recipes inherit changes what comes out."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from torch import nn

from isthmus import saved
from isthmus.codec import UserError, create_timm
from isthmus.data.transforms.augmentation import Augmentation
from isthmus.encoders.images.inceptionnext import mixer_network
from isthmus.engine import Run, Training
from isthmus.tasks import classification
from isthmus.tasks.classification import ClassificationConfig

SHORT = Training(steps=3, batch_size=16, lr=1e-2)


def make(num_classes):
    return mixer_network("3x3", (1,), (8,), mlp_ratios=1.0, num_classes=num_classes, stem_stride=2)


def trained(tmp_path, config, name="run"):
    with Run.quick(tmp_path / name) as run:
        task = classification.open(config, run)
        arm = task.arm(make)
        return torch.cat([p.detach().flatten() for p in arm.model.parameters()]), arm.metrics["accuracy"]


CONFIG = ClassificationConfig(size=8, training=SHORT, test_images=64)

#: Every setting that changes the weights, turned.
TURNED = {
    "training.ema": replace(CONFIG, training=replace(SHORT, ema=0.5)),
    "training.clip": replace(CONFIG, training=replace(SHORT, clip=0.01)),
    "training.weight_decay": replace(CONFIG, training=replace(SHORT, weight_decay=0.9)),
    "training.patience": replace(CONFIG, training=replace(SHORT, steps=12, lr=3.0, patience=1, evaluate_every=1)),
    "augmentation.repeats": replace(CONFIG, augmentation=Augmentation(repeats=2, padding=1)),
    "augmentation.padding": replace(CONFIG, augmentation=Augmentation(padding=1)),
    "augmentation.crop": replace(CONFIG, augmentation=Augmentation(crop=0.3)),
    "augmentation.flip": replace(CONFIG, augmentation=Augmentation(flip=True)),
    "augmentation.mixup": replace(CONFIG, augmentation=Augmentation(mixup=0.5)),
    "augmentation.cutmix": replace(CONFIG, augmentation=Augmentation(cutmix=0.5)),
    "augmentation.randaugment": replace(CONFIG, augmentation=Augmentation(randaugment="rand-m9")),
    "augmentation.erasing": replace(CONFIG, augmentation=Augmentation(erasing=1.0)),
    "smoothing": replace(CONFIG, smoothing=0.3),
    "size": replace(CONFIG, size=12),
    "train_split": replace(CONFIG, train_split="train+val"),
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("usual"), CONFIG)[0]


@pytest.mark.parametrize("setting", TURNED)
def test_a_setting_that_is_turned_changes_the_weights(tmp_path, usual, setting):
    if setting == "training.patience":  # against the same without it
        config = replace(CONFIG, training=replace(TURNED[setting].training, patience=None))
        usual = trained(tmp_path, config, "without")[0]
    found = trained(tmp_path, TURNED[setting])[0]
    assert found.shape == usual.shape
    assert not torch.equal(found, usual)


def test_the_moving_average_is_what_is_measured_and_kept(tmp_path):
    config = replace(CONFIG, training=replace(SHORT, ema=0.999))
    with Run.quick(tmp_path) as run:
        task = classification.open(config, run)
        run.seed_everything("network")
        start = make(10).state_dict()
        arm = task.arm(make)
    weight = "stages.0.blocks.0.mlp.fc1.weight"
    assert torch.allclose(arm.model.state_dict()[weight], start[weight], atol=1e-3)


def test_a_kept_network_is_used_as_it_was_measured(tmp_path):
    with Run.quick(tmp_path) as run:
        task = classification.open(CONFIG, run)
        arm = task.arm(make)
        task.keep(arm.model, "a network", depth=1)
        expected = task.confusion_matrix(arm.model)
        folder = run.dir
        found = saved.load(folder)
        assert found.labels == task.classes
        assert found.facts == {"depth": 1}
        again = classification.confusion_matrix(run, found.model, task.held_out, 10, found.inputs.transform())
    assert torch.equal(again, expected)


def test_a_timm_encoder_is_fed_as_its_own_config_says(tmp_path):
    @dataclass(frozen=True)
    class WithEncoder(ClassificationConfig):
        encoder: str = "vit_tiny_patch16_224"

    with Run.quick(tmp_path) as run:
        task = classification.open(WithEncoder(size=224, training=SHORT, test_images=4), run)
    own = create_timm("vit_tiny_patch16_224").pretrained_cfg
    assert task.inputs.mean == tuple(own["mean"]) == (0.5, 0.5, 0.5)
    assert task.inputs.crop_pct == own["crop_pct"] == 0.9


def test_arms_share_start_and_budget_and_are_recorded(tmp_path):
    with Run.quick(tmp_path) as run:
        task = classification.open(CONFIG, run)
        arms = task.compare({"a": make, "b": make})
        metrics = json.loads((run.dir / "report.json").read_text())["metrics"]
    assert metrics["accuracy_a"]["value"] == arms["a"].metrics["accuracy"]
    assert metrics["parameters_a"]["value"] == metrics["parameters_b"]["value"]


def test_pictures_without_labels_are_refused_with_what_is_needed(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    with Run.quick(tmp_path) as run, pytest.raises(UserError, match="label"):
        classification.open(replace(CONFIG, data=f"folder:{tmp_path}", train_split="all"), run)


def test_test_images_0_is_all_of_them(tmp_path):
    with Run.quick(tmp_path) as run:
        task = classification.open(replace(CONFIG, test_images=0), run)
        assert task.measure(_First(10))["accuracy"] < 0.2
        assert int(task.confusion_matrix(_First(10)).sum()) == len(task.held_out) > 256


class _First(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.scores = nn.Parameter(torch.eye(num_classes)[0])

    def forward(self, x):
        return self.scores.expand(len(x), -1)
