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

from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import Tensor

from isthmus.bounds import Count, Natural, Positive, Share, at_least
from isthmus.catalog import published
from isthmus.codec import Codec, UserError
from isthmus.data.builtin.brain.cortex import NETWORKS, mean_latency
from isthmus.decoders.latent_heads import LatentHeads
from isthmus.encoders.signals.meg_conv import MEGConv
from isthmus.engine import Run, Training
from isthmus.engine.fit import fit
from isthmus.layers.robust_scale import RobustScale
from isthmus.objectives.latent_matching import LatentMatching
from isthmus.report import figures
from isthmus.tasks.brain import course as courses
from isthmus.tasks.brain import generation as generating
from isthmus.tasks.brain import streaming, using
from isthmus.tasks.brain.trials import Trials, averaged_predictions, predict, predict_latents, read, retrieve, ridges

needs = ("signal", "subject?", "label?", "image?")
apply = using.apply


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
    attention: Count = 20
    """Channels behind the sensor attention, and behind the 1x1 convolution."""
    position_dim: int = 72
    """Numbers of the position embedding, twice a square."""
    attention_dropout: Annotated[float, at_least(0)] = 0.2
    """Radius of the disc of sensors that is banned in training, in units of the layout."""
    hidden: Count = 24
    """Channels of the convolutions."""
    depth: Count = 4
    """Convolutions."""
    channels: Count = 64
    """Channels of the tokens."""
    head_hidden: Natural = 0
    """Width of a hidden layer in the heads; 0 keeps them linear."""
    subject_dropout: Share = 0.0
    """Share of training trials that go through the layer for people who were never recorded."""
    weight: Share = 0.75
    """Weight of the contrastive loss; the rest is that of the regression."""
    noise: Annotated[float, at_least(0)] = 0.3
    """Noise added to the scaled signal in training."""
    training: Training = Training(
        epochs=26, batch_size=64, lr=3e-3, weight_decay=0.1, warmup_epochs=7.8, warmup_from=0.04
    )
    """Training of the convnet."""
    painting: Training = Training(steps=400, batch_size=64, lr=5e-3, warmup_steps=20)
    """Training of the small conditional decoder."""
    stride: Positive = 0.05
    """Seconds between two of the sliding windows of 0.1 s."""
    k: Count = 5
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
    simulated = config.data.partition("?")[0] == "brain"
    train, test = (_read(config, run, config.data, split) for split in ("train", "test"))
    val = _read(config, run, config.data, "val")
    if train.geometry:
        run.note(f"Sensors and fields: {train.geometry} ({_GEOMETRY[train.geometry]}).")
    run.log(
        f"{config.data}: {len(train)} trials of {len(train.subject.unique())} people, {train.signal.shape[1]} sensors, "
        f"{train.signal.shape[2]} samples; {len(test)} test trials of {len(test.stimulus.unique())} stimuli."
    )
    config = _with_fitting_k(config, run, len(test.stimulus.unique()))
    codec, scale, found = _compare(config, run, "convnet", train, test, val)
    run.metric("chance", config.k / len(test.stimulus.unique()))
    reported = published("meg-decoding")
    for name, value in found.items():
        if name.startswith("top5"):
            named = name.replace("top5", f"top{config.k}")
            run.metric(named, value, published=reported.get(named))
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
        predicted = predict_latents(codec, scale, strange)[0]
        run.metric(f"top{config.k}_cnn_unseen", retrieve(predicted, strange, config.k))
        linear = predict(found["ridges"], strange.scaled(scale))
        run.metric(f"top{config.k}_ridge_unseen", retrieve(linear, strange, config.k))
    if simulated and config.evoked:
        train_evoked, test_evoked = (_read(config, run, config.evoked, split) for split in ("train", "test"))
        val_evoked = _read(config, run, config.evoked, "val")
        other = _compare(config, run, "convnet-evoked", train_evoked, test_evoked, val_evoked)[2]
        run.metric(f"evoked_top{config.k}_cnn", other["top5_cnn"])
        run.metric(f"evoked_top{config.k}_ridge", other["top5_ridge"])
        bars |= {"convnet, evoked": other["top5_cnn"], "ridge, evoked": other["top5_ridge"]}
    run.figure(
        "retrieval", figures.bars(bars, f"top-{config.k}", grey="ridge"), "How often the own candidate is found."
    )

    course = _over_time(config, run, simulated, train, test)
    streaming.measure(run, codec, scale, test)
    scaled = train.scaled(scale), test.scaled(scale)
    generation = generating.paint(run, found["latents"], *scaled, config.painting, reported)
    sensors = using.attention_map(codec.encoder, train.positions[0])
    run.figure("sensors", sensors, "Sensors by their share of attention.")
    using.keep(run, codec, scale, train, test, generation, course)


OFFSET = 0.5
"""Seconds after its onset at which a simulated stimulus ends."""
_GEOMETRY = {
    "ctf275": "the canonical CTF-275 and MNE's forward model",
    "sphere": "a spherical helmet and the formula of a dipole in a sphere, as asked or because MNE is not installed",
}


# ---------------------------------------------------------------------------------------------------------- retrieval


def _with_fitting_k(config: Config, run: Run, candidates: int) -> Config:
    """At most half of the candidates may come first: of four, one finds its own among any five every time."""
    if candidates < 2:
        raise UserError(f"{config.data}: the test trials show {candidates} stimulus; retrieval needs at least 2.")
    if 2 * config.k <= candidates:
        return config
    k = candidates // 2
    run.note(f"{candidates} stimuli are tested, so the first {k} count (top-{k}) and not the first {config.k}.")
    return replace(config, k=k)


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
    result: Any = fit(run, phase, objective, train.memory(phase), training, evaluate=evaluate)
    codec = (result.objective if result.ema is None else result.ema).codec.cpu().eval()
    latents = predict_latents(codec, None, scaled_test)
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
    offset = OFFSET if simulated else None  # nobody says when the stimuli of other data ended
    run.figure(
        "course", courses.draw(course, grown, offset), "When features can be decoded, by windows of 100 ms (lines)."
    )
    for name, scores in course.scores.items():
        run.metric(f"best_{name}", max(scores))
        run.metric(f"best_growing_{name}", max(grown.scores[name]))
    if known and train.low is not None:
        found = courses.peaks(course, 0.0, OFFSET)
        expected = {"low": NETWORKS["V1"].latency, "semantic": mean_latency(("LO", "FFA"))}
        run.metric("semantic_lag", found["semantic_peak"] - found["low_peak"], unit="s")
        errors = [abs(found[f"{name}_peak"] - expected[name]) for name in expected]
        run.metric("latency_error", max(errors), unit="s")
        run.metric("before_onset", found["before"])
        run.metric("offset_ratio", found["bump"] / found["trough"])
        run.metric("low_peak", found["low_peak"], unit="s")
        run.metric("semantic_peak", found["semantic_peak"], unit="s")
    return {"times": [(a + b) / 2 for a, b in course.spans], **course.scores}
