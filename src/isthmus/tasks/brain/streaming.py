"""A decoder on a stream of samples: whether it says what whole epochs say, and how quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from matplotlib.figure import Figure

from isthmus.codec import Codec
from isthmus.decoders.streaming import Step, StreamingDecoder
from isthmus.engine import Run
from isthmus.layers.robust_scale import RobustScale
from isthmus.tasks.brain.trials import Trials, predict_latents

#: Milliseconds of computing after which a stream has shown what it can do.
BUDGET = 5000


def measure(run: Run, codec: Codec, scale: RobustScale, test: Trials) -> None:
    """Push test trials sample by sample; tell how quickly answers come, and whether they are those of whole epochs."""
    who = int(test.subject[0])
    chosen = (test.subject == who).nonzero()[:20, 0]
    rate = 1 / float(test.times[1] - test.times[0])
    length, before = len(test.times), int((test.times < 0).sum())
    positions = test.positions[chosen[0]]
    decoder = StreamingDecoder(codec, scale, rate, length, before, max(1, round(rate * 0.025)), who, positions)
    steps, difference = [], 0.0
    for trial in chosen.tolist():
        decoder.reset()
        taken = [step for sample in test.signal[trial].mT for step in decoder.push(sample[:, None])]
        whole = predict_latents(codec, scale, replace(test, **{
            name: getattr(test, name)[trial : trial + 1] for name in ("signal", "subject", "positions")
        }))[0]  # fmt: skip
        difference = max(difference, float((taken[-1].latents.retrieval - whole).abs().max() / whole.abs().max()))
    decoder.reset()
    for trial in chosen.tolist():
        steps += [step for sample in test.signal[trial].mT for step in decoder.push(sample[:, None])]
        if sum(step.milliseconds for step in steps) > BUDGET:
            break
    spent = torch.tensor([step.milliseconds for step in steps])
    run.metric("stream_difference", difference)
    run.metric("stream_milliseconds", float(spent.median()), unit="ms")
    run.metric("stream_slowest", float(spent.max()), unit="ms")
    run.metric("stream_speed", decoder.stride / rate * 1000 / float(spent.median()))
    run.metric("stream_latency", sorted(step.latency for step in steps)[len(steps) // 2], unit="s")
    run.figure("stream", draw(steps, decoder.stride / rate), "Computing time of every step of the stream.")


def draw(steps: Sequence[Step], stride: float) -> Figure:
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
