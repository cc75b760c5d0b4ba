"""Somebody else's causal model of transformers, decoded by windows and without them.

Models of text are decoded inside ``generate``. Those of pictures (Chameleon and Anole, Emu3, Janus) draw their image
tokens, from a prompt of text, by our own loops: ``generate`` has no common way to ask them for pictures.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isthmus.codec import UserError, extra
from isthmus.engine import Run
from isthmus.samplers import LogitModel, ordinary
from isthmus.samplers.feed import Guidance
from isthmus.samplers.ordinary import Sampling
from isthmus.samplers.raster import Raster, Start
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.samplers.transformers_generate import custom_generate
from isthmus.samplers.transformers_models import CausalModel, ChameleonImages, JanusImages

#: Model types whose image tokens are drawn, and their classes; all others are loaded as causal language models.
PICTURES = {f"{name.lower()}": f"{name}ForConditionalGeneration" for name in ("Chameleon", "Emu3", "Janus")}
_EMU3_SIDE = 90  # tokens of a line at the published 720 pixels; Emu3 has no size of its own


class Settings(NamedTuple):
    """Of sampling; ``top_k`` 0, ``top_p`` 1 and ``guidance`` 1 change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


def load(name: str) -> Any:
    """A model from a folder or the hub, in evaluation mode.

    Raises:
        UserError: there is none of that name, it is no causal model, or its weights are not all there.
    """
    transformers = extra("transformers", "language")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, PICTURES.get(config.model_type, "AutoModelForCausalLM"))
        model, told = kind.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name!r} is no causal model that transformers can load: {reason}") from error
    missing = sorted(told["missing_keys"])
    if missing:  # transformers would draw them at random
        raise UserError(
            f"{name!r} lacks weights of {type(model).__name__}: {missing[0]} (and {len(missing) - 1} more); give the "
            "whole checkpoint of that model."
        )
    return model.eval()


def compare(
    run: Run,
    model: Any,
    settings: Settings,
    windows: Sequence[int],
    starts: Sequence[Start],
    prompts: int,
    timed: int,
    length: int = 64,
) -> None:
    """Metrics of greedy identity, passes and seconds, over prompts of eight random tokens.

    Args:
        run: for the metrics.
        model: of :func:`load`.
        settings: of sampling.
        windows: that are tried.
        starts: first guesses that are tried; those from the line above need an image and are left out for text.
        prompts: number of prompts.
        timed: how many of them are drawn on the clock.
        length: tokens of text that are drawn, or of a picture, at least two lines of it; fewer where the model has no
            positions for them.

    Raises:
        UserError: a number below 1.
    """
    if min(prompts, timed, *windows) < 1:
        raise UserError(f"prompts, timed and windows are at least 1, got {prompts}, {timed} and {tuple(windows)}.")
    model.to(run.fabric.device)
    pictures = picture_tokens(model)
    if pictures is not None:
        length = max(length, 2 * pictures[1].line)
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 8 + length
    length = min(length, places - 8) if run.options.max_steps is None else 8
    if length < 1:
        raise UserError(f"the model has {places} positions, which leave nothing to draw after a prompt of 8 tokens.")
    draw = _Text(model, settings, length) if pictures is None else _Pictures(*pictures, settings, length)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (prompts, 8), generator=run.generator("prompts")).to(run.fabric.device)

    greedy = SpeculativeJacobi(max(windows), "jacobi")
    same = [torch.equal(draw(row, None, greedy=True)[0], draw(row, greedy, greedy=True)[0]) for row in ids.split(1)]
    run.metric("greedy_identical", sum(same) / prompts)
    run.seed_everything("model")

    def clocked(decoder: SpeculativeJacobi | None) -> tuple[float, float]:
        """Median seconds, and passes a token."""
        seconds, passes = [], 0
        for row in ids[:timed].split(1):
            began = time.perf_counter()
            passes += draw(row, decoder)[1]
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds), passes / length / len(seconds)

    run.metric("seconds_generate" if pictures is None else "seconds_ordinary", clocked(None)[0], unit="s")
    for start in starts:
        if pictures is None and start.endswith("vertical"):
            continue
        for window in windows:
            seconds, passes = clocked(SpeculativeJacobi(window, start=start))
            run.metric(f"passes_per_token_{start}_{window}", passes)
            run.metric(f"seconds_{start}_{window}", seconds, unit="s")


def picture_tokens(model: Any) -> tuple[LogitModel, Raster] | None:
    """What draws a model's image tokens, and their grammar; ``None`` for a model of text."""
    kind = type(model).__name__
    if kind not in PICTURES.values():
        return None
    if kind.startswith("Chameleon"):
        vq, wrapped = model.config.vq_config, ChameleonImages(model)
        side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
        return wrapped, Raster(side, side, wrapped.image_tokens)
    if kind.startswith("Emu3"):
        mapping = model.model.vocabulary_mapping
        tokens = sorted(int(token) for token in mapping.image_tokens)
        return CausalModel(model), Raster(_EMU3_SIDE, _EMU3_SIDE, tokens, int(mapping.eol_token_id))
    janus = JanusImages(model)
    side = math.isqrt(janus.length)
    return janus, Raster(side, side)


class _Text:
    """Text by ``generate``, ordinary or with our loop inside."""

    def __init__(self, model: Any, settings: Settings, length: int) -> None:
        self.model = model
        self.given = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": length}
        if settings.guidance != 1:
            self.given["guidance_scale"] = settings.guidance
        self.sampling = {key: value for key, value in settings._asdict().items() if key != "guidance"}

    def __call__(self, prompt: Tensor, decoder: SpeculativeJacobi | None, greedy: bool = False) -> tuple[Tensor, int]:
        given = {"attention_mask": torch.ones_like(prompt), "do_sample": not greedy, **self.given}
        if not greedy:
            given |= self.sampling
        if decoder is None:
            return self.model.generate(prompt, **given), self.given["max_new_tokens"]
        way = custom_generate(decoder)
        out = self.model.generate(prompt, custom_generate=way, **given)
        return out, way.decoded.passes if way.decoded is not None else 0


class _Pictures:
    """Image tokens after a prompt of text."""

    def __init__(self, model: LogitModel, raster: Raster, settings: Settings, length: int) -> None:
        top_p = settings.top_p if settings.top_p != 1 else None
        self.model, self.length, self.raster = model, length, raster
        self.sampling = Sampling(settings.temperature, settings.top_k or None, top_p, raster)
        self.guidance = None if settings.guidance == 1 else Guidance(settings.guidance)

    def __call__(self, prompt: Tensor, decoder: SpeculativeJacobi | None, greedy: bool = False) -> tuple[Tensor, int]:
        sampling = Sampling(raster=self.raster) if greedy else self.sampling
        if decoder is None:
            drawn = ordinary.sample(self.model, prompt, self.length, sampling, greedy=greedy, guidance=self.guidance)
        else:
            drawn = decoder.sample(self.model, prompt, self.length, sampling, guidance=self.guidance)
        return drawn.tokens, drawn.passes
