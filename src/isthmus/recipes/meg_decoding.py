"""Brain decoding: toward real-time reconstruction of visual perception (Benchetrit, Banville, King, arXiv 2310.19812).

The paper's claim: a small convnet over MEG, with sensor attention and a layer a person, trained to predict the latent
of an image model by a contrastive and a regression loss, finds the picture that was seen about seven times as often as
a linear decoder, with millisecond resolution and quickly enough for real time.

What is measured here, on simulated people whose truth is known: (A) when low-level and semantic features can be
decoded, by ridges on sliding and growing windows; (B) retrieval by the convnet against a ridge for each person, among
few and many candidates, for stimuli of known and of unseen categories, from single trials and from averages. B is asked
where part of the response is induced, its phase new in every trial, which no fixed linear read-out sees; with purely
evoked responses a ridge does far better and the convnet's edge shrinks: both are reported, and nothing is claimed.
Predicted latents become pictures through their nearest neighbours and a small conditional decoder, and a stream of
samples is decoded as it comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from isthmus.catalog import published
from isthmus.codec import Codec, UserError, save_weights, write_atomically
from isthmus.data.builtin.brain.cortex import NETWORKS, mean_latency
from isthmus.decoders.latent_heads import LatentHeads
from isthmus.decoders.streaming import StreamingDecoder
from isthmus.encoders.signals.meg_conv import MEGConv, from_official
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.layers.robust_scale import RobustScale
from isthmus.objectives.latent_matching import LatentMatching
from isthmus.recipes import _meg_decoding_course as courses
from isthmus.recipes import _meg_decoding_pictures as pictures
from isthmus.recipes import _meg_decoding_use as use
from isthmus.recipes._image_classification import read_checkpoint
from isthmus.recipes._meg_decoding_trials import (
    Trials,
    averaged_predictions,
    predict,
    read,
    retrieve,
    ridges,
)
from isthmus.report import figures

needs = ("signal", "subject?", "label?", "image?")


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on one core."""

    data: str = "brain"
    """Signals with latents, pictures or labels: brain, or meg:PATH for .fif, .npz and .npy."""
    evoked: str = "brain?evoked=1&induced=0"
    """The other regime, reported beside; left out where it is empty or the data are yours."""
    timed: str = (
        "brain?subjects=1&stimuli=700&repeats=1&rate=50&start=-0.2&stop=1&jitter=0.02&widen=1&evoked=1&induced=0"
    )
    """What is decoded over time; yours where the data are yours."""
    encoder: str = ""
    """Vision model whose latents of the pictures are predicted, timm:NAME or transformers:NAME; else the data's own."""
    pretrained: bool = True
    """Weights of that model; random ones with --no-pretrained."""
    attention: int = 20
    """Channels behind the sensor attention, and behind the 1x1 convolution."""
    position_dim: int = 72
    """Numbers of the position embedding, twice a square."""
    attention_dropout: float = 0.2
    """Radius of the disc of sensors that is banned in training, in units of the layout."""
    hidden: int = 24
    """Channels of the convolutions."""
    depth: int = 4
    """Convolutions."""
    channels: int = 64
    """Channels of the tokens."""
    head_hidden: int = 0
    """Width of a hidden layer in the heads; 0 keeps them linear."""
    subject_dropout: float = 0.0
    """Share of training trials that go through the layer for people who were never recorded."""
    weight: float = 0.75
    """Weight of the contrastive loss; the rest is that of the regression."""
    noise: float = 0.3
    """Noise added to the scaled signal in training."""
    training: Training = Training(
        epochs=26, batch_size=64, lr=3e-3, weight_decay=0.1, warmup_epochs=7.8, warmup_from=0.04
    )
    """Training of the convnet."""
    painting: Training = Training(steps=400, batch_size=64, lr=5e-3, warmup_steps=20)
    """Training of the small conditional decoder."""
    stride: float = 0.05
    """Seconds between two of the sliding windows of 0.1 s."""
    k: int = 5
    """Candidates that may come first in retrieval."""

    @classmethod
    def paper(cls) -> Config:
        """The retrieval model on THINGS-MEG, as epochs of -0.5 to 1 s in .fif files under things-meg/, one a person,
        whose metadata tell ``image``, ``stimulus`` and ``split``; they are brought to 120 Hz.

        6,424,472 parameters with four people, 272 sensors and 768 features. Training stops when the loss of validation
        has not fallen for ten epochs, and the best epoch's weights are kept.
        """
        return cls(
            data="meg:things-meg?rate=120",
            evoked="",
            timed="",
            encoder="timm:vit_large_patch14_clip_224.openai",
            attention=270,
            position_dim=2048,
            hidden=320,
            channels=2048,
            noise=0.0,
            stride=0.025,
            training=Training(
                epochs=50,
                batch_size=128,
                optimizer="adam",
                lr=3e-4,
                betas=(0.9, 0.999),
                schedule="constant",
                patience=10,
            ),
        )


def run(config: Config, run: Run) -> None:
    """Train, compare with ridges, decode over time and from a stream, draw, and keep what ``apply`` needs."""
    if not config.stride > 0 or config.k < 1:
        raise UserError(f"--stride must be above 0 and --k at least 1, got {config.stride} and {config.k}.")
    simulated = config.data.partition("?")[0] == "brain"
    train, test = (_read(config, run, config.data, split) for split in ("train", "test"))
    val = _read(config, run, config.data, "val")
    if train.geometry:
        run.note(f"Sensors and fields: {train.geometry} ({_GEOMETRY[train.geometry]}).")
    run.log(
        f"{config.data}: {len(train)} trials of {len(train.subject.unique())} people, {train.signal.shape[1]} sensors, "
        f"{train.signal.shape[2]} samples; {len(test)} test trials of {len(test.stimulus.unique())} stimuli."
    )
    codec, scale, found = _compare(config, run, "convnet", train, test, val)
    run.metric("chance", min(1.0, config.k / len(test.stimulus.unique())))
    reported = published("meg-decoding")
    for name, value in found.items():
        if name.startswith("top5"):
            run.metric(name, value, published=reported.get(name))
    ratio = found["top5_cnn"] / max(found["top5_ridge"], 1e-9)
    run.metric("cnn_over_ridge", ratio, published=reported.get("cnn_over_ridge"))
    bars = {"convnet": found["top5_cnn"], "ridge": found["top5_ridge"]}
    bars |= {
        "convnet, repeats averaged": found["top5_cnn_repeats"],
        "ridge, repeats averaged": found["top5_ridge_repeats"],
    }
    bars |= {"convnet, many candidates": found["top5_cnn_large"], "ridge, many candidates": found["top5_ridge_large"]}

    if simulated:
        strange = _read(config, run, f"{config.data}{'&' if '?' in config.data else '?'}unseen=1", "test")
        predicted = use.predict(codec, scale, strange)[0]
        run.metric("top5_cnn_unseen", retrieve(predicted, strange, config.k))
        linear = predict(found["ridges"], strange.scaled(scale))
        run.metric("top5_ridge_unseen", retrieve(linear, strange, config.k))
    if simulated and config.evoked:
        train_evoked, test_evoked = (_read(config, run, config.evoked, split) for split in ("train", "test"))
        val_evoked = _read(config, run, config.evoked, "val")
        other = _compare(config, run, "convnet-evoked", train_evoked, test_evoked, val_evoked)[2]
        run.metric("evoked_top5_cnn", other["top5_cnn"])
        run.metric("evoked_top5_ridge", other["top5_ridge"])
        bars |= {"convnet, evoked": other["top5_cnn"], "ridge, evoked": other["top5_ridge"]}
    run.figure(
        "retrieval", figures.bars(bars, f"top-{config.k}", grey="ridge"), "How often the own candidate is found."
    )

    course = _over_time(config, run, simulated, train, test)
    _stream(run, codec, scale, test, simulated)
    generation = _paint(config, run, found["latents"], train.scaled(scale), test.scaled(scale))
    run.figure("sensors", use.attention_map(codec.encoder, train.positions[0]), "Sensors by their share of attention.")
    _keep(run, codec, scale, train, test, generation, course)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Decode recordings: predicted latents, what was likely seen, and how it builds up over time.

    For every ``.fif``, ``.npz`` or ``.npy``: ``NAME-latents.npz``, ``NAME-retrieval.json`` and ``NAME-course.png``; and
    of trials, where the run had pictures, ``NAME-pictures.png`` with the nearest of training and generated ones (all of
    these are in ``NAME-latents.npz`` too). A recording without trials is decoded as a stream, with the latency of every
    step.

    Raises:
        UserError: the run kept no model, or no input can be decoded.
    """
    return use.apply(run_dir, inputs, out)


def convert(path: Path, out: Path) -> Path:
    """A published trunk (speech decoding, the same network) as safetensors under our names.

    Raises:
        UserError: no such checkpoint.
    """
    state = read_checkpoint(path, "the MEG trunk")
    try:
        renamed = from_official(state)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    write_atomically(out, save(renamed))
    return out


_GEOMETRY = {
    "ctf275": "the canonical CTF-275 and MNE's forward model",
    "sphere": "a spherical helmet and the formula of a dipole in a sphere, as asked or because MNE is not installed",
}


# ---------------------------------------------------------------------------------------------------------- retrieval


def _read(config: Config, run: Run, source: str, split: str) -> Trials:
    return read(source, split, run.seed, config.encoder, config.pretrained)


def _network(config: Config, trials: Trials, layout: Tensor) -> Codec:
    """The convnet and its heads for the sizes of these trials."""
    encoder = MEGConv(
        subjects=int(trials.subject.max()) + 1,
        out_channels=config.channels,
        attention=config.attention,
        position_dim=config.position_dim,
        attention_dropout=config.attention_dropout,
        layout=[[round(v, 5) for v in place] for place in layout.tolist()],
        mix=config.attention,
        subject_dropout=config.subject_dropout,
        hidden=config.hidden,
        depth=config.depth,
    )
    heads = LatentHeads(
        config.channels,
        trials.latent.shape[1],
        len(trials.times),
        two=0 < config.weight < 1,
        hidden=config.head_hidden or None,
    )
    return Codec(encoder, decoder=heads)


def _compare(
    config: Config, run: Run, phase: str, train: Trials, test: Trials, val: Trials
) -> tuple[Codec, RobustScale, dict[str, Any]]:
    """Train the convnet and fit ridges on the same trials, and score both on the test trials.

    With ``training.patience`` the loss on the validation trials, taken after every epoch, says when training ends.
    """
    run.seed_everything("network", phase)
    scale = RobustScale(train.signal.shape[1], int(train.subject.max()) + 1).fit(train.signal, train.subject)
    codec = _network(config, train, train.positions[0])
    objective = LatentMatching(codec, None, config.weight, noise=config.noise)
    train, scaled_test = train.scaled(scale), test.scaled(scale)
    training, evaluate = config.training, None
    if training.patience is not None:
        every = training.evaluate_every or training.steps_per_epoch(len(train))
        training, evaluate = replace(training, evaluate_every=every), val.scaled(scale).loss_of(training.batch_size)
    trained: Any = fit(run, phase, objective, train.memory(phase), training, evaluate=evaluate).objective
    codec = trained.codec.cpu().eval()
    latents = use.predict(codec, None, scaled_test)
    linear = ridges(train)
    by_ridge = predict(linear, scaled_test)
    mean_trials = scaled_test.averaged()
    found: dict[str, Any] = {"latents": latents, "ridges": linear}
    found["top5_cnn"] = retrieve(latents[0], test, config.k)
    found["top5_ridge"] = retrieve(by_ridge, test, config.k)
    # Averages suit each: the convnet is not linear, so its predictions are averaged; the ridge sees averaged signals.
    found["top5_cnn_repeats"] = retrieve(averaged_predictions(latents[0], test), mean_trials, config.k)
    found["top5_ridge_repeats"] = retrieve(predict(linear, mean_trials), mean_trials, config.k)
    found["top5_cnn_large"] = retrieve(latents[0], test, config.k, more=val.latent)
    found["top5_ridge_large"] = retrieve(by_ridge, test, config.k, more=val.latent)
    run.log(f"{phase}: top-{config.k} {found['top5_cnn']:.3f}, ridge {found['top5_ridge']:.3f}.")
    return codec, scale, found


# ---------------------------------------------------------------------------------------------------------- over time


def _over_time(config: Config, run: Run, simulated: bool, train: Trials, test: Trials) -> dict[str, Any]:
    """Sliding and growing windows; the claim's figures where the truth is known."""
    known = simulated and bool(config.timed)
    if known:
        train = _read(config, run, config.timed, "train")
        test = _read(config, run, config.timed, "val+test")
    scale = RobustScale(train.signal.shape[1], int(train.subject.max()) + 1).fit(train.signal, train.subject)
    train, test = train.scaled(scale), test.scaled(scale)
    kinds = {"low": "low", "semantic": "latent"} if train.low is not None else {"latent": "latent"}
    course = courses.sliding(train, test, kinds, stride=config.stride)
    grown = courses.growing(train, test, kinds, 2 * config.stride)
    run.figure("course", courses.draw(course, grown), "When features can be decoded, by windows of 100 ms (lines).")
    for name, scores in course.scores.items():
        run.metric(f"best_{name}", max(scores))
        run.metric(f"best_growing_{name}", max(grown.scores[name]))
    if known and train.low is not None:
        found = courses.peaks(course, 0.0, 0.5)
        expected = {"low": NETWORKS["V1"].latency, "semantic": mean_latency(("LO", "FFA"))}
        run.metric("semantic_lag", found["semantic_peak"] - found["low_peak"], unit="s")
        errors = [abs(found[f"{name}_peak"] - expected[name]) for name in expected]
        run.metric("latency_error", max(errors), unit="s")
        run.metric("before_onset", found["before"])
        run.metric("offset_ratio", found["bump"] / found["trough"])
        run.metric("low_peak", found["low_peak"], unit="s")
        run.metric("semantic_peak", found["semantic_peak"], unit="s")
    return {"times": [(a + b) / 2 for a, b in course.spans], **course.scores}


def _stream(run: Run, codec: Codec, scale: RobustScale, test: Trials, simulated: bool) -> None:
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
        whole = use.predict(codec, scale, replace(test, **{
            name: getattr(test, name)[trial : trial + 1] for name in ("signal", "subject", "positions")
        }))[0]  # fmt: skip
        difference = max(difference, float((taken[-1].latents.retrieval - whole).abs().max() / whole.abs().max()))
    decoder.reset()
    for trial in chosen.tolist():
        steps += [step for sample in test.signal[trial].mT for step in decoder.push(sample[:, None])]
        if sum(step.milliseconds for step in steps) > _STREAM_BUDGET:
            break
    spent = torch.tensor([step.milliseconds for step in steps])
    run.metric("stream_difference", difference)
    run.metric("stream_milliseconds", float(spent.median()), unit="ms")
    run.metric("stream_slowest", float(spent.max()), unit="ms")
    run.metric("stream_speed", decoder.stride / rate * 1000 / float(spent.median()))
    run.metric("stream_latency", sorted(step.latency for step in steps)[len(steps) // 2], unit="s")
    run.figure("stream", use.stream_figure(steps, decoder.stride / rate), "Computing time of every step of the stream.")


# --------------------------------------------------------------------------------------------------------- generation


def _paint(
    config: Config, run: Run, latents: tuple[Tensor, Tensor], train: Trials, test: Trials
) -> pictures.Generation | None:
    """Pictures of test stimuli from predicted latents: nearest neighbours, and the conditional decoder."""
    if train.image is None or test.image is None:
        run.note("The data have no pictures, so none were generated.")
        return None
    mean_trials = test.averaged()
    assert mean_trials.image is not None
    predicted = averaged_predictions(latents[1], test)
    inputs, told, low = train.latent, predicted, {}
    if train.low is not None:  # what the latent does not tell, a ridge reads from the signal, as the papers do
        low = ridges(train, train.low)
        inputs, told = torch.cat([inputs, train.low], 1), torch.cat([told, predict(low, mean_trials)], 1)
    painter = pictures.teach(run, inputs, train.image, config.painting).cpu().eval()
    spread = told.std(0) if len(told) > 1 else torch.zeros_like(told[0])
    moments = {"mean": inputs.mean(0), "std": inputs.std(0), "own_mean": told.mean(0), "own_std": spread}
    thumbs = pictures.small_pictures(train.image)
    generation = pictures.Generation(painter, train.latent, thumbs, moments, low)
    painted, near = generation.of(predicted, mean_trials)
    seen = pictures.small_pictures(mean_trials.image).float() / 255
    for name, made in (("painted", painted), ("nearest", near)):
        for measure, value in pictures.scores(made, seen).items():
            metric = f"{measure}_{name}"
            run.metric(metric, value, published=published("meg-decoding").get(metric))
    run.metric("pixcorr_shuffled", pictures.scores(painted.roll(1, 0), seen)["pixcorr"])
    rows = {"seen": seen, "nearest": near, "generated": painted}
    run.figure("pictures", pictures.draw(rows), "Test pictures, the nearest of training, and the decoder's.")
    return generation


_STREAM_BUDGET = 5000
"""Milliseconds of computing after which a stream has shown what it can do."""


# ------------------------------------------------------------------------------------------------------------ keeping


def _keep(
    run: Run,
    codec: Codec,
    scale: RobustScale,
    train: Trials,
    test: Trials,
    generation: pictures.Generation | None,
    course: Mapping[str, Any],
) -> None:
    """The folder ``decoder/`` that :func:`apply` and Python users load."""
    folder = run.dir / use.FOLDER
    if run.is_first:
        codec.save_pretrained(folder)
        save_weights(scale, folder / use.SCALE)
        seen, shown = train.stimuli()[0], test.stimuli()[0]  # repeats are one candidate
        candidates = torch.cat([train.latent[seen], test.latent[shown]])
        stimulus = torch.cat([train.stimulus[seen], test.stimulus[shown]])
        label = stimulus
        if train.label is not None and test.label is not None:
            label = torch.cat([train.label[seen], test.label[shown]])
        tensors = {"latent": candidates, "stimulus": stimulus, "label": label, "times": train.times}
        write_atomically(folder / use.CANDIDATES, save({name: t.contiguous() for name, t in tensors.items()}))
        about = {
            "recordings": len(scale.centre),
            "channels": scale.centre.shape[1],
            "names": None if train.names is None else list(train.names),
            "people": None if train.people is None else list(train.people),
            "course": dict(course),
        }
        write_atomically(folder / use.ABOUT, json.dumps(about, indent=1).encode())
        if generation is not None:
            generation.save(folder)
    run.artifact(
        "decoder", folder / "model.safetensors", "the convnet with its heads; isthmus apply decodes recordings"
    )
