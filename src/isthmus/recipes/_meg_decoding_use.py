"""Using a trained MEG decoder: predictions for trials, for files (``isthmus apply``), and pictures of both."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from isthmus.codec import Codec, UserError, load_weights, write_atomically
from isthmus.data.readers.recordings import Recording
from isthmus.data.readers.recordings import read as read_recording
from isthmus.decoders.streaming import Step, StreamingDecoder
from isthmus.layers.robust_scale import RobustScale, baseline
from isthmus.metrics.retrieval import columnwise_correlation
from isthmus.recipes import _meg_decoding_pictures as pictures
from isthmus.recipes._meg_decoding_trials import Trials, cosine

FOLDER, SCALE, CANDIDATES, ABOUT = "decoder", "scale.safetensors", "candidates.safetensors", "about.json"
_BATCH = 256
_OWN_SCALE = 10
"""Trials that a recording needs for a scale of its own."""
_BEST = 5


@torch.no_grad()
def predict(codec: Codec, scale: RobustScale | None, trials: Trials) -> tuple[Tensor, Tensor]:
    """Latents of the retrieval and the generation head for every trial: two ``(N, F)``."""
    found: list[Any] = []
    for rows in torch.arange(len(trials.signal)).split(_BATCH):
        signal, subject = trials.signal[rows], trials.subject[rows]
        signal = signal if scale is None else scale(signal, subject)
        found.append(codec(signal, {"subject": subject, "positions": trials.positions[rows]}).prediction)
    return torch.cat([f.retrieval for f in found]), torch.cat([f.generation for f in found])


class Kept:
    """What a run left in its folder ``decoder/``."""

    def __init__(self, run_dir: Path) -> None:
        folder = run_dir / FOLDER
        if not (folder / ABOUT).is_file():
            raise UserError(f"{run_dir} has no {FOLDER}/{ABOUT}; run the recipe to its end first.")
        self.about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.codec = Codec.from_pretrained(folder)
        self.scale = RobustScale(self.about["channels"], self.about["recordings"])
        load_weights(self.scale, folder / SCALE)
        self.generation = pictures.Generation.load(folder)
        kept = load_file(folder / CANDIDATES)
        self.latent, self.stimulus, self.label, self.times = (kept[n] for n in ("latent", "stimulus", "label", "times"))

    @property
    def subjects(self) -> int:
        """People with a layer of their own."""
        return int(self.codec.encoder.subjects)  # type: ignore[arg-type]

    def scale_for(self, signal: Tensor, subject: Tensor) -> Tensor:
        """Scaled by the recording's own values where there are enough trials, else by those of training."""
        if len(signal) >= _OWN_SCALE:
            return RobustScale(signal.shape[1]).fit(signal)(signal)
        if signal.shape[1] != self.about["channels"]:
            raise UserError(
                f"{len(signal)} trials are too few for a scale of their own ({_OWN_SCALE} are needed), and the kept "
                f"one has {self.about['channels']} channels, not {signal.shape[1]}."
            )
        return self.scale(signal, subject)


def apply(run_dir: Path, inputs: Sequence[Path], out: Path) -> list[Path]:
    """See :func:`isthmus.recipes.meg_decoding.apply`."""
    kept, written, refused = Kept(run_dir), [], []
    for path in inputs:
        try:
            recording = read_recording(path, float(kept.times[0]), float(kept.times[-1]))
            subject, known = _subjects(kept, recording, path.name)
            made = (_streamed if recording.continuous else _decoded)(kept, recording, subject)
        except ValueError as error:
            refused.append(f"{path.name}: {error}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        stem = path.name.partition(".")[0]
        arrays, told, *figures = made
        told |= {"subject": sorted(set(subject.tolist())), "subject_known": known}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        contents = {"latents.npz": buffer.getvalue(), "retrieval.json": (json.dumps(told, indent=1) + "\n").encode()}
        for name, figure in zip(("course.png", "pictures.png"), figures, strict=False):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110)
            contents[name] = picture.getvalue()
        for suffix, content in contents.items():
            target = out / f"{stem}-{suffix}"
            if target in written:  # another folder's file of the same name
                target = out / f"{stem}-{len(written)}-{suffix}"
            write_atomically(target, content)
            written.append(target)
    if not written:
        raise UserError(f"none of the inputs could be decoded ({'; '.join(refused)}).")
    if refused:
        skipped = out / "skipped.json"
        write_atomically(skipped, (json.dumps(refused, indent=1) + "\n").encode())
        written.append(skipped)
    return written


def _subjects(kept: Kept, recording: Recording, file: str) -> tuple[Tensor, bool]:
    """Who was recorded ``(N,)``, and whether that is known: as the file says, or its name where it was trained on; the
    first person, or anybody, else.

    Raises:
        UserError: a name that nobody had in training.
    """
    count, people = len(recording.signal), kept.about.get("people") or []
    anybody = bool(kept.codec.encoder.subject_dropout)
    if "subject" in recording.words:
        names = recording.words["subject"]
        if (strange := [name for name in names if name not in people]) and not anybody:
            raise UserError(
                f"nobody called {strange[0]!r} was trained on; the people are {', '.join(people) or 'nameless'}."
            )
        places = torch.tensor([people.index(name) if name in people else -1 for name in names])
        return places[recording.columns["subject"]], not strange
    if "subject" in recording.columns:
        return recording.columns["subject"], True
    if file in people:
        return torch.full((count,), people.index(file)), True
    return torch.full((count,), -1 if anybody else 0), kept.subjects == 1


_Made = tuple[dict[str, Any], dict[str, Any], *tuple[Figure, ...]]


def _decoded(kept: Kept, recording: Recording, subject: Tensor) -> _Made:
    recording = recording.at(kept.times)
    signal = recording.signal
    if bool((kept.times < 0).any()):
        signal = baseline(signal, kept.times)
    signal = kept.scale_for(signal, subject)
    positions = recording.positions.expand(len(signal), -1, -1)
    trials = Trials(signal, subject, torch.arange(len(signal)), torch.zeros(len(signal), 1), positions, kept.times)
    retrieval, generation = predict(kept.codec, None, trials)
    trials_told = [{"trial": number, **entry} for number, entry in enumerate(_best(kept, retrieval))]
    told: dict[str, Any] = {"trials": trials_told, "candidates": len(kept.latent)}
    truth = recording.columns.get("latent")
    if isinstance(truth, Tensor) and truth.shape == retrieval.shape:
        told["correlation"] = round(float(columnwise_correlation(generation, truth.float()).mean()), 4)
    arrays = {"retrieval": retrieval.numpy(), "generation": generation.numpy(), "times": kept.times.numpy()}
    figures = [_build_up(kept, trials, retrieval)]
    if kept.generation is not None:
        if kept.generation.low and signal.shape[1] != kept.about["channels"]:
            told["pictures"] = f"none: they need the {kept.about['channels']} channels of training"
        else:
            painted, near = kept.generation.of(generation, trials)
            figures.append(pictures.draw({"nearest": near, "generated": painted}))
            arrays |= {"pictures": (255 * painted).round().to(torch.uint8).numpy(),
                       "nearest": (255 * near).round().to(torch.uint8).numpy()}  # fmt: skip
    return arrays, told, *figures


def _best(kept: Kept, retrieval: Tensor) -> list[dict[str, Any]]:
    """The likeliest candidates of every prediction, with their cosines."""
    best = cosine(retrieval, kept.latent).topk(min(_BEST, len(kept.latent)))
    names = kept.about["names"]
    entries = []
    for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        labels = [int(kept.label[i]) for i in places]
        entries.append(
            {
                "stimulus": [int(kept.stimulus[i]) for i in places],
                "label": [names[k] if names and k < len(names) else str(k) for k in labels],
                "cosine": [round(v, 4) for v in values],
            }
        )
    return entries


def _build_up(kept: Kept, trials: Trials, final: Tensor) -> Figure:
    """How early the final answer stands: cosine with it when the signal after each moment is hidden (held at 0)."""
    moments = [i for i, t in enumerate(kept.times.tolist()) if t > 0][:: max(1, len(kept.times) // 24)]
    shown = min(64, len(trials))
    likeness, power = [], trials.signal.square().mean((0, 1)).sqrt()
    for moment in moments:
        hidden = trials.signal[:shown].clone()
        hidden[..., moment + 1 :] = 0
        part = Trials(hidden, trials.subject[:shown], trials.stimulus[:shown], trials.latent[:shown],
                      trials.positions[:shown], trials.times)  # fmt: skip
        early = predict(kept.codec, None, part)[0]
        likeness.append(float(torch.nn.functional.cosine_similarity(early, final[:shown]).mean()))
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(kept.times[moments], likeness, color="C0", label="likeness to the final latent")
    axis.set_xlabel("seconds from the onset; the signal after it is hidden")
    axis.set_ylabel("cosine", color="C0")
    axis.axvline(0, color="tab:gray", linewidth=0.8)
    beside = axis.twinx()
    beside.plot(kept.times, power, color="tab:gray", linewidth=0.8)
    beside.set_ylabel("rms of the scaled signal", color="tab:gray")
    return figure


def _streamed(kept: Kept, recording: Recording, subject: Tensor) -> _Made:
    """A continuous recording without events, as a stream: an answer every 25 ms or every sample, what is slower."""
    rate = 1 / float(kept.times[1] - kept.times[0])
    samples = int((recording.times[-1] - recording.times[0]) * rate)
    if samples < len(kept.times):
        raise UserError(
            f"the recording lasts {samples / rate:.2f} s, and a window takes {len(kept.times) / rate:.2f} s."
        )
    same = recording.at(float(recording.times[0]) + torch.arange(samples) / rate)
    scale = RobustScale(same.signal.shape[1]).fit(same.signal)
    before = int((kept.times < 0).sum())
    stride = max(1, round(rate * 0.025))
    decoder = StreamingDecoder(
        kept.codec, scale, rate, len(kept.times), before, stride, int(subject[0]), same.positions
    )
    steps = [step for part in same.signal[0].split(stride, dim=1) for step in decoder.push(part)]
    retrieval = torch.cat([step.latents.retrieval for step in steps])
    told = [
        {
            "time": round(step.time, 4),
            "milliseconds": round(step.milliseconds, 3),
            "latency": round(step.latency, 4),
            **entry,
        }
        for step, entry in zip(steps, _best(kept, retrieval), strict=True)
    ]
    arrays = {"retrieval": retrieval.numpy(), "times": np.array([step.time for step in steps])}
    return arrays, {"steps": told, "candidates": len(kept.latent)}, stream_figure(steps, decoder.stride / rate)


def stream_figure(steps: Sequence[Step], stride: float) -> Figure:
    """Computing time of every step, and what real time allows."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot([step.time for step in steps], [step.milliseconds for step in steps], ".", markersize=3)
    axis.axhline(1000 * stride, color="tab:red", linewidth=0.8, label="one stride: real time")
    axis.set_yscale("log")
    axis.set_xlabel("seconds of the stream")
    axis.set_ylabel("milliseconds a step")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@torch.no_grad()
def attention_map(encoder: Any, positions: Tensor) -> Figure:
    """Every sensor at its place, by its largest attention from any output."""
    weights = encoder.attention.eval().weights(positions)
    share = weights.amax(-2).flatten()
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axis = figure.subplots()
    drawn = axis.scatter(positions[:, 0], positions[:, 1], c=share.numpy(), s=60, cmap="viridis")
    figure.colorbar(drawn, ax=axis, label="largest attention")
    axis.set_aspect("equal")
    axis.axis("off")
    return figure
