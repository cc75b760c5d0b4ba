"""A kept model comes back with everything that is needed to use it, or the reason is one sentence."""

import json

import pytest
import torch

import isthmus
from isthmus import saved
from isthmus.codec import UserError, create_timm
from isthmus.data.inputs import Inputs
from isthmus.encoders.images.inceptionnext import mixer_network


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
        (lambda f: (f / saved.FACTS).write_text("[]"), "describes no model"),
        (lambda f: (f / saved.WEIGHTS).unlink(), "model.safetensors"),
        (lambda f: (f / saved.WEIGHTS).write_bytes(b"no"), "model.safetensors"),
        (lambda f: _change(f, format=99), "format 99"),
        (lambda f: _change(f, labels=[1]), "labels"),
        (lambda f: _change(f, inputs={"size": "big"}), "inputs"),
        (lambda f: _change(f, model={"target": "os:system"}), "refused"),
        (lambda f: _change(f, model=3), "no model"),
    ],
)
def test_what_is_damaged_is_told_in_one_sentence(folder, damage, told):
    damage(folder)
    with pytest.raises(UserError, match=told):
        saved.load(folder)


def _change(folder, **values):
    path = folder / saved.FACTS
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_without_a_model_and_a_missing_one_say_so(tmp_path):
    with pytest.raises(UserError, match="no kept model"):
        saved.load(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        saved.load("typo")


def test_facts_are_plain_values(tmp_path):
    with pytest.raises(UserError, match="a fact"):
        saved.save(tmp_path, mixer_network("3x3", (1,), (8,), mlp_ratios=1.0), Inputs(), facts={"x": float("nan")})
