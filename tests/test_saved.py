"""A kept model comes back with everything that is needed to use it, or the reason is one sentence."""

import json
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus import saved
from isthmus.codec import Codec, UserError, create_timm
from isthmus.data.inputs import Inputs
from isthmus.data.transforms import CenterCrop, Compose, Normalize, Resize
from isthmus.encoders.images.inceptionnext import mixer_network
from isthmus.encoders.images.pixels import Pixels


@pytest.fixture
def folder(tmp_path):
    model = create_timm("convnext_atto_ols", num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    inputs = Inputs.of(model, (48, 64))
    return saved.save(tmp_path / "runs" / "x" / saved.KEPT / "network", model, inputs, ["a", "b", "c"], {"k": 2})


def test_a_run_gives_its_model_back_with_inputs_labels_and_facts(folder):
    found = isthmus.load(folder.parent.parent)
    again = isthmus.load(str(folder))
    x = torch.rand(2, 3, 48, 64)
    assert torch.equal(found.model(x), again.model(x))
    assert found.inputs.size == (48, 64)
    assert found.inputs.crop_pct == 1.0  # smaller than the model was made for
    assert found.labels == ["a", "b", "c"]
    assert found.facts == {"k": 2}
    assert not found.model.training


def test_a_network_made_by_a_function_is_made_again(tmp_path):
    model = mixer_network("3x3", (1, 1), (8, 16), mlp_ratios=2.0, num_classes=2, stem_stride=2).eval()
    found = saved.load(saved.save(tmp_path, model, Inputs(size=(8, 8))))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(found.model(x), model(x))


def test_timm_reads_the_weights_with_another_number_of_classes(folder):
    import timm

    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    model = timm.create_model("convnext_atto_ols", num_classes=3, checkpoint_path=folder / saved.WEIGHTS, **sizes)
    assert torch.equal(model.head.fc.weight, saved.load(folder).model.head.fc.weight)


def test_the_model_that_the_report_lists_first_is_the_first(folder):
    run = folder.parent.parent
    saved.save(run / saved.KEPT / "another", saved.load(folder).model, Inputs(size=(8, 8)), ["z"])
    assert saved.load(run).labels == ["z"]
    (run / "report.json").write_text(json.dumps({"artifacts": [{"name": "network"}, {"name": "another"}]}))
    assert saved.load(run).labels == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / saved.FACTS).write_text("{"), "cannot be read"),
        (lambda f: (f / saved.FACTS).write_text("[]"), "no JSON object"),
        (lambda f: (f / saved.WEIGHTS).unlink(), "model.safetensors"),
        (lambda f: (f / saved.WEIGHTS).write_bytes(b"no"), "model.safetensors"),
        (lambda f: _change(f, format=99), "format 99"),
        (lambda f: _change(f, labels=[1]), "labels"),
        (lambda f: _change(f, inputs={"size": "big"}), "inputs"),
        (lambda f: _change(f, model={"target": "os:system"}), "refused"),
        (lambda f: _change(f, model=3), "no model"),
        (lambda f: _change(f, model={"target": "timm:resnet18", "kwargs": []}), "an object of kwargs"),
        (lambda f: _change(f, model={"target": "isthmus:LinearProbe", "kwargs": {"wide": 1}}), "cannot be made of"),
        (lambda f: (f / saved.FACTS).write_text('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}"), "cannot be read"),
        (lambda f: _drop(f, "inputs"), "lacks model or inputs"),
    ],
)
def test_what_is_damaged_is_told_in_one_sentence(folder, damage, told):
    damage(folder)
    with pytest.raises(UserError, match=told):
        saved.load(folder)


def _change(folder, **values):
    path = folder / saved.FACTS
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _drop(folder, name):
    path = folder / saved.FACTS
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))


class Mine(torch.nn.Module):
    """A decoder of one's own."""

    def __init__(self, channels, classes):
        super().__init__()
        self.linear = torch.nn.Linear(channels, classes)

    def forward(self, features):
        return self.linear(features[-1].mean((2, 3)))


def test_a_part_of_ones_own_is_given_at_loading(tmp_path):
    codec = Codec(Pixels(), decoder=Mine(3, 2)).eval()
    saved.save(tmp_path, codec, Inputs(size=(8, 8)))
    with pytest.raises(UserError, match=r"decoder=Mine\(…\)"):
        saved.load(tmp_path)
    with pytest.raises(UserError, match=r"no part head; its parts are model, encoder, bottleneck, decoder"):
        saved.load(tmp_path, head=Mine(3, 2))
    with pytest.raises(UserError, match=r"linear.weight is \(2, 3\), the model's is \(4, 3\) \(and 1 more"):
        saved.load(tmp_path, decoder=Mine(3, 4))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(saved.load(tmp_path, decoder=Mine(3, 2)).model(x).prediction, codec(x).prediction)


def test_a_whole_model_of_ones_own_is_given_at_loading(tmp_path):
    model = Mine(3, 2).eval()
    saved.save(tmp_path, model, Inputs(size=(8, 8)), ["a", "b"])
    x = [torch.rand(2, 3, 8, 8)]
    assert torch.equal(saved.load(tmp_path, model=Mine(3, 2)).model(x), model(x))


def test_the_inputs_of_a_timm_model_are_its_own(tmp_path):
    """Crop share, normalisation and interpolation of the model's data config come back, and make the same pictures."""
    model = create_timm("vit_tiny_patch16_224", num_classes=2, depth=1)
    found = saved.load(saved.save(tmp_path, model, Inputs.of(model)))
    assert found.inputs == Inputs(
        size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, interpolation="bicubic"
    )
    batch = {"image": torch.rand(1, 3, 250, 300)}
    same = Compose([Resize(round(224 / 0.9)), CenterCrop(224), Normalize((0.5,) * 3, (0.5,) * 3)])
    got, wanted = (t(batch, torch.Generator())["image"] for t in (found.inputs.transform(), same))
    assert torch.equal(got, wanted)


def test_a_repository_of_the_hub_is_read_like_a_folder(folder, monkeypatch):
    asked = []

    def fake(repository, name, revision=None):
        asked.append((repository, name, revision))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    assert saved.load("someone/network", revision="v1").labels == ["a", "b", "c"]
    assert asked == [("someone/network", saved.FACTS, "v1"), ("someone/network", saved.WEIGHTS, "v1")]


@pytest.mark.parametrize("source", ["typo", "./typo", "/typo/typo", "a/b/c", "runs/typo", Path("some/one"), "~/x", ""])
def test_what_cannot_be_a_repository_never_asks_the_network(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asked the network"))
    for read in (saved.load, Codec.from_pretrained):
        with pytest.raises(UserError):
            read(source)


def test_a_codec_folder_says_who_reads_it(tmp_path):
    Codec(Pixels()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Codec\.from_pretrained"):
        saved.load(tmp_path)


def test_a_folder_of_an_earlier_version_says_what_to_do(tmp_path):
    (tmp_path / "network.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds network.safetensors without what it is fed.*run the recipe again"):
        saved.load(tmp_path)


def test_a_kill_between_weights_and_facts_leaves_no_half_of_another_model(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save_weights", full)
    with pytest.raises(OSError, match="No space"):
        saved.save(folder, Mine(3, 2), Inputs())
    with pytest.raises(UserError, match="no kept model"):
        saved.load(folder)


def test_a_folder_without_a_model_and_a_missing_one_say_so(tmp_path):
    with pytest.raises(UserError, match="no kept model"):
        saved.load(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        saved.load("typo")


def test_facts_are_plain_values(tmp_path):
    with pytest.raises(UserError, match="a fact"):
        saved.save(tmp_path, mixer_network("3x3", (1,), (8,), mlp_ratios=1.0), Inputs(), facts={"x": float("nan")})
