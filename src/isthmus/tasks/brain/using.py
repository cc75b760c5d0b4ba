"""A trained decoder of recordings, kept and at work: predictions for files of ``isthmus apply``, and figures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor

from isthmus import saved
from isthmus.codec import Codec, UserError, load_weights, save_weights, write_atomically
from isthmus.data.inputs import Inputs
from isthmus.data.readers.recordings import Recording
from isthmus.data.readers.recordings import read as read_recording
from isthmus.decoders.streaming import StreamingDecoder
from isthmus.engine import Run
from isthmus.layers.robust_scale import RobustScale, baseline
from isthmus.metrics.retrieval import columnwise_correlation
from isthmus.tasks.brain import generation, streaming
from isthmus.tasks.brain.trials import Trials, cosine, predict_latents

SCALE, CANDIDATES = "scale.safetensors", "candidates.safetensors"
_OWN_SCALE = 10
"""Trials that a recording needs for a scale of its own."""
_BEST = 5


class Kept:
    """A decoder that a run kept, with the scale, the candidates and the pictures it was trained with."""

    def __init__(self, run_dir: Path) -> None:
        kept = saved.load(run_dir)
        if kept.inputs.kind != "recording" or not isinstance(kept.model, Codec) or kept.folder is None:
            raise UserError(f"{run_dir} keeps no decoder of recordings.")
        folder, self.about, self.codec, self.names = kept.folder, kept.facts, kept.model, kept.labels
        self.scale = RobustScale(kept.inputs.channels, self.about["recordings"])
        load_weights(self.scale, folder / SCALE)
        self.generation = generation.Generation.load(folder)
        candidates = load_file(folder / CANDIDATES)
        self.channels = kept.inputs.channels
        self.latent, self.stimulus, self.label = (candidates[name] for name in ("latent", "stimulus", "label"))
        self.times = candidates["times"]

    @property
    def subjects(self) -> int:
        """People with a layer of their own."""
        return int(self.codec.encoder.subjects)  # type: ignore[arg-type]

    def scale_for(self, signal: Tensor, subject: Tensor) -> Tensor:
        """Scaled by the recording's own values where there are enough trials, else by those of training."""
        if len(signal) >= _OWN_SCALE:
            return RobustScale(signal.shape[1]).fit(signal)(signal)
        if signal.shape[1] != self.channels:
            raise UserError(
                f"{len(signal)} trials are too few for a scale of their own ({_OWN_SCALE} are needed), and the kept "
                f"one has {self.channels} channels, not {signal.shape[1]}."
            )
        return self.scale(signal, subject)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Decode recordings: predicted latents, what was likely seen, and how it builds up over time.

    For every ``.fif``, ``.npz`` or ``.npy``: ``NAME-latents.npz``, ``NAME-retrieval.json`` and ``NAME-course.png``; and
    of trials, where the run had pictures, ``NAME-pictures.png`` with the nearest of training and generated ones (all of
    these are in ``NAME-latents.npz`` too). A recording without trials is decoded as a stream, with the latency of every
    step.

    Raises:
        UserError: the run kept no model, or no input can be decoded.
    """
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
    retrieval, generated = predict_latents(kept.codec, None, trials)
    trials_told = [{"trial": number, **entry} for number, entry in enumerate(_best(kept, retrieval))]
    told: dict[str, Any] = {"trials": trials_told, "candidates": len(kept.latent)}
    truth = recording.columns.get("latent")
    if isinstance(truth, Tensor) and truth.shape == retrieval.shape:
        told["correlation"] = round(float(columnwise_correlation(generated, truth.float()).mean()), 4)
    arrays = {"retrieval": retrieval.numpy(), "generation": generated.numpy(), "times": kept.times.numpy()}
    figures = [_build_up(kept, trials, retrieval)]
    if kept.generation is not None:
        if kept.generation.low and signal.shape[1] != kept.channels:
            told["pictures"] = f"none: they need the {kept.channels} channels of training"
        else:
            painted, near = kept.generation.of(generated, trials)
            figures.append(generation.draw({"nearest": near, "generated": painted}))
            arrays |= {"pictures": (255 * painted).round().to(torch.uint8).numpy(),
                       "nearest": (255 * near).round().to(torch.uint8).numpy()}  # fmt: skip
    return arrays, told, *figures


def _best(kept: Kept, retrieval: Tensor) -> list[dict[str, Any]]:
    """The likeliest candidates of every prediction, with their cosines."""
    best = cosine(retrieval, kept.latent).topk(min(_BEST, len(kept.latent)))
    names = kept.names
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
        early = predict_latents(kept.codec, None, part)[0]
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
    return arrays, {"steps": told, "candidates": len(kept.latent)}, streaming.draw(steps, decoder.stride / rate)


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


def keep(
    run: Run,
    codec: Codec,
    scale: RobustScale,
    train: Trials,
    test: Trials,
    painter: generation.Generation | None,
    course: Mapping[str, Any],
) -> None:
    """Save a decoder with its scale, its candidates, and what makes pictures of its predictions.

    Args:
        run: in whose folder.
        codec: signals to latents.
        scale: of the training recordings.
        train: its stimuli are candidates.
        test: so are these.
        painter: where the data had pictures.
        course: scores over time, as a fact.
    """
    folder = run.dir / saved.KEPT / "decoder"
    if run.is_first:
        seen, shown = train.stimuli()[0], test.stimuli()[0]  # repeats are one candidate
        candidates = torch.cat([train.latent[seen], test.latent[shown]])
        stimulus = torch.cat([train.stimulus[seen], test.stimulus[shown]])
        label = stimulus
        if train.label is not None and test.label is not None:
            label = torch.cat([train.label[seen], test.label[shown]])
        tensors = {"latent": candidates, "stimulus": stimulus, "label": label, "times": train.times}
        save_weights(scale, folder / SCALE)
        write_atomically(folder / CANDIDATES, save({name: t.contiguous() for name, t in tensors.items()}))
        if painter is not None:
            painter.save(folder)
        facts = {
            "recordings": len(scale.centre),
            "people": None if train.people is None else list(train.people),
            "course": dict(course),
        }
        rate = round(1 / float(train.times[1] - train.times[0]), 6)
        inputs = Inputs("recording", channels=scale.centre.shape[1], rate=rate)
        saved.save(folder, codec, inputs, train.names, facts)
    run.artifact("decoder", folder, "signals to latents, with the scale and the candidates of training")
