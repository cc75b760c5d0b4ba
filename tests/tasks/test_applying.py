"""``apply`` answers what can be read, names what cannot, and never writes two answers into one file."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from isthmus import saved
from isthmus.codec import UserError
from isthmus.data.inputs import Inputs
from isthmus.encoders.images.inceptionnext import mixer_network
from isthmus.tasks import applying
from isthmus.tasks.applying import Answer


@pytest.fixture
def kept(tmp_path):
    model = mixer_network("3x3", (1,), (8,), mlp_ratios=1.0, num_classes=2, stem_stride=2)
    return saved.save(tmp_path / "model", model, Inputs(size=(8, 8)), ["a", "b"])


def picture(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (value, 0, 0)).save(path)
    return path


def shape(kept, item):
    return Answer({"scores": len(item.predicted), "shape": list(item.input.shape)}, Figure(), {".txt": b"x"})


def test_inputs_are_prepared_and_answers_written(tmp_path, kept):
    out = tmp_path / "out"
    written = applying.apply(kept, [picture(tmp_path / "x.png")], out, shape)
    assert [path.name for path in written] == ["answers.json", "x-answer.png", "x.txt"]
    facts = json.loads(written[0].read_text())[str(tmp_path / "x.png")]
    assert facts == {"scores": 2, "shape": [1, 3, 8, 8], "files": ["x-answer.png", "x.txt"]}


def test_pictures_of_one_name_get_answers_of_their_own(tmp_path, kept):
    inputs = [picture(tmp_path / folder / "x.png") for folder in "abc"] + [picture(tmp_path / "x-2.png")]
    written = applying.apply(kept, inputs, tmp_path / "out", shape)
    assert len({path.name.casefold() for path in written}) == len(written) == 9


def test_what_cannot_be_read_is_named_and_the_rest_answered(tmp_path, kept):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    written = applying.apply(kept, [broken, picture(tmp_path / "x.png")], tmp_path / "out", shape)
    found = json.loads(written[0].read_text())
    assert "skipped" in found[str(broken)]
    assert "scores" in found[str(tmp_path / "x.png")]


def test_what_a_recipe_cannot_use_is_named_too(tmp_path, kept):
    def refuse(kept, item):
        if item.path.name == "small.png":
            raise UserError("too small")
        return Answer({"fine": True})

    inputs = [picture(tmp_path / "small.png"), picture(tmp_path / "x.png")]
    written = applying.apply(kept, inputs, tmp_path / "out", refuse)
    assert json.loads(written[0].read_text())[str(inputs[0])] == {"skipped": "too small"}


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path, kept):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=r"broken\.png"):
        applying.apply(kept, [broken], tmp_path / "out", shape)
    assert not (tmp_path / "out").exists()


def test_a_caption_is_drawn_as_it_is():
    figure = applying.annotated(torch.zeros(3, 4, 4, dtype=torch.uint8), "$a$b_$^$")
    assert applying.png(figure)
