"""``data.load("scenes")``: the contract of a source, and columns that agree with each other and with the factors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from isthmus import data
from isthmus.codec import UserError
from isthmus.data.builtin.scenes import COLOURS, SHAPES, Bias, Pairing, Scenes, Space, caption, question, refer, render
from isthmus.data.dataset import collate

ALL = (
    *("image", "label", "mask", "masks", "boxes", "labels"),
    *("caption", "question", "answer", "phrases", "depth"),
)


def load(split: str = "train", needs: tuple[str, ...] = ("image", "label"), seed: int = 0, **options: object) -> Scenes:
    dataset = data.load("scenes", split, needs, seed, **options)
    assert isinstance(dataset, Scenes)
    return dataset


def test_samples_have_the_columns_asked_for_in_the_form_agreed_on() -> None:
    dataset = load(needs=ALL, size=48, count=10)
    assert set(ALL) == set(dataset.columns)
    assert len(dataset) == 10
    assert dataset.image_size == (48, 48)
    sample = dataset[3]
    k = len(sample["boxes"])
    assert sample["image"].dtype == torch.uint8
    assert sample["image"].shape == (3, 48, 48)
    assert sample["label"].dtype == sample["mask"].dtype == sample["labels"].dtype == torch.int64
    assert sample["label"].shape == ()
    assert sample["mask"].shape == (48, 48)
    assert sample["boxes"].shape == (k, 4)
    assert sample["boxes"].dtype == torch.float32
    assert sample["labels"].shape == (k,)
    assert sample["masks"].shape == (k, 48, 48)
    assert sample["depth"].shape == (48, 48)
    assert len(sample["phrases"]) == k
    assert all(isinstance(sample[key], str) for key in ("caption", "question", "answer"))
    assert sample["index"] == 3
    assert set(load(needs=("image", "caption?", "audio?"))[0]) == {"image", "caption", "index"}


def same(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(itertools.starmap(same, zip(one, other, strict=True)))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other  # type: ignore[arg-type]


def test_a_batch_is_its_samples() -> None:
    dataset = load(needs=ALL, count=40, size=32)
    indices = [7, 0, 39, 7]
    batch, single = dataset.fetch(indices), collate([dataset[i] for i in indices])
    assert batch.keys() == single.keys()
    for key in batch:
        assert same(batch[key], single[key]), key
    view = dataset.select([5, 7, 9]).fetch([1, 2])
    assert view["index"].tolist() == [7, 9]
    assert torch.equal(view["image"][0], batch["image"][0])


def test_columns_are_those_of_the_scenes() -> None:
    dataset = load(needs=ALL, count=30)
    index = list(range(30))
    batch, some = dataset.fetch(index), dataset.scenes(index)
    drawn = render(some, 64, ("image", "masks", "boxes", "owner"))
    assert torch.equal(batch["image"].float() / 255, drawn["image"])
    for i, scene in enumerate(some):
        shapes = torch.tensor([SHAPES.index(thing.shape) for thing in scene.objects])
        assert torch.equal(batch["labels"][i], shapes)
        assert torch.equal(batch["boxes"][i], drawn["boxes"][i, : len(scene)])
        assert torch.equal(batch["masks"][i], drawn["masks"][i, : len(scene)])
        owner = drawn["owner"][i]
        assert torch.equal(batch["mask"][i], torch.cat([torch.zeros(1).long(), shapes + 1])[owner + 1])
        nearest = min(range(len(scene)), key=lambda k: scene.objects[k].depth)
        assert batch["label"][i] == shapes[nearest]
        assert batch["caption"][i] == caption(scene)
        assert (batch["question"][i], batch["answer"][i]) == question(scene)
        assert batch["phrases"][i] == [refer(scene, k) for k in range(len(scene))]


def test_splits_share_no_scene_and_join() -> None:
    parts = {part: load(part, count=200).scenes(range(200)) for part in ("train", "val", "test")}
    for one, other in itertools.combinations(parts.values(), 2):
        assert not set(one) & set(other)
    joined = load("train+test", count=200)
    assert len(joined) == 400
    assert joined.scenes([0, 199, 200, 399]) == [parts["train"][k] for k in (0, 199)] + [
        parts["test"][k] for k in (0, 199)
    ]
    assert len(load("all", count=200)) == 600
    assert not set(load(seed=1, count=200).scenes(range(200))) & set(parts["train"])
    assert load(count=20).scenes(range(20)) == parts["train"][:20]


def test_tasks_name_their_classes() -> None:
    for task, expected in {
        "colour": lambda s: s.objects[0].colour,
        "colour-shape": lambda s: f"{s.objects[0].colour} {s.objects[0].shape}",
        "texture": lambda s: s.texture,
        "fill": lambda s: s.objects[0].fill,
    }.items():
        dataset = load(task=task, count=60)
        labels = dataset.fetch(range(60))["label"]
        assert [dataset.classes[k] for k in labels] == [expected(s) for s in dataset.scenes(range(60))]  # type: ignore[index]
    count = load(task="count", count=60)
    assert count.classes == ["1", "2", "3", "4"]
    assert [int(count.classes[k]) for k in count.fetch(range(60))["label"]] == [len(s) for s in count.scenes(range(60))]
    assert load(shapes="star, circle", task="shape", space="easy").classes == ["star", "circle"]
    with pytest.raises(UserError, match="shape 'sqare' is unknown; choose from circle, square"):
        load(shapes="star,sqare")
    few = load(space=Space(shapes=("star", "circle"), objects=(1,)), count=30)
    assert few.classes == ["star", "circle"]
    assert [few.classes[k] for k in few.fetch(range(30))["label"]] == [
        s.objects[0].shape for s in few.scenes(range(30))
    ]


def test_one_object_where_the_label_is_all_there_is_and_several_where_each_counts() -> None:
    assert {len(s) for s in load(count=50).scenes(range(50))} == {1}
    assert {len(s) for s in load(needs=("image", "boxes"), count=90).scenes(range(90))} == {1, 2, 3, 4}
    assert {len(s) for s in load(objects="2-3", count=50).scenes(range(50))} == {2, 3}
    assert {len(s) for s in load(needs=("image", "mask"), objects="1", count=50).scenes(range(50))} == {1}


def test_the_grid_is_divided_among_the_splits_and_factors_count_its_values() -> None:
    whole = load("all", ("image", "factors"), rule="grid")
    assert len(whole) == 768
    assert whole.factor_names == ("shape", "colour", "size", "x", "y")
    parts = [load(part, ("factors",), rule="grid") for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [614, 77, 77]
    rows = torch.cat([part.fetch(range(len(part)))["factors"] for part in parts])
    assert len({tuple(row) for row in rows.tolist()}) == 768
    assert rows.amax(0).tolist() == [3, 3, 2, 3, 3]
    scene, row = parts[0].scenes([100])[0], parts[0][100]["factors"]
    space = Space.factorial()
    assert [space.shapes[row[0]], space.colours[row[1]], space.xs[row[3]]] == [
        *(scene.objects[0].shape, scene.objects[0].colour, scene.objects[0].x)
    ]


def test_planted_rules_reach_the_dataset() -> None:
    biased = load(rule="correlated", plant=Bias("shape", "colour", 100), count=50)
    names = list(COLOURS)
    for scene in biased.scenes(range(50)):
        assert names.index(scene.objects[0].colour) == SHAPES.index(scene.objects[0].shape)
    paired = load(needs=("image", "question"), rule="correlated", plant=Pairing(share=100), objects="2-4", count=20)
    assert all(("red", "circle") in {(t.colour, t.shape) for t in s.objects} for s in paired.scenes(range(20)))


def test_what_is_written_after_data_is_understood() -> None:
    dataset = data.load("scenes:32?task=colour&objects=2-3&questions=exists&count=12", needs=("image", "question"))
    assert isinstance(dataset, Scenes)
    assert dataset.image_size == (32, 32)
    assert len(dataset) == 12
    assert all(text.startswith("is there a") for text in dataset.fetch(range(12))["question"])
    assert data.load("scenes?space=easy").fetch([0])["image"].float().std() > 10


def test_worker_processes_and_training_batches_give_the_same_pictures() -> None:
    dataset = load(count=24, size=32)
    direct = dataset.fetch(range(24))["image"]
    loader = DataLoader(dataset, batch_size=8, num_workers=1, collate_fn=collate)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), direct)
    batch = next(data.batches(dataset, 8, seed=0))
    assert batch["image"].dtype == torch.float32
    assert torch.equal((batch["image"] * 255).round().byte(), direct[batch["index"]])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("scenes?task=hue", {}, "task 'hue' is unknown; choose count or one or more of shape"),
        ("scenes?rule=gird", {}, "rule 'gird' is unknown; choose from uniform"),
        ("scenes?space=hard", {}, "space 'hard' is unknown; choose from easy, factorial"),
        ("scenes?objects=many", {}, "objects 'many' is no number of objects; write 1 or 2-4"),
        ("scenes?objects=4-2", {}, "objects '4-2' is no number of objects"),
        ("scenes?objects=0-2", {}, "a scene without objects has no shape"),
        ("scenes?questions=why", {}, "questions of kind 'why' are unknown"),
        ("scenes:4", {}, "size must be at least 8"),
        ("scenes?count=-1", {}, "count at least 0"),
        ("scenes?rule=grid&objects=2", {}, "grid needs a space with objects="),
        ("scenes", {"needs": ("audio",)}, "scenes has no column audio"),
        ("scenes", {"needs": ("mask", "factors")}, "scenes has no column factors"),
        ("scenes", {"split": "dev"}, "no split 'dev'"),
        ("scenes", {"plant": Bias()}, 'for the rule "correlated"'),
    ],
)
def test_mistakes_get_one_sentence(source: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        data.load(source, **options)
    assert str(error.value).startswith("scenes")


def test_numbers_beyond_the_end_are_refused() -> None:
    with pytest.raises(IndexError, match="10 samples, asked for number 10"):
        load(count=10)[10]
    with pytest.raises(IndexError, match="samples 0 to 9"):
        load(count=10).fetch([3, 10])


def test_scenes_can_be_changed_and_drawn_again() -> None:
    scene = load(count=1).scenes([0])[0]
    darker = dataclasses.replace(scene, brightness=scene.brightness // 2)
    image = render([scene, darker], 32)["image"]
    assert image[1].mean() < image[0].mean()
