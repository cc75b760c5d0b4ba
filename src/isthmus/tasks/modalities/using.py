"""What is kept of tasks of several modalities, and their use on files: each by the tasks that read its kind."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from isthmus import saved
from isthmus.codec import UserError, write_atomically
from isthmus.data.dataset import Unreadable
from isthmus.data.inputs import Inputs, Kind
from isthmus.data.readers.samples import SUFFIXES, read_file
from isthmus.engine import Run
from isthmus.report import figures
from isthmus.saved import Saved
from isthmus.tasks.applying import ANSWERS, free_names, png
from isthmus.tasks.modalities.pictures import draw_answer

_KINDS: dict[str, Kind] = {
    "image": "image",
    "audio": "sound",
    "video": "clip",
    "points": "points",
    "series": "series",
    "forecast": "series",
}


def keep(run: Run, name: str, task: Any, model: nn.Module, shape: Sequence[int], classes: Sequence[str]) -> None:
    """Save the network of a task with all that it needs to be used.

    Args:
        run: whose folder gets it, as ``kept/NAME``.
        name: of the task.
        task: its settings.
        model: adapter, convnet and what follows it.
        shape: of the samples it was trained on.
        classes: names of the classes, or of the series that are forecast.
    """
    values = {field.name: getattr(task, field.name) for field in fields(task)}
    settings = {key: value for key, value in values.items() if isinstance(value, (int, float, str))}
    facts = {"task": name, "shape": list(shape), "settings": settings}
    folder = run.dir / saved.KEPT / name
    if run.is_first:
        saved.save(folder, model, _inputs(name, task, shape), classes, facts)
    run.artifact(name, folder, f"the large-kernel network of the {name} task, with its adapter and head")


def _inputs(name: str, task: Any, shape: Sequence[int]) -> Inputs:
    if name == "image":
        return Inputs.of(None, (task.size, task.size), crop_pct=1.0)
    channels = {"audio": 1, "video": 3, "points": 3}.get(name, shape[0])
    return Inputs(_KINDS[name], mean=(), std=(), channels=channels, rate=float(task.rate) if name == "audio" else None)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Answer files with the merged networks of a run, each file by the tasks that read its kind.

    Pictures, sounds, NumPy arrays (points ``(P, 3)``, clips ``(T, H, W, 3)``, series ``(C, L)``) and CSV tables.
    Writes ``answers.json``, ``NAME-TASK.png`` (what the network saw, and its answer), and ``NAME-forecast.csv`` for
    tables whose future is forecast.

    Raises:
        UserError: the run kept no network, or no file could be read by any of its tasks.
    """
    models = _models(run_dir)
    found: dict[str, Any] = {}
    written: list[Path] = []
    for path, target in zip(inputs, free_names(inputs, out), strict=True):
        answers, reasons = {}, []
        for name, kept in models.items():
            if path.suffix.lower() not in SUFFIXES[name]:
                continue
            try:
                x = read_file(name, SimpleNamespace(**kept.facts["settings"]), kept.facts["shape"], path)
            except Unreadable as error:
                reasons.append(f"{name}: {error}")
                continue
            answers[name], files = _answered(name, kept, x)
            for suffix, content in files.items():
                write_atomically(target.with_name(target.name + suffix), content)
                written.append(target.with_name(target.name + suffix))
                answers[name].setdefault("files", []).append(written[-1].name)
        found[str(path)] = answers or {"skipped": "; ".join(reasons) or _no_task(models)}
    if not written:
        reasons = "; ".join(f"{name}: {entry['skipped']}" for name, entry in found.items())
        raise UserError(f"none of the inputs can be answered ({reasons}).")
    write_atomically(out / ANSWERS, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    return [out / ANSWERS, *written]


def _models(run_dir: Path) -> dict[str, Saved]:
    """The kept networks by task, merged, on the device."""
    folders = sorted((run_dir / saved.KEPT).glob(f"*/{saved.FACTS}"))
    if not folders:
        raise UserError(f"{run_dir} kept no network; run the recipe to its end first.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {}
    for path in folders:
        kept = saved.load(path.parent)
        network: Any = kept.model.eval()
        network.reparameterize()
        network.to(device)
        models[kept.facts["task"]] = kept
    return models


@torch.no_grad()
def _answered(name: str, kept: Saved, x: Tensor) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a network predicts of one sample, and the files about it."""
    model: Any = kept.model
    classes = kept.labels or []
    x = x.to(next(model.parameters()).device)
    predicted = model(x)[0].cpu()
    if name == "forecast":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([classes, *([f"{value:.6g}" for value in row] for row in predicted.T.tolist())])
        drawn = png(figures.series(x[0].cpu(), predicted, classes))
        return {"steps": predicted.shape[1]}, {"-forecast.csv": text.getvalue().encode(), "-forecast.png": drawn}
    probability = predicted.softmax(0)
    best = probability.topk(min(5, len(classes)))
    likeliest = {classes[int(i)]: round(float(p), 4) for p, i in zip(*best, strict=True)}
    first = next(iter(likeliest))
    drawn = png(draw_answer(model.adapter(x)[:1], name, f"{first} ({float(best.values[0]):.0%})"))
    return {"class": first, "probability": likeliest}, {f"-{name}.png": drawn}


def _no_task(models: dict[str, Saved]) -> str:
    return "no task of this run reads such a file: " + ", ".join(
        f"{name} reads {', '.join(SUFFIXES[name])}" for name in models
    )
