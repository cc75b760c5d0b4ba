"""Speculative Jacobi decoding inside transformers' ``generate``: everything that it prepares (guidance, processors,
stopping criteria, prefix constraints, several sequences a prompt) is kept, only the loop is ours. ::

    faster = custom_generate(SpeculativeJacobi(window=16))
    model.generate(**inputs, custom_generate=faster, do_sample=True, max_new_tokens=1024, guidance_scale=3.0)
    faster.decoded.passes  # what it cost

``do_sample=False`` gives greedy decoding's tokens exactly; otherwise samples have ordinary sampling's distribution.
``results/causal_classes.md`` says of every causal class of transformers whether it does, or why it is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isthmus.codec import extra
from isthmus.samplers import LogitModel
from isthmus.samplers.feed import Guidance
from isthmus.samplers.ordinary import Decoded, Stop
from isthmus.samplers.raster import Raster
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.samplers.transformers_models import CausalModel

_PER_ROW = frozenset(
    f"{name}Logits{kind}"
    for kind in ("Warper", "Processor")
    for name in ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta", "TopH", "SuppressTokens")
) | {"LogitNormalization", "InfNanRemoveLogitsProcessor"}
"""Processors that look at one row of scores and not at the tokens before it: all positions go through at once."""
_REFUSED = {
    "ClassifierFreeGuidanceLogitsProcessor": "it halves the batch",
    "SynthIDTextWatermarkLogitsProcessor": "it counts the tokens drawn",
}


class custom_generate:
    """What ``model.generate(custom_generate=…)`` calls.

    Args:
        decoder: the sampler's settings.
        raster: the image's grammar and lines, for first guesses from neighbours; prefix constraints given to
            ``generate`` do as well, but more slowly.
        wrap: makes the :class:`~isthmus.samplers.LogitModel`, for instance ``ChameleonImages``; pictures in the prompt
            are handed to it by name.
        streamer: gets the tokens of every pass, of a single row; give it to ``generate`` as well, which puts the prompt
            into it but hands no streamer on.

    Attributes:
        decoded: what the last call drew, and its passes.
    """

    def __init__(
        self,
        decoder: SpeculativeJacobi | None = None,
        raster: Raster | None = None,
        wrap: Callable[..., LogitModel] | None = None,
        streamer: Any = None,
    ) -> None:
        self.decoder = SpeculativeJacobi() if decoder is None else decoder
        self.raster, self.wrap, self.streamer = raster, wrap, streamer
        self.decoded: Decoded | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The prompt ``(B, P)`` followed by what was drawn, as ``generate`` returns it.

        Raises:
            ValueError: beam search, encoder-decoder models, or a processor that cannot look ahead.
            UserError: transformers is not installed.
        """
        config, streamer = generation_config, self.streamer if streamer is None else streamer
        _check(model, config)
        guidance, processors = _take_guidance(list(logits_processor or []), len(input_ids))
        first = {k: v for k, v in model_kwargs.items() if k not in _PREPARED and _says_something(v)}
        if guidance is not None and first:
            raise ValueError(
                f"guidance doubles the batch, so the prompt cannot bring {', '.join(sorted(first))} along."
            )
        if config.do_sample and self.decoder.scheme == "jacobi":
            raise ValueError("the scheme jacobi decodes greedily; call generate(do_sample=False), or choose another.")
        wrapped = _wrapped(model, CausalModel if self.wrap is None else self.wrap, first)
        pad = config._pad_token_tensor
        scores = _Processors(processors, input_ids.shape[1], self.raster)
        decoder = self.decoder if config.do_sample else dataclasses.replace(self.decoder, scheme="jacobi")
        if scores.look_back:
            decoder = dataclasses.replace(decoder, advance="together")
        self.decoded = decoder.sample(
            wrapped if guidance is None else _normalised(wrapped),
            input_ids,
            config.max_length - input_ids.shape[1],
            scores,
            guidance=guidance,
            mask=model_kwargs.get("attention_mask"),
            stop=_stop(stopping_criteria, streamer),
            pad=0 if pad is None else int(pad),
        )
        if streamer is not None:
            streamer.end()
        tokens = self.decoded.tokens[:, : int(self.decoded.lengths.max())]
        sequences = torch.cat([input_ids, tokens], 1)
        if config.return_dict_in_generate:
            return extra("transformers.generation", "language").GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences


_PREPARED = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep"} | {
    "cache_position",
    "token_type_ids",
}


def _says_something(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_says_something(each) for each in value.values())
    return value is not None and value is not False


def _wrapped(model: Any, wrap: Callable[..., LogitModel], first: dict[str, Any]) -> LogitModel:
    """The model with what its prompt brings along, such as pictures; nothing of that may be lost without a word."""
    if first and not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(wrap).parameters.values()):
        name = getattr(wrap, "__name__", type(wrap).__name__)
        raise ValueError(f"{name} takes a prompt of ids only, and generate() was given {', '.join(sorted(first))} too.")
    return wrap(model, **first)


def _check(model: Any, config: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("speculative Jacobi decoding is for causal models; this is an encoder-decoder model.")
    if config.num_beams > 1:
        raise ValueError(f"speculative Jacobi decoding draws samples; num_beams must be 1, got {config.num_beams}.")
    asked = [f"output_{name}" for name in ("scores", "logits", "attentions", "hidden_states")]
    if config.return_dict_in_generate and any(getattr(config, name, False) for name in asked):
        raise ValueError(f"{', '.join(asked)} are not kept, because most passes end in guesses; leave them out.")


def _take_guidance(processors: list[Any], batch: int) -> tuple[Guidance | None, list[Any]]:
    """Guidance that generate() prepared as a processor for one token at a time, and the other processors."""
    guidance, others = None, []
    for processor in processors:
        name = type(processor).__name__
        if name in _REFUSED:
            raise ValueError(f"{name} cannot be used with windows of tokens: {_REFUSED[name]}.")
        if name != "UnbatchedClassifierFreeGuidanceLogitsProcessor":
            others.append(processor)
            continue
        if others:
            raise ValueError("guidance must be the first of the processors.")
        context = processor.unconditional_context
        prompt, mask = context["input_ids"], context["attention_mask"]
        guidance = Guidance(float(processor.guidance_scale), prompt, mask)
        if prompt is not None and len(prompt) not in (1, batch):  # several sequences a prompt
            times = batch // len(prompt)
            mask = None if mask is None else mask.repeat_interleave(times, 0)
            guidance = Guidance(guidance.scale, prompt.repeat_interleave(times, 0), mask)
    return guidance, others


def _normalised(model: LogitModel) -> LogitModel:
    """Logarithms of probabilities in place of logits, which is what generate() guides with."""

    def call(inputs: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
        logits, cache = model(inputs, cache, positions, mask)
        return logits.float().log_softmax(-1), cache

    call.takes_positions = getattr(model, "takes_positions", True)  # pyright: ignore[reportFunctionMemberAccess]
    call.one_by_one = getattr(model, "one_by_one", None)  # pyright: ignore[reportFunctionMemberAccess]
    return call


class _Processors:
    """Processors of transformers, which take one position at a time, on all positions of a window."""

    def __init__(self, processors: list[Any], prompt: int, raster: Raster | None) -> None:
        self.processors, self.prompt, self.raster = processors, prompt, raster

    def __call__(self, logits: Tensor, place: Tensor, sequence: Tensor) -> Tensor:
        logits = logits.float()
        if self.raster is not None:
            logits = self.raster.constrain(logits, place + self.raster.begun)
        # Rows that still run stand at one place (see look_back), and those that have ended are behind it.
        lengths = (place.amax(0) + self.prompt).tolist()
        for processor in self.processors:
            if _per_row(processor):
                logits = processor(None, logits.flatten(0, 1)).view_as(logits)
            else:
                columns = [processor(sequence[:, :n], logits[:, i].clone()) for i, n in enumerate(lengths)]
                logits = torch.stack(columns, 1)
        return logits

    @property
    def look_back(self) -> bool:
        """Some processor reads the tokens so far, and so has to see the rows of a batch at the same place."""
        return not all(_per_row(processor) for processor in self.processors)


def _per_row(processor: Any) -> bool:
    return type(processor).__name__ in _PER_ROW


def _stop(criteria: Any, streamer: Any) -> Stop:
    """Stopping criteria, which look at the last token only, asked for every token that a pass added."""

    def stop(sequence: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        ends, done = after.tolist(), [False] * len(after)
        for b, begin in enumerate(before.tolist()):
            for n in range(begin + 1, ends[b] + 1):
                if criteria and bool(criteria(sequence[b : b + 1, :n], None).all()):
                    ends[b], done[b] = n, True
                    break
            if streamer is not None and ends[b] > begin:
                streamer.put(sequence[b, begin : ends[b]].cpu())
        return torch.as_tensor(ends, device=after.device), torch.as_tensor(done, device=after.device)

    return stop
