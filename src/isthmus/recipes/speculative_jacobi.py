"""Speculative Jacobi decoding: image tokens several a pass, from the same distribution (Teng et al., arXiv 2410.01699).

The paper's claim: testing a window of guesses against the model's own distributions of the pass before makes sampling
of autoregressive image models about twice as fast, without training and without a change of what is sampled; Jacobi
decoding with an equality test does not.

What is measured here: whether sequences from a chain of known distribution pass a chi-square test, and whether two
broken samplers fail it; then a small tokenizer and prior are trained, and on them how many passes a token takes, with
windows and first guesses of all kinds, whether tokens are distributed as in ordinary sampling, whether greedy decoding
gives the tokens of transformers' ``generate``, and the seconds saved for one picture. The claims are the sheet's, with
tokens of a trained tokenizer in the place of grey levels.

In Python, on any causal model::

    from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
    from isthmus.samplers.transformers_generate import custom_generate
    model.generate(**inputs, custom_generate=custom_generate(SpeculativeJacobi(window=16)), do_sample=True)

Image tokens of Chameleon, Anole and Janus need a wrapper, see :mod:`isthmus.samplers.transformers_models`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from matplotlib.figure import Figure
from torch import Tensor

from isthmus.bounds import Count, Natural, Positive, Range, at_least
from isthmus.catalog import published
from isthmus.codec import UserError, write_atomically
from isthmus.data import load
from isthmus.engine import Run, Training, read_config
from isthmus.report import figures
from isthmus.samplers.ordinary import Sampling
from isthmus.samplers.raster import Start
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.saved import Saved
from isthmus.tasks import applying
from isthmus.tasks.applying import Answer, Item
from isthmus.tasks.tokens import exactness, foreign
from isthmus.tasks.tokens import figures as token_figures
from isthmus.tasks.tokens.bench import Bench, passes_per_token, settings
from isthmus.tasks.tokens.pictures import ImageTokens, PriorConfig, TokenizerConfig, train

needs = ("image", "label?")
TOKENIZER = Training(steps=100, batch_size=64, lr=2e-3, warmup_steps=10)
PRIOR = Training(steps=80, batch_size=32, lr=2e-3, weight_decay=0.05, warmup_steps=15, clip=1.0)


@dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults take about two minutes on two cores."""

    data: str = "digits:16"
    """Pictures; any source will do. Labels make the prior conditional on classes."""
    model: str = ""
    """A causal model of transformers (a folder or a name on the hub) that is decoded in place of one trained here;
    Chameleon, Anole, Emu3 and Janus draw image tokens."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The prior."""
    tokenizer_training: Training = TOKENIZER
    """Training of the tokenizer."""
    prior_training: Training = PRIOR
    """Training of the prior."""
    window: Count = 8
    """Inputs of a pass, so the most tokens that one can add."""
    windows: tuple[Count, ...] = (4, 8, 16)
    """Windows that are compared."""
    start: Start = "random"
    """First guesses where only one kind is used."""
    starts: tuple[Start, ...] = ("random", "repeat_horizon", "sample_horizon", "repeat_vertical", "sample_vertical")
    """First guesses that are compared."""
    temperature: Positive = 1.0
    """Of sampling."""
    top_k: Natural = 0
    """Tokens that may be drawn; 0 is all."""
    top_p: Annotated[float, Range(0, 1, least_open=True)] = 1.0
    """Probability that may be drawn from; 1 is all."""
    guidance: Annotated[float, Range()] = 1.0
    """Classifier-free guidance away from pictures of no class; 1 is none."""
    images: Count = 32
    """Pictures drawn for every window and start."""
    compared: Count = 192
    """Pictures drawn ordinarily and by windows, for the comparison of distributions."""
    sequences: Annotated[int, at_least(5000)] = 12000
    """Sequences of the chain for every chi-square test."""
    prompts: Count = 20
    """Prompts that are decoded greedily."""
    timed: Count = 3
    """Pictures drawn one by one on the clock."""

    @classmethod
    def paper(cls) -> Config:
        """LlamaGen's text-to-image XL at 512 pixels as the paper decodes it, with classes in the place of text.

        The paper trains nothing; tokenizer and prior have the published sizes, and their training is LlamaGen's.
        """
        return cls(
            data="hub:ILSVRC/imagenet-1k",
            tokenizer=TokenizerConfig(size=512, reduction=16, codes=16384, width=128),
            prior=PriorConfig(layers=36, width=1280),
            tokenizer_training=Training(epochs=40, batch_size=128, lr=1e-4, betas=(0.9, 0.95), workers=8),
            prior_training=Training(
                epochs=300,
                batch_size=256,
                lr=1e-4,
                betas=(0.9, 0.95),
                weight_decay=0.05,
                clip=1.0,
                schedule="constant",
                workers=8,
            ),
            window=16,
            windows=(16,),
            start="repeat_horizon",
            starts=("random", "repeat_horizon"),
            top_k=1000,
            guidance=7.5,
        )


def check(config: Config) -> None:
    """Refuse to compare nothing."""
    if not config.windows or not config.starts:
        raise UserError("--windows and --starts name at least one of each.")


def run(config: Config, run: Run) -> None:
    """Judge exactness, train, and compare decoding with and without windows."""
    _exact(config, run)
    if config.model:
        _somebody_elses(config, run)
        return
    source = load(config.data, "train", needs, run.seed)
    run.log(f"{config.data}: {len(source)} pictures.")
    pictures = train(run, source, config.tokenizer, config.prior, config.tokenizer_training, config.prior_training)
    for network in (pictures.codec, pictures.prior):
        network.to(run.fabric.device)
    bench, decoder = Bench(run, pictures, settings(vars(config), pictures)), _decoder(config)
    bench.held_out(config.data)
    run.log(f"Decoding {bench.length} tokens a picture.")
    _passes(config, run, bench)
    bench.distribution(config.compared, decoder)
    reported = published("speculative-jacobi")
    identical = bench.greedy(config.prompts, SpeculativeJacobi(config.window, "jacobi", config.start))
    run.metric("greedy_identical", identical, published=reported["greedy_identical"])
    seconds = bench.seconds(config.timed, decoder)
    ratio = seconds["ordinary"] / seconds["windows"]
    run.metric("seconds_ratio", ratio, published=reported["seconds_ratio"])


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Draw what might stand below the upper half of every picture, four times, and a sheet of new pictures.

    Writes ``answers.json``, ``NAME-completed.png`` (the picture as its tokens show it, its upper half, and four
    completions) for every input, and ``new.png``.

    Raises:
        UserError: the run did not come to its end or trained nothing, or no input is a picture.
    """
    config = read_config(run_dir)["config"]
    if config["model"]:
        raise UserError(f"{run_dir} decoded {config['model']} and trained nothing; give a run without --model.")
    pictures = ImageTokens.load(run_dir)
    given = settings(config, pictures)
    decoder = SpeculativeJacobi(config["window"], start=config["start"])

    def answer(kept: Saved, item: Item) -> Answer:
        drawn = _completions(pictures, item.input, decoder, given.sampling, torch.Generator().manual_seed(0))
        return Answer(
            {"completions": len(drawn) - 2}, files={"-completed.png": token_figures.png(token_figures.large(drawn, 6))}
        )

    written = applying.apply(run_dir, inputs, out, answer, "tokenizer")
    fresh = decoder.sample(
        pictures.model,
        pictures.prompt(30),
        pictures.length,
        given.sampling,
        guidance=given.guidance,
        generator=torch.Generator().manual_seed(0),
    )
    write_atomically(out / "new.png", token_figures.png(token_figures.large(pictures.pictures(fresh.tokens), 10)))
    return [*written, out / "new.png"]


# ---------------------------------------------------------------------------------------------------------- measuring


def _exact(config: Config, run: Run) -> None:
    found = exactness.verdicts(config.sequences, torch.Generator().manual_seed(run.generator("chain").initial_seed()))
    run.metric("exactness_p", found["exact"].p_value, published=published("speculative-jacobi")["exactness_p"])
    run.metric("exactness_chi_square_per_degree", found["exact"].statistic / found["exact"].degrees)
    run.metric("residual_forgotten_p", found["residual_forgotten"].p_value)
    run.metric("newest_as_draft_p", found["newest_as_draft"].p_value)
    run.log(
        f"Chain of known distribution: p = {found['exact'].p_value:.3f}; broken samplers "
        f"{found['residual_forgotten'].p_value:.1e} and {found['newest_as_draft'].p_value:.1e}."
    )


def _somebody_elses(config: Config, run: Run) -> None:
    sampling = foreign.Settings(config.temperature, config.top_k, config.top_p, config.guidance)
    model = foreign.load(config.model)
    foreign.compare(run, model, sampling, config.windows, config.starts, config.prompts, config.timed)
    run.note(f"{config.model} was decoded with and without windows; nothing was trained.")


def _passes(config: Config, run: Run, bench: Bench) -> None:
    """Passes a token for every window and every kind of first guess, and with the equality test."""
    number, found = bench.count(config.images), {}
    for start in config.starts:
        for window in config.windows:
            decoded = bench.windows(number, SpeculativeJacobi(window, start=start), start, window)
            found[start, window] = passes_per_token(decoded)
            run.metric(f"passes_per_token_{start}_{window}", found[start, window])
    decoded = bench.windows(number, _decoder(config), config.start, config.window)
    run.metric(
        "passes_per_token", passes_per_token(decoded), published=published("speculative-jacobi")["passes_per_token"]
    )
    matching = SpeculativeJacobi(config.window, "matching", config.start)
    run.metric("matching_passes_per_token", passes_per_token(bench.windows(number, matching, "matching")))
    run.figure("passes", _lines(found), "Passes a token; 1 is ordinary sampling.")
    if bench.length == bench.pictures.length:
        text = (
            "When every token was settled: pass number, dark early; equal shades came in one pass. Below, the pictures."
        )
        run.figure("settled", token_figures.settled(bench.pictures, decoded), text)


def _lines(found: Mapping[tuple[str, int], float]) -> Figure:
    starts = dict.fromkeys(start for start, _ in found)
    points = {start: [(float(w), value) for (each, w), value in found.items() if each == start] for start in starts}
    return figures.lines(points, "window", "passes a token", across={"ordinary sampling": 1.0})


def _decoder(config: Config) -> SpeculativeJacobi:
    return SpeculativeJacobi(config.window, start=config.start)


def _completions(
    pictures: ImageTokens, image: Tensor, decoder: SpeculativeJacobi, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """The picture, its upper half, and four ways to go on, ``(6, C, H, W)``."""
    tokens = pictures.tokens(image)
    kept = pictures.side // 2 * pictures.side
    upper = tokens[:, :kept]
    none = torch.full_like(tokens[:, :1], pictures.codes + len(pictures.classes))
    prompt = torch.cat([none, upper], 1).expand(4, -1)
    going_on = dataclasses.replace(sampling, raster=dataclasses.replace(pictures.raster, begun=kept))
    drawn = decoder.sample(pictures.model, prompt, pictures.length - kept, going_on, generator=generator).tokens
    whole = pictures.pictures(torch.cat([tokens, torch.cat([upper.expand(4, -1), drawn], 1)]))
    half = whole[:1].clone()
    half[:, :, pictures.size // 2 :] = 1.0
    return torch.cat([whole[:1], half, whole[1:]])
