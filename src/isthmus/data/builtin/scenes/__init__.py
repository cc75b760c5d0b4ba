"""Drawn scenes in three layers kept apart: factors, picture, words.

A scene is plain data (:class:`Scene`, :class:`Thing`): shapes, colours, sizes, places, depth, textures, light.
:func:`sample` draws scenes by a rule from a :class:`Space`, :func:`render` makes pictures, masks, boxes and depth at
any size, :func:`caption`, :func:`refer` and :func:`question` put them into words, :func:`clip` lets them move. Same
seed, same bits, on every machine. :func:`load` is what ``data.load("scenes")`` calls.

    >>> scenes = sample(16, "uniform", torch.Generator().manual_seed(0))
    >>> picture = render(scenes, 64)["image"]
    >>> caption(scenes[0])
"""

from isthmus.data.builtin.scenes.clips import MOTIONS, Clip, Motion, clip, describe, draw_motions, move
from isthmus.data.builtin.scenes.dataset import Scenes, load
from isthmus.data.builtin.scenes.factors import (
    CANVAS,
    COLOURS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    Scene,
    Table,
    Thing,
    decode,
    encode,
    without_texture,
)
from isthmus.data.builtin.scenes.render import paint, render
from isthmus.data.builtin.scenes.sampling import RULES, Draw, sample
from isthmus.data.builtin.scenes.space import Bias, Pairing, Space
from isthmus.data.builtin.scenes.words import (
    QUESTIONS,
    WORDS,
    Question,
    caption,
    question,
    refer,
    region,
    relate,
    size_word,
    split,
)

__all__ = [
    "CANVAS",
    "COLOURS",
    "GROUNDS",
    "MOTIONS",
    "QUESTIONS",
    "RULES",
    "SHAPES",
    "TEXTURES",
    "WORDS",
    "Bias",
    "Clip",
    "Draw",
    "Motion",
    "Pairing",
    "Question",
    "Scene",
    "Scenes",
    "Space",
    "Table",
    "Thing",
    "caption",
    "clip",
    "decode",
    "describe",
    "draw_motions",
    "encode",
    "load",
    "move",
    "paint",
    "question",
    "refer",
    "region",
    "relate",
    "render",
    "sample",
    "size_word",
    "split",
    "without_texture",
]
