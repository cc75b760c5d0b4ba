"""Speculative Jacobi decoding beside ordinary decoding with the same model, at batch 1: seconds, passes, memory.

The prior of a finished run is used where one is given (``python -m benchmarks.speculative_jacobi_speed RUN_DIR``), else
a small one is trained on the spot; all ways draw pictures of the same distribution, greedily the same tokens.

The limit: a pass cannot add fewer than one token, so the ratio of seconds is at most tokens / passes, reached where a
pass over a window costs what a pass over one token does. That holds where reading the weights is the work (one row on
a processor or graphics card that waits for memory), and it fails where arithmetic is: a window of W then costs W times
as much. ``window cost`` tells how many single passes one window pass takes here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import compare, record, table
from isthmus.data import load
from isthmus.engine import Run, Training
from isthmus.priors.tiny_lm import tiny_llama
from isthmus.samplers import ordinary
from isthmus.samplers.feed import Feed
from isthmus.samplers.ordinary import Sampling
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.samplers.transformers_generate import custom_generate
from isthmus.samplers.transformers_models import CausalModel
from isthmus.tasks.tokens.pictures import ImageTokens, PriorConfig, TokenizerConfig, train

PICTURES = 4  # drawn by every case of a round


def trained(folder: Path | None) -> ImageTokens:
    """The tokenizer and prior of a run, or small new ones."""
    if folder is not None:
        return ImageTokens.load(folder)
    with tempfile.TemporaryDirectory() as parent, Run.quick(Path(parent), name="speculative-jacobi") as run:
        source = load("digits:16", "train", ("image", "label"))
        training = Training(steps=60, batch_size=32, lr=2e-3, warmup_steps=10, clip=1.0)
        return train(run, source, TokenizerConfig(codes=128), PriorConfig(), training, training)


def sampling_cases(tokens: ImageTokens, cost: dict[str, float]) -> dict[str, Callable[[], Any]]:
    """Sampling at temperature 1, one picture after another; ``cost`` gets the passes a token of every case."""
    sampling, length = Sampling(raster=tokens.raster), tokens.length
    prompts = [tokens.prompt(PICTURES)[i : i + 1] for i in range(PICTURES)]

    def plain() -> None:
        generator = torch.Generator().manual_seed(0)
        for prompt in prompts:
            ordinary.sample(tokens.model, prompt, length, sampling, generator=generator)

    def generate(**more: Any) -> None:
        for prompt in prompts:
            mask = torch.ones_like(prompt)
            settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "max_new_tokens": length}
            tokens.prior.generate(prompt, attention_mask=mask, **settings, **more)

    def windows(name: str, decoder: SpeculativeJacobi) -> Callable[[], None]:
        def run() -> None:
            generator = torch.Generator().manual_seed(0)
            passes = 0
            for prompt in prompts:
                passes += decoder.sample(tokens.model, prompt, length, sampling, generator=generator).passes
            cost[name] = passes / length / PICTURES

        return run

    cases: dict[str, Callable[[], Any]] = {"ours, a token a pass": plain, "transformers generate": generate}
    for window in (4, 8, 16):
        for start in ("random", "repeat_vertical"):
            name = f"windows of {window}, {start.replace('_', ' ')}"
            cases[name] = windows(name, SpeculativeJacobi(window, start=start))  # type: ignore[arg-type]
    inside = custom_generate(SpeculativeJacobi(8))

    def within() -> None:
        generate(custom_generate=inside)
        assert inside.decoded is not None
        cost["windows of 8 inside generate"] = inside.decoded.passes_per_token  # of the last picture

    return {**cases, "windows of 8 inside generate": within}


@torch.no_grad()
def window_costs(model: CausalModel, vocabulary: int) -> dict[str, dict[str, float]]:
    """Seconds of one pass over W tokens behind a cache of 64, over those of one token."""

    def one_pass(width: int) -> Callable[[], None]:
        feed = Feed(model, torch.zeros(1, 64, dtype=torch.long))
        feed.first()
        inputs = torch.arange(width)[None] % vocabulary

        def run() -> None:
            for _ in range(20):
                feed(inputs)
                feed.keep(torch.zeros(1, dtype=torch.long))

        return run

    rows = compare({f"{w} tokens": one_pass(w) for w in (1, 4, 8, 16)}, rounds=7, memory=False)
    for row in rows.values():
        row["window cost"] = row["seconds"] / rows["1 tokens"]["seconds"]
    return rows


def main() -> None:
    """Measure, print and write ``results/benchmarks/speculative_jacobi_speed.json``."""
    tokens = trained(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    cost: dict[str, float] = {}
    rows = compare(sampling_cases(tokens, cost), rounds=5)
    plain = rows["ours, a token a pass"]["seconds"]
    for name, row in rows.items():
        row["passes a token"] = cost.get(name, 1.0)
        row["times as fast"] = plain / row["seconds"]
    print(table(rows))
    small = window_costs(tokens.model, tokens.codes)
    torch.manual_seed(0)
    wide = window_costs(CausalModel(tiny_llama(1000, layers=8, width=768).eval()), 1000)
    costs = {f"recipe's prior, {name}": row for name, row in small.items()}
    costs |= {f"8 layers of 768, {name}": row for name, row in wide.items()}
    print(table(costs))
    limit = "times as fast = tokens / (passes x window cost); passes belong to the model, window cost to the machine"
    record("speculative_jacobi_speed", {"sampling": rows, "passes": costs}, pictures=PICTURES, limit=limit)


if __name__ == "__main__":
    main()
