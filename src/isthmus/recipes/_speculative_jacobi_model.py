"""Somebody else's causal model of transformers, decoded by windows inside ``generate`` and without them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.codec import UserError, extra
from isthmus.engine import Run
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.samplers.transformers_generate import custom_generate


def load(name: str) -> Any:
    """A causal model from a folder or the hub, in evaluation mode.

    Raises:
        UserError: there is none of that name, or it is no causal model.
    """
    transformers = extra("transformers", "language")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(name).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name!r} is no causal model that transformers can load: {reason}") from error


def compare(
    run: Run,
    model: Any,
    settings: dict[str, Any],
    windows: Sequence[int],
    starts: Sequence[str],
    prompts: int,
    timed: int,
    length: int = 64,
) -> None:
    """Metrics of greedy identity, passes and seconds, over prompts of eight random tokens.

    Args:
        run: for the metrics.
        model: the causal model.
        settings: of sampling, as ``generate`` takes them.
        windows: that are tried.
        starts: first guesses that are tried; those from the line above need an image and are left out.
        prompts: number of prompts.
        timed: how many of them are drawn on the clock.
        length: tokens that are drawn, or fewer where the model has no positions for them.
    """
    model.to(run.fabric.device)
    vocabulary = model.get_input_embeddings().num_embeddings
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 72
    length = min(length, places - 8) if run.options.max_steps is None else 8
    ids = torch.randint(vocabulary, (prompts, 8), generator=run.generator("prompts")).to(run.fabric.device)
    end = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": length}

    def draw(row: int, way: custom_generate | None, **more: Any) -> tuple[Tensor, float]:
        prompt, began = ids[row : row + 1], time.perf_counter()
        given = {"attention_mask": torch.ones_like(prompt), **end, **more}
        out = model.generate(prompt, **given, **({} if way is None else {"custom_generate": way}))
        return out, time.perf_counter() - began

    greedy = custom_generate(SpeculativeJacobi(max(windows)))
    same = [
        torch.equal(draw(row, None, do_sample=False)[0], draw(row, greedy, do_sample=False)[0])
        for row in range(prompts)
    ]
    run.metric("greedy_identical", sum(same) / prompts)
    run.seed_everything("model")
    plain = [draw(row, None, do_sample=True, **settings)[1] for row in range(min(timed, prompts))]
    run.metric("seconds_generate", statistics.median(plain), unit="s")
    for start in starts:
        if start.endswith("vertical"):
            continue
        for window in windows:
            faster, seconds, passes = custom_generate(SpeculativeJacobi(window, start=start)), [], 0  # type: ignore[arg-type]
            for row in range(min(timed, prompts)):
                seconds.append(draw(row, faster, do_sample=True, **settings)[1])
                passes += faster.decoded.passes if faster.decoded is not None else 0
            run.metric(f"passes_per_token_{start}_{window}", passes / length / len(seconds))
            run.metric(f"seconds_{start}_{window}", statistics.median(seconds), unit="s")
