"""Factors: what the three rules promise, read off many scenes."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from isthmus.data.builtin.scenes import (
    CANVAS,
    COLOURS,
    SHAPES,
    TEXTURES,
    Bias,
    Draw,
    Pairing,
    Scene,
    Space,
    Thing,
    decode,
    encode,
    render,
    sample,
)

G = torch.Generator


def draw(n: int, rule: str = "uniform", seed: int = 0, **options: object) -> list[Scene]:
    return sample(n, rule, G().manual_seed(seed), **options)  # type: ignore[arg-type]


def test_a_seed_gives_its_scenes_and_another_seed_others() -> None:
    assert draw(50, seed=1) == draw(50, seed=1)
    assert not set(draw(50, seed=1)) & set(draw(50, seed=2))
    generator = G().manual_seed(1)
    first, second = (sample(10, "uniform", generator) for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.parametrize("rule", ["uniform", "correlated"])
def test_a_scene_depends_on_its_number_alone(rule: str) -> None:
    assert draw(100, rule)[:30] == draw(30, rule)
    lazy = Draw(100, rule, 7)  # type: ignore[arg-type]
    whole = decode(lazy.table(np.arange(100)))
    assert decode(lazy.table(np.array([93, 4, 4]))) == [whole[93], whole[4], whole[4]]


def test_scenes_survive_being_turned_into_integers() -> None:
    some = draw(40, space=Space(objects=range(5), fills=TEXTURES, shapes=SHAPES, colours=tuple(COLOURS)))
    assert decode(encode(some)) == some
    assert {len(scene) for scene in some} == set(range(5))


def test_named_factors_are_uniform() -> None:
    some = draw(4000, seed=3)
    space = Space()
    for field in ("shape", "colour"):
        counts = collections.Counter(getattr(thing, field) for scene in some for thing in scene.objects)
        assert stats.chisquare([counts[value] for value in space.values(field)]).pvalue > 1e-3
    for field in ("ground", "texture"):
        counts = collections.Counter(getattr(scene, field) for scene in some)
        assert stats.chisquare([counts[value] for value in space.values(field)]).pvalue > 1e-3
    counts = collections.Counter(len(scene) for scene in some)
    assert stats.chisquare([counts[n] for n in range(1, 5)]).pvalue > 1e-3


def test_numbers_are_uniform_and_independent() -> None:
    things = [scene.objects[0] for scene in draw(3000, space=Space(objects=(1,)), seed=4)]
    size = np.array([thing.size for thing in things])
    rotation = np.array([thing.rotation for thing in things])
    assert stats.kstest((size - 220) / 241, "uniform").pvalue > 1e-3
    assert stats.kstest(rotation / 360, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(size, rotation)[0, 1]) < 0.06
    x = np.array([(t.x - t.size / 2) / (CANVAS - t.size) for t in things])  # within what its size allows
    assert stats.kstest(x, "uniform").pvalue > 1e-3


def test_a_value_listed_twice_comes_twice_as_often() -> None:
    some = draw(3000, space=Space(objects=(1,), fills=("plain", "plain", "dots")))
    assert np.mean([scene.objects[0].fill == "plain" for scene in some]) == pytest.approx(2 / 3, abs=0.03)


def test_objects_lie_inside_apart_and_differ() -> None:
    space = Space(objects=(2, 3, 4), sizes=range(150, 301))
    crowded = 0
    for scene in draw(500, space=space):
        for thing in scene.objects:
            assert thing.size // 2 <= thing.x <= CANVAS - thing.size // 2
            assert thing.size // 2 <= thing.y <= CANVAS - thing.size // 2
        assert len({(thing.shape, thing.colour) for thing in scene.objects}) == len(scene)
        assert len({thing.depth for thing in scene.objects}) == len(scene)
        for one, other in itertools.combinations(scene.objects, 2):
            apart = ((one.x - other.x) ** 2 + (one.y - other.y) ** 2) ** 0.5
            pushed = (one.size + other.size) / 2 - apart
            crowded += pushed > 0.35 * min(one.size, other.size) + 2
    assert crowded < 5  # where no candidate had room, the best one is taken


def test_every_object_can_be_seen() -> None:
    some = draw(300, seed=5)
    drawn = render(some, 64, ("masks", "amodal"))
    seen = drawn["masks"].sum((2, 3)) / drawn["amodal"].sum((2, 3)).clamp(min=1)
    present = torch.arange(seen.shape[1]) < torch.tensor([len(scene) for scene in some])[:, None]
    assert seen[present].min() > 0.1
    assert (seen[present] < 0.97).float().mean() > 0.1  # and occlusion does occur


def test_grid_holds_every_combination_once_in_counting_order() -> None:
    space = Space.factorial(shapes=("circle", "heart"), colours=("red", "blue", "green"), sizes=range(200, 301, 50))
    some = draw(space.combinations, "grid", space=space)
    got = [(t.shape, t.colour, t.size, t.x, t.y) for t in (scene.objects[0] for scene in some)]
    assert got == list(itertools.product(space.shapes, space.colours, space.sizes, space.xs, space.ys))
    assert space.varying == ("shape", "colour", "size", "x", "y")
    assert len(draw(Space.factorial().combinations, "grid")) == 768


def test_grid_repeats_when_it_is_asked_for_more_and_picks_when_for_less() -> None:
    space = Space.factorial(shapes=("circle", "star"), xs=(512,), ys=(512,), sizes=(200,))
    key = lambda scene: (scene.objects[0].shape, scene.objects[0].colour)  # noqa: E731
    assert collections.Counter(map(key, draw(24, "grid", space=space))) == dict.fromkeys(
        itertools.product(space.shapes, space.colours), 3
    )
    few = list(map(key, draw(5, "grid", space=space)))
    assert len(set(few)) == 5
    assert few != list(map(key, draw(5, "grid", space=space, seed=1)))


def test_grid_counts_factors_of_the_scene_too() -> None:
    space = Space.factorial(shapes=("circle",), grounds=("grey", "sand"), rotations=(0, 90), xs=(512,), ys=(512,))
    some = draw(space.combinations, "grid", space=space)
    assert len({(s.ground, s.objects[0].rotation, s.objects[0].colour, s.objects[0].size) for s in some}) == 48


@pytest.mark.parametrize("strength", [0, 70, 95, 100])
def test_colour_follows_shape_as_often_as_planted(strength: int) -> None:
    space = Space(objects=(1, 2), shapes=SHAPES[:4], colours=tuple(COLOURS)[:4])
    some = draw(3000, "correlated", space=space, plant=Bias("shape", "colour", strength))
    things = [thing for scene in some for thing in scene.objects]
    favourite = dict(zip(space.shapes, space.colours, strict=True))
    follows = np.array([thing.colour == favourite[thing.shape] for thing in things])
    assert follows.mean() == pytest.approx(strength / 100, abs=0.02)
    rest = collections.Counter(t.colour for t in things if t.shape == "circle" and t.colour != favourite["circle"])
    if strength < 100:
        assert len(rest) == 3
        assert stats.chisquare(list(rest.values())).pvalue > 1e-3
    assert stats.chisquare(list(collections.Counter(t.shape for t in things).values())).pvalue > 1e-3


def test_numbers_fills_places_and_grounds_can_follow_too() -> None:
    space = Space(objects=(1,), shapes=SHAPES[:4], fills=TEXTURES[2:6], sizes=range(200, 400))
    for effect, fits in {
        "size": lambda t, s, c: 200 + 50 * c <= t.size < 250 + 50 * c,
        "fill": lambda t, s, c: t.fill == TEXTURES[2 + c],
        "ground": lambda t, s, c: s.ground == space.grounds[c],
        "brightness": lambda t, s, c: (
            space.brightnesses[c * 21 // 4] <= s.brightness <= space.brightnesses[(c + 1) * 21 // 4 - 1]
        ),
    }.items():
        some = draw(1500, "correlated", space=space, plant=Bias("shape", effect, 90))
        share = np.mean([fits(s.objects[0], s, SHAPES.index(s.objects[0].shape)) for s in some])
        assert share == pytest.approx(0.9, abs=0.025), effect
    some = draw(1500, "correlated", space=space, plant=Bias("shape", "x", 100))
    middle = [np.mean([s.objects[0].x for s in some if s.objects[0].shape == shape]) for shape in SHAPES[:4]]
    assert middle == sorted(middle)
    assert middle[3] - middle[0] > 350
    some = draw(1500, "correlated", space=space, plant=Bias("fill", "shape", 90))
    share = np.mean([TEXTURES.index(s.objects[0].fill) - 2 == SHAPES.index(s.objects[0].shape) for s in some])
    assert share == pytest.approx(0.9, abs=0.025)


def test_pairs_come_together_as_often_as_planted() -> None:
    plant = Pairing(("red", "circle"), ("blue", "square"), strength=90, share=50, alone=10)
    some = draw(4000, "correlated", space=Space(objects=(2, 3, 4)), plant=plant)
    there = [{(thing.colour, thing.shape) for thing in scene.objects} for scene in some]
    first = np.array([plant.first in names for names in there])
    second = np.array([plant.second in names for names in there])
    assert first.mean() == pytest.approx(0.5, abs=0.025)
    assert second[first].mean() == pytest.approx(0.9, abs=0.02)
    assert second[~first].mean() == pytest.approx(0.1, abs=0.02)
    assert all(len(names) == len(scene) for names, scene in zip(there, some, strict=True))
    test = draw(500, "correlated", space=Space(objects=(2, 3)), plant=dataclasses.replace(plant, strength=0, share=100))
    assert all(
        {(t.colour, t.shape) for t in scene.objects} & {plant.first, plant.second} == {plant.first} for scene in test
    )


def test_held_out_pairs_never_occur() -> None:
    without = (("red", "circle"), ("blue", "star"))
    some = draw(2000, space=Space(without=without, distinct=False))
    seen = {(thing.colour, thing.shape) for scene in some for thing in scene.objects}
    assert not seen & set(without)
    assert len(seen) == 62


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("unifrom", {}, "rule 'unifrom' is unknown; choose from uniform, correlated, grid"),
        ("uniform", {"plant": Bias()}, 'a plant is for the rule "correlated"'),
        ("grid", {"space": Space()}, "grid needs a space with objects="),
        ("grid", {"space": Space(objects=(1,))}, "list fewer values"),
        ("correlated", {"plant": Bias("shape", "shape")}, "differ from the effect"),
        ("correlated", {"plant": Bias("size", "colour")}, "cause must be one of"),
        ("correlated", {"plant": Bias("ground", "colour")}, "cause must be one of"),
        ("correlated", {"plant": Bias("shape", "hue")}, "'hue' is no factor"),
        ("correlated", {"plant": Bias(), "space": Space(colours=("red",))}, "colour has one value"),
        ("correlated", {"plant": Pairing()}, "at least two objects"),
        ("correlated", {"plant": Pairing(first=("mauve", "circle"))}, "mauve circle is not in the space"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(rule: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(5, rule, **options)


def test_spaces_with_unknown_or_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="shape 'disc' is unknown; choose from circle"):
        Space(shapes=("disc",))
    with pytest.raises(ValueError, match="colours of a Space is empty"):
        Space(colours=())
    with pytest.raises(ValueError, match="counts from 0 to 16"):
        Space(objects=(20,))
    with pytest.raises(ValueError, match="no pair"):
        Space(shapes=("circle",), colours=("red",), without=(("red", "circle"),))


def test_things_are_plain_data() -> None:
    thing = Thing("circle", "red", 100, 5, 5)
    assert dataclasses.asdict(thing)["colour"] == "red"
    with pytest.raises(dataclasses.FrozenInstanceError):
        thing.size = 5  # type: ignore[misc]
