"""The three rules of drawing scenes: uniform, correlated, grid.

Scene i of a draw depends on the key and on i alone, so a draw of 1,000 begins with the draw of 100, and a dataset
draws any of its scenes when it is asked for it.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch

from isthmus.data.builtin.scenes.factors import CANVAS, SCENE_FIELDS, THING_FIELDS, Scene, Table, decode
from isthmus.data.builtin.scenes.space import ATTRIBUTES, Bias, Pairing, Space, codes_of
from isthmus.data.hashing import below, words
from isthmus.layers.random import derive_seed

Rule = Literal["uniform", "correlated", "grid"]
RULES = ("uniform", "correlated", "grid")
_TRIES = 16  # candidates for an object's place, and for its shape and colour


def sample(
    n: int,
    rule: Rule,
    generator: torch.Generator,
    space: Space | None = None,
    plant: Bias | Pairing | None = None,
) -> list[Scene]:
    """Draw ``n`` scenes.

    Args:
        n: how many.
        rule: ``uniform``: every factor on its own; ``correlated``: as ``plant`` says; ``grid``: the full factorial of a
            one-object space in order (the last factor fastest), again and again if ``n`` is larger, a random subset if
            it is smaller.
        generator: where randomness comes from; one number is taken from it.
        space: the values to draw from; ``Space()``, for ``grid`` ``Space.factorial()``.
        plant: what is correlated; ``Bias()``: colour follows shape.

    Raises:
        ValueError: an unknown rule, or a plan that the space cannot follow.
    """
    key = int(torch.randint(2**31 - 1, (), generator=generator))
    return decode(Draw(n, rule, key, space, plant).table(np.arange(n)))


class Draw:
    """``n`` scenes, drawn when they are asked for; arguments as for :func:`sample`, a key instead of a generator."""

    def __init__(
        self, n: int, rule: Rule, key: int, space: Space | None = None, plant: Bias | Pairing | None = None
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule {rule!r} is unknown; choose from {', '.join(RULES)}")
        if plant is not None and rule != "correlated":
            raise ValueError(f'a plant is for the rule "correlated", not for {rule!r}')
        self.space = space or (Space.factorial() if rule == "grid" else Space())
        self.plant = (plant or Bias()) if rule == "correlated" else None
        self.n, self.rule, self.key = n, rule, key
        _check(self.space, rule, self.plant)

    def __len__(self) -> int:
        return self.n

    def table(self, index: np.ndarray) -> Table:
        """The scenes with these numbers."""
        index = np.asarray(index, dtype=np.int64)
        return _grid(self, index) if self.rule == "grid" else _random(self, index)

    @functools.cached_property
    def subset(self) -> np.ndarray:
        """Which combinations a grid draw smaller than the factorial holds."""
        order = np.argsort(words(self.key, np.arange(self.space.combinations), 1)[:, 0], kind="stable")
        return np.sort(order[: self.n])


def _check(space: Space, rule: str, plant: Bias | Pairing | None) -> None:
    if space.without and (rule == "grid" or isinstance(plant, Bias)):
        raise ValueError('without is for the rule "uniform" and for pairings; elsewhere list fewer values')
    if rule == "grid":
        if tuple(space.objects) != (1,):
            raise ValueError("the rule grid needs a space with objects=(1,); give Space.factorial(...)")
        if space.combinations > 2**24:
            raise ValueError(
                f"the full factorial has {space.combinations:,} combinations; list fewer values (at most {2**24:,})"
            )
    if isinstance(plant, Bias):
        causes = ("shape", "colour", "fill") + (("ground", "texture") if plant.effect in SCENE_FIELDS else ())
        if plant.cause not in causes or plant.effect == plant.cause:
            raise ValueError(f"cause must be one of {', '.join(causes)} and differ from the effect, got {plant}")
        if len(set(space.values(plant.effect))) < 2:
            raise ValueError(f"{plant.effect} has one value in this space and cannot follow {plant.cause}")
    if isinstance(plant, Pairing):
        if plant.first == plant.second:
            raise ValueError("a pairing needs two different objects")
        for colour, shape in (plant.first, plant.second):
            if colour not in space.colours or shape not in space.shapes:
                raise ValueError(f"the paired object {colour} {shape} is not in the space")
        if min(space.objects) < 2:
            raise ValueError("a pairing needs scenes of at least two objects; give objects=range(2, ...)")


# ------------------------------------------------------------------------------------------------------ grid


def _grid(draw: Draw, index: np.ndarray) -> Table:
    space, total = draw.space, draw.space.combinations
    number = draw.subset[index] if draw.n < total else index % total
    things = np.zeros((len(index), 1, len(THING_FIELDS)), dtype=np.int64)
    whole = np.zeros((len(index), len(SCENE_FIELDS)), dtype=np.int64)
    for field in reversed(ATTRIBUTES):
        codes = codes_of(space, field)
        digit, number = number % len(codes), number // len(codes)
        _column(things, whole, field)[...] = codes[digit] if field in SCENE_FIELDS else codes[digit][:, None]
    whole[:, SCENE_FIELDS.index("seed")] = below(words(draw.key, index, 1)[:, 0], 2**31 - 1)
    return _table(things, np.ones(things.shape[:2], dtype=bool), whole)


# ---------------------------------------------------------------------------------------- uniform and correlated

_OFTEN = ("shape", "colour", "x", "y")  # drawn several times for an object, the first that fits is taken


def _random(draw: Draw, index: np.ndarray) -> Table:
    space, plant, n, most = draw.space, draw.plant, len(index), max(draw.space.objects)
    bias = plant if isinstance(plant, Bias) else None
    digits: dict[str, np.ndarray] = {}  # factor → positions in the space's list of values

    def noise(name: str, *shape: int) -> np.ndarray:
        """Words of their own for every purpose, so that a factor added later changes no other."""
        return words(derive_seed(draw.key, name), index, math.prod(shape)).reshape(n, *shape)

    def pick(field: str) -> np.ndarray:
        shape = () if field in SCENE_FIELDS else (most, _TRIES) if field in _OFTEN else (most,)
        draws = noise(field, *shape)
        if bias and field == bias.effect:
            return _biased(space, bias, draws, digits[bias.cause], noise("coin", *shape[:1]))
        return below(draws, len(space.values(field)))

    count = np.asarray(space.objects)[below(noise("count", 1)[:, 0], len(space.objects))]
    present = np.arange(most) < count[:, None]
    identity = ["colour", "shape"] if bias and bias.cause == "colour" else ["shape", "colour"]
    if bias and bias.cause == "fill":
        identity.insert(0, "fill")
    for field in identity:
        digits[field] = pick(field)
    _settle(digits, space, plant, [noise(f"pairing {i}", 1)[:, 0] for i in range(2)])
    rest = [field for field in ATTRIBUTES if field not in identity]
    for field in sorted(rest, key=lambda field: bool(bias) and field == bias.effect):  # the effect after its cause
        digits[field] = pick(field)

    things = np.zeros((n, most, len(THING_FIELDS)), dtype=np.int64)
    whole = np.zeros((n, len(SCENE_FIELDS)), dtype=np.int64)
    codes = {field: codes_of(space, field)[digit] for field, digit in digits.items()}
    codes["x"], codes["y"] = _place(space, codes["x"], codes["y"], codes["size"], present)
    step = 240 // max(most, 1)
    rank = np.argsort(np.argsort(noise("depth", most), axis=1, kind="stable"), axis=1, kind="stable")
    codes["depth"] = 8 + rank * step + below(noise("depth jitter", most), step - 1)
    codes["seed"] = below(noise("seed", 1)[:, 0], 2**31 - 1)
    for field, column in codes.items():
        _column(things, whole, field)[...] = column
    things *= present[..., None]
    return _table(things, present, whole)


def _biased(space: Space, bias: Bias, draws: np.ndarray, cause: np.ndarray, coin: np.ndarray) -> np.ndarray:
    """Positions of the effect: a favourite of the cause where the coin says so, else any other value."""
    causes, effects = len(space.values(bias.cause)), len(space.values(bias.effect))
    if bias.effect in SCENE_FIELDS and cause.ndim > 1:
        cause = cause[:, 0]
    while cause.ndim < draws.ndim:
        cause = cause[..., None]
    while coin.ndim < draws.ndim:
        coin = coin[..., None]
    if isinstance(space.values(bias.effect)[0], str) or effects < causes:
        low, width = cause % effects, np.ones_like(cause)
    else:
        low = cause * effects // causes
        width = (cause + 1) * effects // causes - low
    favourite = low + below(draws, width)
    other = below(draws, effects - width)
    return np.where(below(coin, 100) < bias.strength, favourite, other + (other >= low) * width)


def _settle(digits: dict[str, np.ndarray], space: Space, plant: Bias | Pairing | None, coins: list[np.ndarray]) -> None:
    """Choose among every object's candidates for shape and colour the first that no earlier object has."""
    shapes, colours = digits["shape"], digits["colour"]
    n, most, _ = shapes.shape
    effect = plant.effect if isinstance(plant, Bias) else ""
    # What must differ leaves the effect out, else refusing candidates would bend the correlation.
    kind = shapes * (effect != "shape") * len(space.colours) + colours * (effect != "colour")
    number = {pair: k for k, pair in enumerate((c, s) for s in space.shapes for c in space.colours)}
    barred = [number[pair] for pair in space.without if pair in number]
    forced = np.full((n, most), -1, dtype=np.int64)
    if isinstance(plant, Pairing):
        first, second = number[plant.first], number[plant.second]
        has_first = below(coins[0], 100) < plant.share
        has_second = below(coins[1], 100) < np.where(has_first, plant.strength, plant.alone)
        forced[:, 0] = np.where(has_first, first, np.where(has_second, second, -1))
        forced[:, 1] = np.where(has_first & has_second, second, -1)
        barred += [first, second]
    taken = np.full((n, most + len(barred)), -1, dtype=np.int64)
    taken[:, most:] = barred
    for k in range(most):
        one = (kind[:, k, :, None] != taken[:, None, :]).all(-1).argmax(-1)[:, None]
        if space.distinct:
            taken[:, k] = np.where(forced[:, k] >= 0, forced[:, k], np.take_along_axis(kind[:, k], one, 1)[:, 0])
        shapes[:, k, :1] = np.take_along_axis(shapes[:, k], one, 1)
        colours[:, k, :1] = np.take_along_axis(colours[:, k], one, 1)
    count = len(space.colours)
    digits["shape"] = np.where(forced >= 0, forced // count, shapes[..., 0])
    digits["colour"] = np.where(forced >= 0, forced % count, colours[..., 0])


def _place(
    space: Space, xs: np.ndarray, ys: np.ndarray, size: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose among every object's candidate places the first that overlaps no earlier object too much."""
    most = xs.shape[1]
    radius = (size + 1) // 2
    x, y = np.zeros_like(size), np.zeros_like(size)
    for k in range(most):
        r = radius[:, k, None]
        outside = np.maximum(np.abs(2 * xs[:, k] - CANVAS), np.abs(2 * ys[:, k] - CANVAS)) + 2 * r - CANVAS
        worst = -np.maximum(outside, 0) * (8 * CANVAS) if space.inside else np.zeros_like(xs[:, k])
        for j in range(k):
            apart = (xs[:, k] - x[:, j, None]) ** 2 + (ys[:, k] - y[:, j, None]) ** 2
            need = r + radius[:, j, None] - 2 * np.minimum(r, radius[:, j, None]) * space.overlap // 100
            worst = np.minimum(worst, np.where(present[:, j, None], apart - need * need, 0))
        one = worst.argmax(-1)[:, None]
        x[:, k] = np.take_along_axis(xs[:, k], one, 1)[:, 0]
        y[:, k] = np.take_along_axis(ys[:, k], one, 1)[:, 0]
        if space.inside:
            least = np.minimum(radius[:, k], CANVAS // 2)
            x[:, k] = np.clip(x[:, k], least, CANVAS - least)
            y[:, k] = np.clip(y[:, k], least, CANVAS - least)
    return x, y


# ---------------------------------------------------------------------------------------------------- helpers


def _column(things: np.ndarray, whole: np.ndarray, field: str) -> np.ndarray:
    """The column of a factor, ``(N, K)`` or ``(N,)``, as a view."""
    if field in SCENE_FIELDS:
        return whole[:, SCENE_FIELDS.index(field)]
    return things[:, :, THING_FIELDS.index(field)]


def _table(things: np.ndarray, present: np.ndarray, whole: np.ndarray) -> Table:
    return Table(torch.from_numpy(things), torch.from_numpy(present), torch.from_numpy(whole))
