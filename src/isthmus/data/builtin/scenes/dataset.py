"""Scenes as a source of batches: ``data.load("scenes")``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.codec import UserError
from isthmus.data.builtin.scenes.factors import NAMES, SCENE_FIELDS, Scene, Table, decode
from isthmus.data.builtin.scenes.render import paint
from isthmus.data.builtin.scenes.sampling import RULES, Draw
from isthmus.data.builtin.scenes.space import Bias, Pairing, Space, positions
from isthmus.data.builtin.scenes.words import QUESTIONS, caption, question, refer
from isthmus.data.dataset import Dataset, Unreadable, pick_needs
from isthmus.data.hashing import permutation
from isthmus.data.splits import check_split
from isthmus.layers.random import derive_seed

_PARTS = ("train", "val", "test")
_SPACES: dict[str, Callable[..., Space]] = {"": Space, "easy": Space.easy, "factorial": Space.factorial}
_ABOUT_ONE = ("shape", "colour", "fill", "ground", "texture")
#: Columns that tell of several objects.
_ABOUT_MANY = ("mask", "masks", "boxes", "labels", "caption", "question", "answer", "phrases", "depth")


class Scenes(Dataset):
    """Drawn scenes; sample i of a split is a function of seed, split and i, and is drawn when it is asked for.

    Columns: ``image``; ``label``, the class of the nearest object or of the scene; ``mask``, 0 for the background and
    1 + class for objects; ``boxes`` and ``labels`` of all objects; ``masks`` bool ``(K, H, W)``, what is seen of each;
    ``depth`` float32 ``(H, W)``; ``caption``; ``question`` and ``answer``; ``phrases``, one referring expression an
    object; and, in spaces of one object, ``factors`` int64 ``(F,)``: for every factor in ``factor_names`` the position
    of its value in the space's list.

    Attributes:
        space: what is drawn from.
        classes: of ``label``.
        object_classes: of ``labels`` and, after the background, of ``mask``.
        factor_names: what the columns of ``factors`` stand for.
    """

    def __init__(
        self,
        name: str,
        wanted: Sequence[str],
        draws: Sequence[tuple[Draw, np.ndarray]],
        size: int,
        task: str,
        kinds: Sequence[str],
    ) -> None:
        self.draws, self.size, self.kinds = list(draws), size, tuple(kinds)
        self.space = self.draws[0][0].space
        self.task = task.split("-")
        self.object_task = [f for f in self.task if f in ("shape", "colour", "fill")] or ["shape"]
        self.object_classes = _class_names(self.space, self.object_task)
        self.factor_names = self.space.varying if max(self.space.objects) == 1 else ()
        super().__init__(name, columns(self.space), _class_names(self.space, self.task), (size, size))
        self.wanted, self.mask_classes = tuple(wanted), ["ground", *self.object_classes]

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self.draws)

    def table(self, indices: Sequence[int] | np.ndarray) -> Table:
        """The factors of some samples as integers."""
        index = np.asarray(indices, dtype=np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"{self.name} has samples 0 to {len(self) - 1}, asked for {index.min()} to {index.max()}")
        tables, order, start = [], [], 0
        for draw, numbers in self.draws:
            mine = np.flatnonzero((index >= start) & (index < start + len(numbers)))
            if len(mine):
                tables.append(draw.table(numbers[index[mine] - start]))
                order.append(mine)
            start += len(numbers)
        back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable")) if order else torch.zeros(0).long()
        if not tables:
            return self.draws[0][0].table(np.zeros(0, dtype=np.int64))
        joined = (torch.cat(parts) for parts in zip(*((t.things, t.present, t.scene) for t in tables), strict=True))
        return Table(*joined).rows(back)

    def scenes(self, indices: Sequence[int] | np.ndarray) -> list[Scene]:
        """Some samples as scenes, to be changed, described or rendered otherwise."""
        return decode(self.table(indices))

    def read(self, index: int) -> dict[str, Any]:
        return {key: values[0] for key, values in self._columns([index]).items()}

    def read_many(self, indices: Sequence[int]) -> list[dict[str, Any] | Unreadable]:
        """Several samples, drawn together."""
        data = self._columns(indices)
        return [{key: values[i] for key, values in data.items()} for i in range(len(indices))]

    def fetch(self, indices: Sequence[int] | np.ndarray, replace: bool = True) -> dict[str, Any]:
        return {**self._columns(indices), "index": torch.as_tensor(np.asarray(indices, dtype=np.int64))}

    def _columns(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Every column asked for: a tensor of all samples, or a list with something of each."""
        table = self.table(indices)
        asked = {"mask": "owner"}
        outputs = [asked.get(c, c) for c in self.wanted if c in ("image", "mask", "masks", "boxes", "depth")]
        drawn = paint(table, self.size, tuple(dict.fromkeys(outputs))) if outputs else {}
        told = {"caption", "question", "answer", "phrases"} & set(self.wanted)
        scenes = decode(table) if told else []
        makers: dict[str, Callable[[], Any]] = {
            "image": lambda: drawn["image"],
            "label": lambda: self._label(table),
            "mask": lambda: self._mask(table, drawn["owner"]),
            "boxes": lambda: _each(drawn["boxes"], table.present),
            "labels": lambda: _each(self._classes(table, self.object_task), table.present),
            "masks": lambda: _each(drawn["masks"], table.present),
            "depth": lambda: drawn["depth"],
            "caption": lambda: [caption(scene) for scene in scenes],
            "question": lambda: [asking.text for asking in questions],
            "answer": lambda: [asking.answer for asking in questions],
            "phrases": lambda: [[refer(scene, k) for k in range(len(scene))] for scene in scenes],
            "factors": lambda: torch.stack([self._position(table, field) for field in self.factor_names], 1),
        }
        questions = []
        if {"question", "answer"} & told:
            shapes, colours = _names(self.space, "shape"), _names(self.space, "colour")
            questions = [question(scene, kinds=self.kinds, shapes=shapes, colours=colours) for scene in scenes]
        return {column: makers[column]() for column in self.wanted}

    def _position(self, table: Table, field: str) -> Tensor:
        codes = table.whole(field) if field in SCENE_FIELDS else table.thing(field)[:, 0]
        return positions(self.space, field, codes)

    def _classes(self, table: Table, task: Sequence[str]) -> Tensor:
        """``(N, K)`` classes of the objects."""
        number = torch.zeros_like(table.present, dtype=torch.int64)
        for field in task:
            codes = table.whole(field)[:, None] if field in SCENE_FIELDS else table.thing(field)
            number = number * len(_names(self.space, field)) + _class_numbers(self.space, field, codes)
        return number

    def _label(self, table: Table) -> Tensor:
        if self.task == ["count"]:
            counts = torch.tensor(sorted(set(self.space.objects)))
            return torch.searchsorted(counts, table.present.sum(1))
        depth = torch.where(table.present, table.thing("depth"), 255)
        return self._classes(table, self.task).gather(1, depth.argmin(1, keepdim=True))[:, 0]

    def _mask(self, table: Table, owner: Tensor) -> Tensor:
        none = torch.zeros(len(table), 1, dtype=torch.int64)
        classes = torch.cat([none, self._classes(table, self.object_task) + 1], 1)
        return classes.gather(1, owner.flatten(1) + 1).view(owner.shape)


def columns(space: Space) -> tuple[str, ...]:
    """The columns that scenes of a space have."""
    one = ("factors",) if max(space.objects) == 1 and space.varying else ()
    return ("image", "label", *_ABOUT_MANY, *one)


def load(
    split: str,
    needs: Sequence[str],
    seed: int,
    *,
    size: int = 64,
    count: int = 0,
    task: str = "shape",
    rule: str = "uniform",
    objects: str | Sequence[int] = "",
    shapes: str = "",
    questions: str = ",".join(QUESTIONS),
    space: str | Space = "",
    plant: Bias | Pairing | None = None,
    name: str = "scenes",
) -> Scenes:
    """Scenes of a split; splits share no scene.

    Args:
        split: ``train``, ``val``, ``test``, joined by ``+``, or ``all``.
        needs: columns, see :class:`Scenes`.
        seed: another seed gives other scenes.
        size: pixels of a side.
        count: samples a part; 0 stands for 10,000, for the rule ``grid`` for the part's share (80, 10 and 10 %) of the
            full factorial.
        task: what ``label`` tells: a factor with names (shape, colour, fill, ground, texture), several of them joined
            by ``-`` (``colour-shape``), or ``count``.
        rule: ``uniform``, ``correlated`` (with ``plant``) or ``grid``, see :func:`isthmus.data.builtin.scenes.sample`.
        objects: how many objects: ``"1"``, ``"2-4"`` or a sequence. By default 1 where only ``image``, ``label`` and
            ``factors`` are needed and ``label`` is about one object; else 1 to 4.
        shapes: of objects, joined by commas; all of the space's by default.
        questions: kinds of question, joined by commas.
        space: a :class:`Space`, or the name of one: ``easy``, ``factorial``.
        plant: what is correlated, for the rule ``correlated``.
        name: for messages.

    Raises:
        UserError: an unknown split, column, task, rule, space or kind of question, or counts that make no sense.
    """
    wanted_parts = check_split(name, split, (*_PARTS, "all"))
    parts = list(_PARTS) if wanted_parts == ["all"] else wanted_parts
    if size < 8 or count < 0:
        raise UserError(f"{name}: size must be at least 8 and count at least 0, got {size} and {count}.")
    if rule not in RULES:
        raise UserError(f"{name}: rule {rule!r} is unknown; choose from {', '.join(RULES)}.")
    kinds = [kind.strip() for kind in questions.split(",")]
    unknown = [kind for kind in kinds if kind not in QUESTIONS]
    if unknown:
        raise UserError(f"{name}: questions of kind {unknown[0]!r} are unknown; choose from {', '.join(QUESTIONS)}.")
    fields = task.split("-")
    if task != "count" and not all(field in _ABOUT_ONE for field in fields):
        raise UserError(f"{name}: task {task!r} is unknown; choose count or one or more of {', '.join(_ABOUT_ONE)}.")
    chosen = _space(name, space or ("factorial" if rule == "grid" else ""))
    if objects != "":
        chosen = dataclasses.replace(chosen, objects=_counts(name, objects))
    elif not isinstance(space, Space) and task != "count" and not {n.removesuffix("?") for n in needs} & {*_ABOUT_MANY}:
        chosen = dataclasses.replace(chosen, objects=(1,))
    if shapes:
        try:
            chosen = dataclasses.replace(chosen, shapes=tuple(shape.strip() for shape in shapes.split(",")))
        except ValueError as error:
            raise UserError(f"{name}: {error}.") from error
    if min(chosen.objects) < 1 and task != "count":
        raise UserError(f"{name}: a scene without objects has no {task}; let objects be at least 1, or the task count.")
    wanted = pick_needs(name, needs, columns(chosen))
    try:
        draws = [_draw(part, count, rule, seed, chosen, plant) for part in parts]
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from error
    return Scenes(name, wanted, draws, size, task, kinds)


def _draw(
    part: str, count: int, rule: str, seed: int, space: Space, plant: Bias | Pairing | None
) -> tuple[Draw, np.ndarray]:
    """One part: what it draws from and the numbers of its scenes there."""
    if rule != "grid":
        count = count or 10000
        return Draw(count, rule, derive_seed("scenes", part, seed), space, plant), np.arange(count)  # type: ignore[arg-type]
    total = space.combinations
    draw = Draw(total, "grid", derive_seed("scenes", "grid", seed), space, plant)
    order = permutation(total, derive_seed("scenes", "grid", seed))
    ends = {"train": (0, total * 8 // 10), "val": (total * 8 // 10, total * 9 // 10), "test": (total * 9 // 10, total)}
    numbers = np.sort(order[slice(*ends[part])])
    return draw, numbers[: count or None]


def _space(name: str, space: str | Space) -> Space:
    if isinstance(space, Space):
        return space
    if space not in _SPACES:
        raise UserError(f"{name}: space {space!r} is unknown; choose from {', '.join(filter(None, _SPACES))}.")
    return _SPACES[space]()


def _counts(name: str, objects: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(objects, str):
        return tuple(objects)
    try:
        ends = [int(end) for end in objects.split("-")]
        counts = range(ends[0], ends[-1] + 1)
    except ValueError:
        counts = range(0)
    if not counts or len(objects.split("-")) > 2 or counts[-1] > 16:
        raise UserError(f"{name}: objects {objects!r} is no number of objects; write 1 or 2-4, at most 16.")
    return counts


def _names(space: Space, field: str) -> list[str]:
    return list(dict.fromkeys(str(value) for value in space.values(field)))


def _class_names(space: Space, task: Sequence[str]) -> list[str]:
    if list(task) == ["count"]:
        return [str(count) for count in sorted(set(space.objects))]
    names = [""]
    for field in task:
        names = [f"{name} {value}".strip() for name in names for value in _names(space, field)]
    return names


def _class_numbers(space: Space, field: str, codes: Tensor) -> Tensor:
    """Codes of a named factor → positions among the names that the space has."""
    table = torch.zeros(len(NAMES[field]), dtype=torch.int64)
    for number, value in enumerate(_names(space, field)):
        table[NAMES[field].index(value)] = number
    return table[codes]


def _each(values: Tensor, present: Tensor) -> list[Tensor]:
    """Sample by sample, the rows of the objects that are there."""
    rows: Iterable[tuple[Tensor, Tensor]] = zip(values, present, strict=True)
    return [value[here] for value, here in rows]
