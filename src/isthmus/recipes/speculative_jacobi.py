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
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.catalog import published
from isthmus.codec import UserError, write_atomically
from isthmus.data import evaluation_batches, load
from isthmus.data.dataset import Unreadable
from isthmus.data.readers.decoding import IMAGE_SUFFIXES, decode_image
from isthmus.engine import Run, Training, read_config
from isthmus.metrics.distributions import same_marginals, sliced_wasserstein
from isthmus.recipes import _speculative_exactness as exactness
from isthmus.recipes import _speculative_jacobi_model as foreign
from isthmus.recipes import _token_figures as figures
from isthmus.recipes._image_tokens import (
    ImageTokens,
    NextToken,
    PriorConfig,
    TokenizerConfig,
    at_once,
    picture_transform,
    tokenized,
    train,
)
from isthmus.samplers import ordinary
from isthmus.samplers.logits import top_k_top_p
from isthmus.samplers.ordinary import Decoded, Sampling
from isthmus.samplers.raster import Raster, Start
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi

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
    window: int = 8
    """Inputs of a pass, so the most tokens that one can add."""
    windows: tuple[int, ...] = (4, 8, 16)
    """Windows that are compared."""
    start: Start = "random"
    """First guesses where only one kind is used."""
    starts: tuple[Start, ...] = ("random", "repeat_horizon", "sample_horizon", "repeat_vertical", "sample_vertical")
    """First guesses that are compared."""
    temperature: float = 1.0
    """Of sampling."""
    top_k: int = 0
    """Tokens that may be drawn; 0 is all."""
    top_p: float = 1.0
    """Probability that may be drawn from; 1 is all."""
    guidance: float = 1.0
    """Classifier-free guidance away from pictures of no class; 1 is none."""
    images: int = 32
    """Pictures drawn for every window and start."""
    compared: int = 192
    """Pictures drawn ordinarily and by windows, for the comparison of distributions."""
    sequences: int = 12000
    """Sequences of the chain for every chi-square test."""
    prompts: int = 20
    """Prompts that are decoded greedily."""
    timed: int = 3
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


def run(config: Config, run: Run) -> None:
    """Judge exactness, train, and compare decoding with and without windows."""
    _check(config)
    _exact(config, run)
    if config.model:
        _somebody_elses(config, run)
        return
    source = load(config.data, "train", needs, run.seed)
    run.log(f"{config.data}: {len(source)} pictures.")
    pictures = train(run, source, config.tokenizer, config.prior, config.tokenizer_training, config.prior_training)
    run.artifact("tokenizer", run.dir / "tokenizer", "the tokenizer: isthmus.codec.Codec.from_pretrained reads it")
    run.artifact("prior", run.dir / "prior.safetensors", "the prior; `isthmus apply` draws new pictures with both")
    for network in (pictures.codec, pictures.prior):
        network.to(run.fabric.device)
    bench = _Bench(config, run, pictures)
    _held_out(config, run, bench)
    run.log(f"Decoding {bench.length} tokens a picture.")
    _passes(config, run, bench)
    _distribution(config, run, bench)
    _greedy(config, run, bench)
    _seconds(config, run, bench)


def apply(run_dir: Path, inputs: list[Path], out: Path) -> list[Path]:
    """Draw what might stand below the upper half of every picture, four times, and a sheet of new pictures.

    Writes ``NAME-completed.png`` (the picture as its tokens show it, its upper half, and four completions) for every
    input, and ``new.png``. Inputs that are no picture are skipped and named.

    Raises:
        UserError: the run did not come to its end or trained nothing, or no input is a picture.
    """
    if (run_dir / "config.json").is_file() and (model := read_config(run_dir)["config"]["model"]):
        raise UserError(f"{run_dir} decoded {model} and trained nothing; give a run without --model.")
    pictures = ImageTokens.load(run_dir)
    saved = read_config(run_dir)["config"]
    sampling = _sampling(saved, pictures.raster)
    decoder = SpeculativeJacobi(saved["window"], start=saved["start"])
    transform, generator = picture_transform(pictures.size), torch.Generator().manual_seed(0)
    found: list[tuple[Path, Tensor]] = []
    skipped: list[str] = []
    for path in inputs:
        try:
            image = decode_image(path)[None].float() / 255
        except Unreadable as error:
            skipped.append(f"{path}: {error}")
            continue
        seen = transform({"image": image, "index": torch.zeros(1, dtype=torch.long)}, generator)["image"]
        found.append((path, seen))
    if not found:
        told = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(f"none of the inputs is an image{told}; known are {', '.join(IMAGE_SUFFIXES)}.")
    if skipped:
        sys.stderr.write(f"{len(skipped)} of {len(inputs)} files could not be read: {'; '.join(skipped)}\n")
    written: list[Path] = []
    for path, image in found:
        target, number = out / f"{path.stem}-completed.png", len(written)
        while target in written:
            target, number = out / f"{path.stem}-{number}-completed.png", number + 1
        drawn = _completions(pictures, image, decoder, sampling, generator)
        write_atomically(target, figures.png(figures.large(drawn, 6)))
        written.append(target)
    fresh = decoder.sample(
        pictures.model,
        pictures.prompt(30),
        pictures.length,
        sampling,
        guidance=pictures.guidance(saved["guidance"]),
        generator=generator,
    )
    write_atomically(out / "new.png", figures.png(figures.large(pictures.pictures(fresh.tokens), 10)))
    return [*written, out / "new.png"]


# ---------------------------------------------------------------------------------------------------------- measuring


def _check(config: Config) -> None:
    """Tell what cannot be before anything is trained."""
    for name in ("images", "compared", "prompts", "timed"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is at least 1, got {getattr(config, name)}.")
    if not config.windows or not config.starts:
        raise UserError("windows and starts name at least one of each.")
    for window in (config.window, *config.windows):
        SpeculativeJacobi(window, start=config.start)
    if not math.isfinite(config.guidance):
        raise UserError(f"guidance is a finite number, got {config.guidance}.")
    top_k_top_p(torch.zeros(1, 2), config.top_k, config.top_p, config.temperature)


def _exact(config: Config, run: Run) -> None:
    if config.sequences < 5000:
        raise UserError(f"sequences must be at least 5000 for a chi-square test, got {config.sequences}.")
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
    settings = foreign.Settings(config.temperature, config.top_k, config.top_p, config.guidance)
    model = foreign.load(config.model)
    foreign.compare(run, model, settings, config.windows, config.starts, config.prompts, config.timed)
    run.note(f"{config.model} was decoded with and without windows; nothing was trained.")


class _Bench:
    """Draws pictures in all the ways that are compared, with prompts of all classes in turn."""

    def __init__(self, config: Config, run: Run, pictures: ImageTokens) -> None:
        self.config, self.run, self.pictures = config, run, pictures
        # --max-steps is a smoke test of the published sizes: then a few tokens have to do.
        self.length = pictures.length if run.options.max_steps is None else min(pictures.length, 16)
        self.sampling = _sampling(vars(config), pictures.raster)
        self.guidance = pictures.guidance(config.guidance)

    def count(self, number: int) -> int:
        """So many pictures, or two in a smoke test."""
        return number if self.run.options.max_steps is None else min(number, 2)

    def ordinary(self, number: int, *key: int | str) -> Decoded:
        prompt, generator = self.pictures.prompt(number), self.run.generator("ordinary", *key)
        return ordinary.sample(
            self.pictures.model, prompt, self.length, self.sampling, guidance=self.guidance, generator=generator
        )

    def windows(self, number: int, decoder: SpeculativeJacobi, *key: int | str) -> Decoded:
        prompt, generator = self.pictures.prompt(number), self.run.generator("windows", *key)
        return decoder.sample(
            self.pictures.model, prompt, self.length, self.sampling, guidance=self.guidance, generator=generator
        )


def passes_per_token(decoded: Decoded) -> float:
    """Mean over rows of the passes in which a row went on, over its tokens."""
    passes = (torch.stack(decoded.advances) > 0).sum(0)
    return float((passes / decoded.lengths).mean())


def _held_out(config: Config, run: Run, bench: _Bench) -> None:
    """How good tokenizer and prior are: error a pixel, and bits a token on pictures that neither has seen."""
    source, pictures = load(config.data, "val+test", needs, run.seed), bench.pictures
    source = source.select(np.arange(min(bench.count(256), len(source))))
    transform, size = picture_transform(config.tokenizer.size), at_once(config.tokenizer.size)
    images = torch.cat([b["image"] for b in evaluation_batches(source, size, transform=transform)])
    held = tokenized(run, pictures.codec, source, config.tokenizer.size, bool(pictures.classes))
    shown = {name: run.fabric.to_device(torch.as_tensor(column)) for name, column in held.data.items()}
    objective, nats = NextToken(pictures.prior, pictures.codes, len(pictures.classes)), 0.0
    with torch.no_grad():
        for begin in range(0, len(held), 32):
            part = {name: column[begin : begin + 32] for name, column in shown.items()}
            nats += float(objective(part, torch.Generator()).loss) * len(part["tokens"])
    run.metric("bits_per_token", nats / len(held) / math.log(2), unit="bits")
    run.metric("codes_used", len(shown["tokens"].unique()))
    rebuilt = pictures.pictures(shown["tokens"]).cpu()
    run.metric("rebuilt_rmse", float((rebuilt - images).square().mean().sqrt()))
    both = torch.cat([images[:16], rebuilt[:16]])
    run.figure("tokenizer", figures.large(both, 16), "Held-out pictures, and below them what their tokens show.")


def _passes(config: Config, run: Run, bench: _Bench) -> None:
    """Passes a token for every window and every kind of first guess, and with the equality test."""
    number, found = bench.count(config.images), {}
    for start in config.starts:
        for window in config.windows:
            decoded = bench.windows(number, SpeculativeJacobi(window, start=start), start, window)
            found[start, window] = passes_per_token(decoded)
            run.metric(f"passes_per_token_{start}_{window}", found[start, window])
    main = SpeculativeJacobi(config.window, start=config.start)
    decoded = bench.windows(number, main, config.start, config.window)
    run.metric(
        "passes_per_token", passes_per_token(decoded), published=published("speculative-jacobi")["passes_per_token"]
    )
    matching = SpeculativeJacobi(config.window, "matching", config.start)
    run.metric("matching_passes_per_token", passes_per_token(bench.windows(number, matching, "matching")))
    run.figure("passes", figures.lines(found), "Passes a token; 1 is ordinary sampling.")
    if bench.length == bench.pictures.length:
        text = (
            "When every token was settled: pass number, dark early; equal shades came in one pass. Below, the pictures."
        )
        run.figure("settled", figures.settled(bench.pictures, decoded), text)


def _distribution(config: Config, run: Run, bench: _Bench) -> None:
    """Tokens and pictures from windows beside those of ordinary sampling."""
    number = bench.count(config.compared)
    plain = bench.ordinary(number, "compared")
    again = bench.ordinary(number, "again")
    fast = bench.windows(number, SpeculativeJacobi(config.window, start=config.start), "compared")
    generator = torch.Generator().manual_seed(run.generator("sides").initial_seed())
    vocabulary = bench.pictures.codes
    run.metric("marginals_p", same_marginals(plain.tokens, fast.tokens, vocabulary, generator))
    if bench.length < bench.pictures.length:
        return
    shown = {name: bench.pictures.pictures(d.tokens) for name, d in (("o", plain), ("a", again), ("f", fast))}
    flat = {name: images.flatten(1).cpu() for name, images in shown.items()}
    run.metric("distance_windows_to_ordinary", sliced_wasserstein(flat["o"], flat["f"], generator=generator))
    run.metric("distance_ordinary_to_ordinary", sliced_wasserstein(flat["o"], flat["a"], generator=generator))
    side_by_side = torch.cat([torch.cat([shown["o"][i : i + 10], shown["f"][i : i + 10]]) for i in (0, 10)])
    run.figure("samples", figures.large(side_by_side, 10), "Rows 1 and 3: ordinary sampling; rows 2 and 4: by windows.")


def _greedy(config: Config, run: Run, bench: _Bench) -> None:
    """Greedy decoding by windows beside transformers' own, over prompts of a class and the first tokens of a sample."""
    pictures, number = bench.pictures, bench.count(config.prompts)
    drawn = bench.ordinary(number, "prompts").tokens
    same = 0
    for row in range(number):
        begun = drawn[row : row + 1, : row // 2 % max(1, bench.length // 2)]
        prompt = torch.cat([pictures.prompt(number)[row : row + 1], begun], 1)
        theirs = pictures.prior.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=bench.length,
            pad_token_id=0,
        )
        decoder = SpeculativeJacobi(config.window, "jacobi", config.start if bench.sampling.raster else "random")
        ours = decoder.sample(pictures.model, prompt, bench.length).tokens
        same += int(torch.equal(theirs[:, prompt.shape[1] :], ours))
    run.metric("greedy_identical", same / number, published=published("speculative-jacobi")["greedy_identical"])


def _seconds(config: Config, run: Run, bench: _Bench) -> None:
    """Wall-clock of one picture at a time; the median, in turn."""
    ways: dict[str, Callable[[int], Any]] = {
        "ordinary": lambda i: bench.ordinary(1, "clock", i),
        "windows": lambda i: bench.windows(1, SpeculativeJacobi(config.window, start=config.start), "clock", i),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(bench.count(config.timed) + 1):
        for name, draw in ways.items():
            began = time.perf_counter()
            draw(i)
            taken[name].append(time.perf_counter() - began)
    median = {name: sorted(each[1:])[len(each[1:]) // 2] for name, each in taken.items()}
    for name, value in median.items():
        run.metric(f"seconds_{name}", value, unit="s")
    run.metric(
        "seconds_ratio",
        median["ordinary"] / median["windows"],
        published=published("speculative-jacobi")["seconds_ratio"],
    )


# -------------------------------------------------------------------------------------------------------------- parts


def _sampling(config: Mapping[str, Any], raster: Raster) -> Sampling:
    top_p = config["top_p"] if config["top_p"] != 1 else None
    return Sampling(config["temperature"], config["top_k"] or None, top_p, raster)


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
