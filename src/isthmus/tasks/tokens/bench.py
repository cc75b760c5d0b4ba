"""Samplers of image tokens beside ordinary sampling: how good the prior is, whether draws are alike, their seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from isthmus.data import evaluation_batches, load
from isthmus.engine import Run
from isthmus.metrics.distributions import same_marginals, sliced_wasserstein
from isthmus.samplers import ordinary
from isthmus.samplers.feed import Guidance
from isthmus.samplers.ordinary import Decoded, Sampling
from isthmus.tasks.tokens import figures
from isthmus.tasks.tokens.pictures import ImageTokens, NextToken, at_once, picture_transform, tokenized


class Sampler(Protocol):
    """What is compared with ordinary sampling."""

    def sample(self, model: Any, prompt: Tensor, length: int, /, *arguments: Any, **named: Any) -> Decoded: ...


class Settings(NamedTuple):
    """Of sampling, and of guidance."""

    sampling: Sampling
    guidance: Guidance | None


def settings(config: Mapping[str, Any], pictures: ImageTokens) -> Settings:
    """From ``temperature``, ``top_k``, ``top_p`` and ``guidance`` of a recipe's config."""
    top_p = config["top_p"] if config["top_p"] != 1 else None
    sampling = Sampling(config["temperature"], config["top_k"] or None, top_p, pictures.raster)
    return Settings(sampling, pictures.guidance(config["guidance"]))


class Bench:
    """Draws pictures in all the ways that are compared, with prompts of all classes in turn.

    A try-out with ``--max-steps`` draws two pictures of a few tokens.
    """

    def __init__(self, run: Run, pictures: ImageTokens, given: Settings) -> None:
        self.run, self.pictures = run, pictures
        self.length = pictures.length if run.options.max_steps is None else min(pictures.length, 16)
        self.sampling, self.guidance = given

    def count(self, number: int) -> int:
        """So many pictures, or two in a try-out."""
        return number if self.run.options.max_steps is None else min(number, 2)

    def ordinary(self, number: int, *key: int | str) -> Decoded:
        """So many pictures, a token a pass."""
        prompt, generator = self.pictures.prompt(number), self.run.generator("ordinary", *key)
        return ordinary.sample(
            self.pictures.model, prompt, self.length, self.sampling, guidance=self.guidance, generator=generator
        )

    def windows(self, number: int, decoder: Sampler, *key: int | str) -> Decoded:
        """So many pictures by another sampler."""
        prompt, generator = self.pictures.prompt(number), self.run.generator("windows", *key)
        return decoder.sample(
            self.pictures.model, prompt, self.length, self.sampling, guidance=self.guidance, generator=generator
        )

    def held_out(self, data: str) -> None:
        """How good tokenizer and prior are: error a pixel, and bits a token on pictures that neither has seen."""
        run, pictures = self.run, self.pictures
        source = load(data, "val+test", ("image", "label?"), run.seed)
        source = source.first(self.count(256))
        transform, size = picture_transform(pictures.size), at_once(pictures.size)
        images = torch.cat([b["image"] for b in evaluation_batches(source, size, transform=transform)])
        held = tokenized(run, pictures.codec, source, pictures.size, bool(pictures.classes))
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

    def distribution(self, number: int, decoder: Sampler) -> None:
        """Tokens and pictures from windows beside those of ordinary sampling."""
        run, number = self.run, self.count(number)
        plain = self.ordinary(number, "compared")
        again = self.ordinary(number, "again")
        fast = self.windows(number, decoder, "compared")
        generator = torch.Generator().manual_seed(run.generator("sides").initial_seed())
        vocabulary = self.pictures.codes
        run.metric("marginals_p", same_marginals(plain.tokens, fast.tokens, vocabulary, generator))
        if self.length < self.pictures.length:
            return
        shown = {name: self.pictures.pictures(d.tokens) for name, d in (("o", plain), ("a", again), ("f", fast))}
        flat = {name: images.flatten(1).cpu() for name, images in shown.items()}
        run.metric("distance_windows_to_ordinary", sliced_wasserstein(flat["o"], flat["f"], generator=generator))
        run.metric("distance_ordinary_to_ordinary", sliced_wasserstein(flat["o"], flat["a"], generator=generator))
        side_by_side = torch.cat([torch.cat([shown["o"][i : i + 10], shown["f"][i : i + 10]]) for i in (0, 10)])
        run.figure(
            "samples", figures.large(side_by_side, 10), "Rows 1 and 3: ordinary sampling; rows 2 and 4: by windows."
        )

    def greedy(self, number: int, decoder: Sampler) -> float:
        """Share of prompts that are decoded greedily to the tokens of transformers' own ``generate``.

        Prompts are a class and the first tokens of a sample.
        """
        pictures, number = self.pictures, self.count(number)
        drawn = self.ordinary(number, "prompts").tokens
        same = 0
        for row in range(number):
            begun = drawn[row : row + 1, : row // 2 % max(1, self.length // 2)]
            prompt = torch.cat([pictures.prompt(number)[row : row + 1], begun], 1)
            theirs = pictures.prior.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=self.length,
                pad_token_id=0,
            )
            ours = decoder.sample(pictures.model, prompt, self.length).tokens
            same += int(torch.equal(theirs[:, prompt.shape[1] :], ours))
        return same / number

    def seconds(self, number: int, decoder: Sampler) -> dict[str, float]:
        """Median seconds of one picture, ordinarily and by windows, in turn; recorded as ``seconds_WAY``."""
        ways: dict[str, Callable[[int], Any]] = {
            "ordinary": lambda i: self.ordinary(1, "clock", i),
            "windows": lambda i: self.windows(1, decoder, "clock", i),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(self.count(number) + 1):
            for name, draw in ways.items():
                began = time.perf_counter()
                draw(i)
                taken[name].append(time.perf_counter() - began)
        median = {name: sorted(each[1:])[len(each[1:]) // 2] for name, each in taken.items()}
        for name, value in median.items():
            self.run.metric(f"seconds_{name}", value, unit="s")
        return median


def passes_per_token(decoded: Decoded) -> float:
    """Mean over rows of the passes in which a row went on, over its tokens."""
    passes = (torch.stack(decoded.advances) > 0).sum(0)
    return float((passes / decoded.lengths).mean())
