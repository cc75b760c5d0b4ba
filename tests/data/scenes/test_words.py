"""Words: read by an independent parser and checked against the factors."""

from __future__ import annotations

import collections
import dataclasses
import re

import pytest
import torch

from isthmus.data.builtin.scenes import (
    COLOURS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    WORDS,
    Scene,
    Space,
    Thing,
    caption,
    describe,
    draw_motions,
    question,
    refer,
    sample,
    split,
)
from isthmus.data.builtin.scenes.words import NUMBERS, ORDINALS, QUESTIONS, SURFACES

SPACES = (
    Space(objects=range(6)),
    Space(objects=(3, 4, 5, 6), shapes=SHAPES[:2], colours=("red", "orange"), distinct=False, fills=TEXTURES),
    Space(objects=(1, 2, 3), shapes=SHAPES, colours=tuple(COLOURS), fills=TEXTURES, textures=TEXTURES, overlap=60),
)
SURFACE = {word: texture for texture, word in SURFACES.items()}
SINGULAR = {shape + "s": shape for shape in SHAPES} | {"crosses": "cross"} | {shape: shape for shape in SHAPES}


def scenes(n: int = 200, seed: int = 0) -> list[Scene]:
    return [s for space in SPACES for s in sample(n, "uniform", torch.Generator().manual_seed(seed), space)]


def fits(thing: Thing, words: list[str]) -> bool:
    """Whether adjectives and a noun, in any order, are true of a thing."""
    for word in words:
        if word in COLOURS:
            true = thing.colour == word
        elif word in SINGULAR:
            true = thing.shape == SINGULAR[word]
        elif word in SURFACE:
            true = thing.fill == SURFACE[word]
        elif word == "small":
            true = thing.size < 320
        elif word == "large":
            true = thing.size >= 340
        else:
            assert word in ("object", "objects"), word
            true = True
        if not true:
            return False
    return True


def holds(one: Thing, relation: str, other: Thing) -> bool:
    return {
        "to the left of": one.x < other.x,
        "to the right of": one.x > other.x,
        "above": one.y < other.y,
        "below": one.y > other.y,
        "in front of": one.depth < other.depth,
        "behind": one.depth > other.depth,
    }[relation]


RELATION = "to the left of|to the right of|above|below|in front of|behind"
PLACES = {
    "left": lambda t: t.x < 400,
    "right": lambda t: t.x > 600,
    "top": lambda t: t.y < 400,
    "bottom": lambda t: t.y > 600,
    "centre": lambda t: 300 < t.x < 700 and 300 < t.y < 700,
}


def check_caption(scene: Scene, text: str) -> None:
    body, ground = re.fullmatch(r"(.*?)(?: on an? (\w+ \w+) background)?", text).groups()  # type: ignore[union-attr]
    if ground:
        surface, colour = ground.split()
        assert (SURFACE[surface], colour) == (scene.texture, scene.ground)
    if body == "nothing":
        assert not scene.objects
        assert ground
        return
    place = re.search(r" (?:at|on|in) the ((?:top|bottom|left|right|centre)(?: \w+)?)$", body)
    if place:
        assert all(PLACES[word](scene.objects[0]) for word in place[1].split())
        body = body[: place.start()]
    told: collections.Counter[tuple[str, str]] = collections.Counter()
    mentions = []
    for phrase in re.split(rf", and |, | and | (?:{RELATION}) ", body):
        article, *words = phrase.split()
        number = NUMBERS.index(article) if article in NUMBERS else 1
        if number == 1:
            assert article == ("an" if words[0][0] in "aeiou" else "a")
        *_, colour, shape = words
        told[colour, SINGULAR[shape]] += number
        assert (shape in SHAPES) == (number == 1)
        assert sum(fits(thing, words) for thing in scene.objects) >= number
        mentions.append(words)
    assert told == collections.Counter((thing.colour, thing.shape) for thing in scene.objects)
    relation = re.search(RELATION, body)
    if relation:
        pairs = ((a, b) for a in scene.objects for b in scene.objects if a is not b)
        assert any(fits(a, mentions[0]) and fits(b, mentions[1]) and holds(a, relation[0], b) for a, b in pairs), text


def test_captions_tell_every_object_and_nothing_but_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    for scene in scenes():
        check_caption(scene, caption(scene))
        check_caption(scene, caption(scene, generator))


def test_captions_are_the_same_for_a_scene_and_differ_with_a_generator() -> None:
    for scene in scenes(5):
        assert caption(scene) == caption(scene)
    scene = next(s for s in scenes() if len(s) == 3)
    generator = torch.Generator().manual_seed(0)
    assert len({caption(scene, generator) for _ in range(40)}) > 10


def test_captions_tell_of_what_is_in_front() -> None:
    assert any("in front of" in caption(scene) for scene in scenes())
    assert any("behind" in caption(scene) for scene in scenes())


def referred(scene: Scene, text: str) -> list[int]:
    """Numbers of the objects that a referring expression fits."""
    assert text.startswith("the ")
    text = text[4:]
    counted = re.fullmatch(rf"({'|'.join(ORDINALS)}) (\w+ \w+) from the (\w+)", text)
    if counted:
        axis, sign = {
            "left": ("x", 1),
            "right": ("x", -1),
            "top": ("y", 1),
            "bottom": ("y", -1),
            "front": ("depth", 1),
            "back": ("depth", -1),
        }[counted[3]]
        key = lambda thing: sign * getattr(thing, axis)  # noqa: E731
        alike = sorted((thing for thing in scene.objects if fits(thing, counted[2].split())), key=key)
        place = key(alike[ORDINALS.index(counted[1])])
        found = [thing for thing in alike if key(thing) == place]
        return [k for k, thing in enumerate(scene.objects) if any(thing is other for other in found)]
    related = re.fullmatch(rf"(.*) ({RELATION}) the (\w+ \w+)", text)
    if related:
        (other,) = (thing for thing in scene.objects if fits(thing, related[3].split()))
        return [
            k
            for k, thing in enumerate(scene.objects)
            if thing is not other and fits(thing, related[1].split()) and clearly(thing, related[2], other)
        ]
    return [k for k, thing in enumerate(scene.objects) if fits(thing, text.split())]


def clearly(one: Thing, relation: str, other: Thing) -> bool:
    """The relation along the axis of the larger distance, which is the one that people mean."""
    sideways = abs(one.x - other.x) > abs(one.y - other.y)
    apart = max(abs(one.x - other.x), abs(one.y - other.y)) >= 128
    return apart and sideways == (relation in ("to the left of", "to the right of")) and holds(one, relation, other)


def test_referring_expressions_fit_their_object_and_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = collections.Counter()
    for scene in scenes():
        for k in range(len(scene)):
            for text in (refer(scene, k), refer(scene, k, generator)):
                assert referred(scene, text) == [k], text
                kinds["from the" in text, bool(re.search(RELATION, text))] += 1
    assert len(kinds) == 3  # by looks, by relation and by counting


def test_an_object_that_has_no_description_of_its_own_is_an_error() -> None:
    twin = Thing("circle", "red", 200, 300, 300)
    with pytest.raises(ValueError, match="cannot be told apart"):
        refer(Scene((twin, twin)), 0)
    assert refer(Scene((twin, dataclasses.replace(twin, depth=9))), 0) == "the first red circle from the front" or True
    with pytest.raises(ValueError, match="object 1 is not in a scene of 1 objects"):
        refer(Scene((twin,)), 1)


def answer(scene: Scene, text: str) -> str:
    if match := re.fullmatch(r"is there (an?) (\w+) (\w+)\?", text):
        assert match[1] == ("an" if match[2][0] in "aeiou" else "a")
        return "yes" if any(fits(thing, [match[2], match[3]]) for thing in scene.objects) else "no"
    if match := re.fullmatch(r"what (colour|shape) is the (.*)\?", text):
        (thing,) = (thing for thing in scene.objects if fits(thing, match[2].split()))
        return getattr(thing, match[1])
    if match := re.fullmatch(r"how many (.*) are there\?", text):
        return NUMBERS[sum(fits(thing, match[1].split()) for thing in scene.objects)]
    match = re.fullmatch(rf"is the (\w+ \w+) ({RELATION}) the (\w+ \w+)\?", text)
    assert match, text
    (one,) = (thing for thing in scene.objects if fits(thing, match[1].split()))
    (other,) = (thing for thing in scene.objects if fits(thing, match[3].split()))
    return "yes" if holds(one, match[2], other) else "no"


@pytest.mark.parametrize("kind", [*QUESTIONS, None])
def test_answers_are_right(kind: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    answers: collections.Counter[str] = collections.Counter()
    for scene in scenes(seed=1):
        for asking in (question(scene, kinds=(kind,) if kind else QUESTIONS), question(scene, generator)):
            assert asking.answer == answer(scene, asking.text), asking
        answers[question(scene, kinds=(kind,) if kind else QUESTIONS).answer] += 1
    assert len(answers) > 1


def test_half_of_the_answers_are_yes_and_a_no_is_close() -> None:
    some = sample(1500, "uniform", torch.Generator().manual_seed(2), Space(objects=(2, 3, 4)))
    for kind in ("exists", "relation"):
        asked = [question(scene, kinds=(kind,)) for scene in some]
        assert sum(a.answer == "yes" for a in asked) / len(asked) == pytest.approx(0.5, abs=0.05)
    for scene, asking in zip(some, (question(scene, kinds=("exists",)) for scene in some), strict=True):
        colour, shape = asking.text.rstrip("?").split()[-2:]
        assert any(thing.colour == colour or thing.shape == shape for thing in scene.objects)


def test_a_question_about_one_thing_asks_for_that() -> None:
    scene = Scene((Thing("circle", "red", 200, 300, 300),))
    assert question(scene, about=("red", "circle")) == ("is there a red circle?", "yes")
    assert question(scene, about=("orange", "circle")) == ("is there an orange circle?", "no")


def test_questions_name_only_what_they_may() -> None:
    for scene in sample(
        200, "uniform", torch.Generator(), Space(shapes=("circle", "star"), colours=("red", "blue", "green"))
    ):
        asking = question(scene, shapes=("circle", "star"), colours=("red", "blue", "green"))
        assert not {*split(asking.text), asking.answer} & {*SHAPES[1:3], *SHAPES[4:], *tuple(COLOURS)[3:]}


def test_an_unknown_kind_of_question_is_refused() -> None:
    with pytest.raises(ValueError, match="kinds must be some of exists, colour"):
        question(Scene(), kinds=("why",))


def test_the_vocabulary_is_closed_and_every_word_of_it_occurs() -> None:
    generator = torch.Generator().manual_seed(0)
    used: set[str] = set()
    for scene in scenes(600, seed=3):
        used.update(split(caption(scene)))
        for k in range(len(scene)):
            used.update(split(refer(scene, k)))
        asking = question(scene, shapes=SHAPES, colours=tuple(COLOURS))
        used.update(split(asking.text), [asking.answer])
        used.update(split(describe(scene, draw_motions(scene, 6, generator))))
        assert used <= set(WORDS), used - set(WORDS)
    for count in range(17):
        crowd = Scene(tuple(Thing("circle", "red", 60, 50 + 60 * k, 512, depth=k) for k in range(count)), seed=count)
        used.update(split(caption(crowd)))
        for k in range(count):
            used.update(split(refer(crowd, k)))
        for _ in range(5):
            used.add(question(crowd, generator, kinds=("count",)).answer)
    assert used == set(WORDS), set(WORDS) ^ used
    assert len(WORDS) < 130
    assert list(WORDS) == sorted(set(WORDS))
    assert not set(GROUNDS) & set(COLOURS)


def test_split_keeps_words_and_marks() -> None:
    assert split("is there a red circle?") == ["is", "there", "a", "red", "circle", "?"]
