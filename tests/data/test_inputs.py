"""What a model is fed comes from the model where it has something to say."""

import pytest
import timm
import torch

from isthmus.codec import UserError
from isthmus.data.inputs import Inputs, usual_crop


def test_a_timm_models_own_config_is_asked():
    with torch.device("meta"):
        model = timm.create_model("convnext_atto_ols", num_classes=3)
    own = model.pretrained_cfg
    inputs = Inputs.of(model)
    assert inputs.size == tuple(own["input_size"][1:])
    assert inputs.crop_pct == own["crop_pct"]
    assert inputs.interpolation == own["interpolation"]
    assert inputs.mean == tuple(own["mean"])


def test_inception_normalisation_is_kept():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    assert Inputs.of(model).mean == (0.5, 0.5, 0.5)


def test_smaller_pictures_than_the_model_was_made_for_are_not_cropped():
    with torch.device("meta"):
        model = timm.create_model("convnext_atto")
    assert Inputs.of(model, (32, 32)).crop_pct == 1.0


@pytest.mark.parametrize(("size", "share"), [(32, 1.0), (223, 1.0), (224, 0.875), (320, 0.875), (384, 1.0)])
def test_the_usual_crop_depends_on_the_size(size, share):
    assert usual_crop(size) == share


def test_pictures_that_are_not_square_keep_their_sides():
    inputs = Inputs(size=(24, 48), crop_pct=0.75)
    assert inputs.resized == (32, 64)
    batch = inputs.transform()({"image": torch.rand(2, 3, 50, 50)}, torch.Generator())
    assert batch["image"].shape == (2, 3, 24, 48)


def test_inputs_survive_a_file():
    inputs = Inputs("recording", None, (0.5,), (0.1,), channels=1, rate=120.0)
    import json

    assert Inputs.from_json(json.loads(json.dumps(inputs.as_json()))) == inputs


@pytest.mark.parametrize(
    "values", [{"crop_pct": 0}, {"std": [0, 1, 1]}, {"size": [0, 3]}, {"kind": "smell"}, {"mean": [float("nan")] * 3}]
)
def test_impossible_inputs_are_refused_in_a_sentence(values):
    with pytest.raises(UserError):
        Inputs.from_json(values)


@pytest.mark.parametrize("values", [None, [], {"colour": 1}, {"size": "x"}, {"mean": 3}])
def test_a_foreign_object_is_no_inputs(values):
    with pytest.raises(UserError, match="inputs"):
        Inputs.from_json(values)
