"""The third layer: captions, referring expressions, questions and answers, read off the factors alone.

The vocabulary is closed and small (:data:`WORDS`), so that a tiny language model can learn all of it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from isthmus.data.builtin.scenes.factors import CANVAS, COLOURS, GROUNDS, SHAPES, Scene, Thing
from isthmus.data.hashing import words
from isthmus.layers.random import derive_seed

#: Diameters below ``SMALL`` are small, from ``LARGE`` on large; between them no word for size is used.
SMALL, LARGE = 280, 380
NUMBERS = (
    *("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
#: What textures are called.
SURFACES = {
    "plain": "plain",
    "gradient": "shaded",
    "stripes": "striped",
    "checker": "checkered",
    "dots": "dotted",
    "speckle": "speckled",
    "noise": "cloudy",
    "waves": "wavy",
    "bar": "barred",
}
_PLURALS = {shape: {"cross": "crosses"}.get(shape, shape + "s") for shape in SHAPES}
_GRAMMAR = (
    "a an the and of to in on at from is are there what how many colour shape object objects nothing background left "
    "right above below top bottom centre front back behind small large yes no moves turns circles stays still "
    "clockwise anticlockwise up down , ?"
)
#: Every word and mark that may occur, sorted.
WORDS: tuple[str, ...] = tuple(
    sorted(
        {*_GRAMMAR.split(), *SHAPES, *_PLURALS.values(), *COLOURS, *GROUNDS, *SURFACES.values(), *NUMBERS, *ORDINALS}
    )
)

QUESTIONS = ("exists", "colour", "shape", "count", "relation")


class Question(NamedTuple):
    """A question about a scene and its one-word answer."""

    text: str
    answer: str


def split(text: str) -> list[str]:
    """A text's words and marks, all of them in :data:`WORDS`."""
    return re.findall(r"[a-z]+|[,?]", text)


def caption(scene: Scene, generator: torch.Generator | None = None) -> str:
    """Describe a scene in one sentence fragment without a full stop.

    Sentences vary: which facts are told, and in what order, depends on the scene and, where it is given, on
    ``generator``; without one a scene always has the same caption. Every object is mentioned, and nothing that is not
    there: "a small red circle to the left of a striped blue square".
    """
    choose = _chooser(scene, "caption", generator)
    ground = _article(f"{SURFACES[scene.texture]} {scene.ground} background")
    tail = f" on {ground}" if choose(3) == 0 else ""
    if not scene.objects:
        return f"nothing on {ground}"
    order = list(scene.objects)
    for i in range(len(order) - 1, 0, -1):
        j = choose(i + 1)
        order[i], order[j] = order[j], order[i]
    if len(order) == 1:
        place = "" if tail or choose(2) else " " + region(order[0])
        return _article(_adorned(order[0], choose)) + place + tail
    if len(order) in (2, 3) and choose(4):
        relation = _before(*order[:2]) if choose(2) else None
        relation = relation or relate(*order[:2])
        if relation:
            first, second, *third = (_article(_adorned(thing, choose)) for thing in order)
            return f"{first} {relation} {second}{''.join(', and ' + other for other in third)}{tail}"
    return _listed([*_grouped(order, choose)]) + tail


def refer(scene: Scene, k: int, generator: torch.Generator | None = None) -> str:
    """A phrase that fits object ``k`` and no other object of the scene, such as "the small red circle".

    Several ways of singling the object out are tried; one of the shortest that work is taken.

    Raises:
        ValueError: another object has the same looks, place and depth.
    """
    if not 0 <= k < len(scene.objects):
        raise ValueError(f"object {k} is not in a scene of {len(scene.objects)} objects")
    target = scene.objects[k]
    for level in (_plain_phrases, _related_phrases, _extreme_phrases):
        fitting = [p for p, fits in level(scene, target) if [fits(thing) for thing in scene.objects].count(True) == 1]
        if fitting:
            return "the " + fitting[_chooser(scene, f"refer {k}", generator)(len(fitting))]
    raise ValueError(f"object {k} cannot be told apart from another one: {target}")


def question(
    scene: Scene,
    generator: torch.Generator | None = None,
    kinds: Sequence[str] = QUESTIONS,
    about: tuple[str, str] | None = None,
    shapes: Sequence[str] = SHAPES[:8],
    colours: Sequence[str] = tuple(COLOURS)[:8],
) -> Question:
    """Ask about a scene.

    Args:
        scene: what is asked about.
        generator: chooses among the questions; without one a scene always has the same question.
        kinds: which kinds may be asked. ``exists``: "is there a red circle?", yes in half of the cases; a no shares
            the colour or the shape with an object that is there where it can. ``colour`` and ``shape`` of an object
            that the question singles out. ``count``: "how many red objects are there?". ``relation``: "is the circle
            above the square?", yes in half of the cases. A kind that a scene does not allow is left out, ``exists``
            always works.
        about: ``(colour, shape)``: ask whether this one exists, and nothing else.
        shapes: that questions may name.
        colours: that questions may name.

    Returns:
        The question and its answer: yes, no, a colour, a shape, or a number word.

    Raises:
        ValueError: an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in QUESTIONS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(QUESTIONS)}, got {list(kinds)}")
    there = {(thing.colour, thing.shape) for thing in scene.objects}
    if about is not None:
        return Question(f"is there {_article(' '.join(about))}?", "yes" if about in there else "no")
    choose = _chooser(scene, "question", generator)
    asked = {
        "exists": lambda: _exists(scene, choose, shapes, colours),
        "colour": lambda: _attribute(scene, choose, "colour", "shape"),
        "shape": lambda: _attribute(scene, choose, "shape", "colour"),
        "count": lambda: _count(scene, choose, shapes, colours),
        "relation": lambda: _relation(scene, choose),
    }
    left = list(kinds)
    while left:
        asking = asked[left.pop(choose(len(left)))]()
        if asking:
            return asking
    return _exists(scene, choose, shapes, colours)


def relate(one: Thing, other: Thing) -> str | None:
    """Where ``one`` is from ``other``: "to the left of", "above"…, or ``None`` where neither direction is clear.

    Along the axis on which their centres are farther apart, at least an eighth of the picture.
    """
    dx, dy = one.x - other.x, one.y - other.y
    if max(abs(dx), abs(dy)) < CANVAS // 8 or abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def _before(one: Thing, other: Thing) -> str | None:
    """ "in front of" or "behind" where the circles around two objects overlap clearly."""
    apart = (one.x - other.x) ** 2 + (one.y - other.y) ** 2
    if 1600 * apart >= 289 * (one.size + other.size) ** 2 or one.depth == other.depth:
        return None
    return "in front of" if one.depth < other.depth else "behind"


# ---------------------------------------------------------------------------------------------------- choices

Choose = Callable[[int], int]


def _chooser(scene: Scene, purpose: str, generator: torch.Generator | None) -> Choose:
    """``choose(n)`` gives numbers below n, from the generator or from the scene's own seed."""
    if generator is not None:
        return lambda n: int(torch.randint(n, (), generator=generator))
    draws = itertools.cycle(words(derive_seed(scene.seed, purpose), [0], 64)[0].tolist())
    return lambda n: (next(draws) >> 32) * n >> 32


# -------------------------------------------------------------------------------------------------- captions


def size_word(thing: Thing) -> str | None:
    """ "small", "large" or ``None``."""
    return "small" if thing.size < SMALL else "large" if thing.size >= LARGE else None


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _adorned(thing: Thing, choose: Choose) -> str:
    """Colour and shape, with size and surface now and then."""
    size, surface = size_word(thing), SURFACES[thing.fill] if thing.fill != "plain" else None
    told = [word for word in (size, surface) if word and choose(2)]
    return " ".join([*told, _name(thing)])


def region(thing: Thing) -> str:
    """ "at the top left", "on the right", "in the centre"…: which ninth of the picture holds its centre."""
    column = ("left", "", "right")[min(2, max(0, thing.x * 3 // CANVAS))]
    row = ("top", "", "bottom")[min(2, max(0, thing.y * 3 // CANVAS))]
    if row and column:
        return f"at the {row} {column}"
    if row:
        return f"at the {row}"
    return f"on the {column}" if column else "in the centre"


def _grouped(order: Sequence[Thing], choose: Choose) -> Iterator[str]:
    """Objects of like colour and shape are counted together."""
    for name in dict.fromkeys(_name(thing) for thing in order):
        alike = [thing for thing in order if _name(thing) == name]
        if len(alike) == 1:
            yield _article(_adorned(alike[0], choose))
        else:
            yield f"{NUMBERS[len(alike)]} {alike[0].colour} {_PLURALS[alike[0].shape]}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# ---------------------------------------------------------------------------------------- referring expressions

Phrases = Iterator[tuple[str, Callable[[Thing], bool]]]


def _plain_phrases(scene: Scene, target: Thing) -> Phrases:
    """By looks: "circle", "red object", "red circle", and with size or surface."""

    def alike(*fields: str) -> Callable[[Thing], bool]:
        return lambda t: all(getattr(t, field) == getattr(target, field) for field in fields)

    size, surface = size_word(target), SURFACES[target.fill]
    yield target.shape, alike("shape")
    yield f"{target.colour} object", alike("colour")
    yield _name(target), alike("colour", "shape")
    if size:  # an object whose size is on the border counts as fitting, so that nobody has to measure
        sized = (lambda t: t.size < SMALL + 40) if size == "small" else (lambda t: t.size >= LARGE - 40)
        yield f"{size} {_name(target)}", lambda t: alike("colour", "shape")(t) and sized(t)
        yield f"{size} {target.shape}", lambda t: t.shape == target.shape and sized(t)
    if target.fill != "plain":
        yield f"{surface} {_name(target)}", alike("colour", "shape", "fill")
        yield f"{surface} {target.shape}", alike("shape", "fill")


def _related_phrases(scene: Scene, target: Thing) -> Phrases:
    """By where it is from an object that colour and shape single out."""
    names = [_name(thing) for thing in scene.objects]
    for other in scene.objects:
        relation = relate(target, other)
        if other is not target and relation and names.count(_name(other)) == 1:
            for name, fits in ((target.shape, _shaped(target)), (_name(target), _named(target))):
                yield (
                    f"{name} {relation} the {_name(other)}",
                    lambda t, fits=fits, other=other, relation=relation: (
                        t is not other and fits(t) and relate(t, other) == relation
                    ),
                )


def _extreme_phrases(scene: Scene, target: Thing) -> Phrases:
    """Counted from one side among its like: "second red circle from the left"."""
    alike = [thing for thing in scene.objects if _named(target)(thing)]
    for axis, sides in (("x", ("left", "right")), ("y", ("top", "bottom")), ("depth", ("front", "back"))):
        values = sorted(getattr(thing, axis) for thing in alike)
        place = getattr(target, axis)
        for side, rank in zip(sides, (values.index(place), values[::-1].index(place)), strict=True):
            if rank < len(ORDINALS):
                yield (
                    f"{ORDINALS[rank]} {_name(target)} from the {side}",
                    lambda t, axis=axis, place=place: _named(target)(t) and getattr(t, axis) == place,
                )


def _shaped(target: Thing) -> Callable[[Thing], bool]:
    return lambda t: t.shape == target.shape


def _named(target: Thing) -> Callable[[Thing], bool]:
    return lambda t: (t.colour, t.shape) == (target.colour, target.shape)


# -------------------------------------------------------------------------------------------------- questions


def _exists(scene: Scene, choose: Choose, shapes: Sequence[str], colours: Sequence[str]) -> Question:
    there = {(thing.colour, thing.shape) for thing in scene.objects}
    every = [(colour, shape) for colour in colours for shape in shapes]
    absent = [pair for pair in every if pair not in there]
    near = [p for p in absent if any((p[0] == colour) != (p[1] == shape) for colour, shape in there)]
    present = [(thing.colour, thing.shape) for thing in scene.objects]
    yes = bool(present) and (not absent or choose(2) == 1)
    options = present if yes else near or absent
    pair = options[choose(len(options))]
    return Question(f"is there {_article(' '.join(pair))}?", "yes" if yes else "no")


def _attribute(scene: Scene, choose: Choose, asked: str, known: str) -> Question | None:
    """Ask for the colour of the only circle, or the shape of the only red object."""
    values = [getattr(thing, known) for thing in scene.objects]
    single = [thing for thing in scene.objects if values.count(getattr(thing, known)) == 1]
    if not single:
        return None
    thing = single[choose(len(single))]
    noun = thing.shape if known == "shape" else f"{thing.colour} object"
    return Question(f"what {asked} is the {noun}?", getattr(thing, asked))


def _count(scene: Scene, choose: Choose, shapes: Sequence[str], colours: Sequence[str]) -> Question:
    kind = choose(3)
    if kind == 0:
        return Question("how many objects are there?", NUMBERS[len(scene.objects)])
    field, options = ("shape", shapes) if kind == 1 else ("colour", colours)
    here = [getattr(thing, field) for thing in scene.objects]
    value = here[choose(len(here))] if here and choose(4) else options[choose(len(options))]
    noun = _PLURALS[value] if field == "shape" else f"{value} objects"
    return Question(f"how many {noun} are there?", NUMBERS[here.count(value)])


def _relation(scene: Scene, choose: Choose) -> Question | None:
    names = [_name(thing) for thing in scene.objects]
    single = [thing for thing in scene.objects if names.count(_name(thing)) == 1]
    pairs = [(one, other) for one, other in itertools.permutations(single, 2) if relate(one, other)]
    if not pairs:
        return None
    one, other = pairs[choose(len(pairs))]
    relation = relate(one, other)
    yes = choose(2) == 1
    if not yes:
        relation = relate(other, one)
    return Question(f"is the {_name(one)} {relation} the {_name(other)}?", "yes" if yes else "no")
