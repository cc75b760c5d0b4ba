"""``isthmus apply``: inputs of a person are read, prepared as in the run, answered one by one, and written whole.

A recipe's ``answer(kept, item) -> Answer`` says what is found on one input; everything around it is here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from isthmus import saved
from isthmus.codec import Output, UserError, write_atomically
from isthmus.data.builtin.series import read_csv
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.saved import Saved

ANSWERS = "answers.json"


@dataclass
class Answer:
    """What is found on one input.

    Attributes:
        facts: plain values for ``answers.json`` and the terminal.
        figure: a picture of it, if there is something to see.
        files: further files, suffix to content, such as ``{".npy": data}``.
    """

    facts: dict[str, Any]
    figure: Figure | None = None
    files: dict[str, bytes] = field(default_factory=dict)


class Item:
    """One input of a person.

    Args:
        path: the file.
        content: what was read from it: a picture, uint8 ``(3, H, W)``, upright; or a table, values and column names.
        kept: the model that will see it.
        device: where it runs.
    """

    def __init__(self, path: Path, content: Any, kept: Saved, device: torch.device) -> None:
        self.path, self.content, self._kept, self.device = path, content, kept, device

    @property
    def image(self) -> Tensor:
        """The picture, uint8 ``(3, H, W)``."""
        return self.content

    @property
    def table(self) -> tuple[np.ndarray, list[str]]:
        """The columns of numbers ``(rows, columns)`` and their names."""
        return self.content

    @functools.cached_property
    def input(self) -> Tensor:
        """``(1, C, H, W)`` as the model was measured with, on its device."""
        batch = {"image": self.image[None].float() / 255, "index": torch.tensor([0])}
        return self._kept.inputs.transform()(batch, torch.Generator())["image"].to(self.device)

    @functools.cached_property
    def predicted(self) -> Tensor:
        """The model's output for this input (a Codec's prediction), without the axis of the batch."""
        with torch.no_grad():
            output = self._kept.model(self.input)
        return (output.prediction if isinstance(output, Output) else output)[0]


def apply(
    run_dir: Path | Saved,
    inputs: Sequence[Path],
    out: Path,
    answer: Callable[[Saved, Item], Answer],
    name: str | None = None,
) -> list[Path]:
    """Answer every input with a model that a run kept.

    Args:
        run_dir: a finished run, the folder of a kept model, or the model itself. Of several models that a run kept,
            tables of series go to the one that reads series.
        inputs: files; what cannot be read is named in ``answers.json`` and left out.
        out: gets ``answers.json`` and, where there is a picture, ``NAME-answer.png``; both are written whole.
        answer: of the recipe.
        name: of the kept model; the first without it.

    Returns:
        The files written, ``answers.json`` first.

    Raises:
        UserError: the run kept no such model, or not one of the inputs can be read.
    """
    if isinstance(run_dir, Saved):
        first = run_dir
    else:
        first = saved.load(run_dir if name is None else run_dir / saved.KEPT / name)
    models = _Models(first, None if isinstance(run_dir, Saved) else run_dir)
    found: dict[str, Any] = {}
    written: list[Path] = []
    for path, target in zip(inputs, free_names(inputs, out), strict=True):
        try:
            kept = models.reading(path)
            content = read_csv(path) if kept.inputs.kind == "series" else decode_image(path)
            answered = answer(kept, Item(path, content, kept, models.device))
        except (Unreadable, UserError) as error:
            found[str(path)] = {"skipped": str(error)}
            continue
        found[str(path)] = dict(answered.facts)
        for suffix, content in contents(answered):
            write_atomically(target.with_name(target.name + suffix), content)
            written.append(target.with_name(target.name + suffix))
            found[str(path)].setdefault("files", []).append(written[-1].name)
    if all("skipped" in facts for facts in found.values()):
        reasons = "; ".join(f"{path}: {facts['skipped']}" for path, facts in found.items())
        raise UserError(f"none of the inputs can be used ({reasons}); pictures are {', '.join(IMAGE_SUFFIXES)}.")
    write_atomically(out / ANSWERS, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return [out / ANSWERS, *written]


class _Models:
    """The models of a run, each loaded when an input of its kind comes: tables of series, and pictures."""

    def __init__(self, first: Saved, run_dir: Path | None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._run, self._loaded = run_dir, {first.inputs.kind: self._ready(first)}

    def reading(self, path: Path) -> Saved:
        """The model for a file.

        Raises:
            UserError: the run kept none that reads files like this one.
        """
        kind = "series" if path.suffix.lower() == ".csv" else "image"
        if kind not in self._loaded and self._run is not None:
            for file in sorted((self._run / saved.KEPT).glob(f"*/{saved.FACTS}")):
                if json.loads(file.read_text(encoding="utf-8"))["inputs"]["kind"] == kind:
                    self._loaded[kind] = self._ready(saved.load(file.parent))
                    break
        if kind not in self._loaded and kind == "series":
            raise UserError(f"{path} is a table, and this run kept no model of series.")
        return self._loaded.get(kind) or next(iter(self._loaded.values()))

    def _ready(self, kept: Saved) -> Saved:
        kept.model.to(self.device).eval()
        return kept


def contents(answer: Answer) -> Iterator[tuple[str, bytes]]:
    """The files of an answer: what follows the input's name, and the content."""
    if answer.figure is not None:
        yield "-answer.png", png(answer.figure)
    yield from answer.files.items()


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def free_names(inputs: Sequence[Path], out: Path) -> list[Path]:
    """Where the files of every input begin, without suffix: inputs of one name are numbered, none twice."""
    taken: set[str] = set()
    targets = []
    for path in inputs:
        name, number = path.stem, 2
        while name.casefold() in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name.casefold())
        targets.append(out / name)
    return targets


def annotated(image: Tensor, caption: str) -> Figure:
    """A picture ``(3, H, W)`` under a caption."""
    height, width = image.shape[-2:]
    scale = max(2.0, min(6.0, width / 100)) / width
    figure = Figure(figsize=(width * scale, height * scale + 0.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(caption, fontsize=11, parse_math=False)
    axis.axis("off")
    return figure


def side_by_side(images: Sequence[Tensor], gap: int = 4) -> bytes:
    """Pictures ``(1, 3, H, W)`` in [0, 1] of one height in a row, pixel for pixel, as a PNG."""
    between = torch.ones(1, 3, images[0].shape[2], gap)
    row = torch.cat([each for image in images for each in (image.cpu(), between)][:-1], 3)[0]
    buffer = BytesIO()
    to_pil_image(row.mul(255).round().byte()).save(buffer, "PNG")
    return buffer.getvalue()
