"""Models of the transformers library as :class:`~isthmus.samplers.LogitModel`.

``CausalModel(model)`` serves every causal language model (Llama, GPT-2, Emu3, …). Two families keep image tokens apart:
``ChameleonImages`` (also Anole) and ``JanusImages``. ::

    model = CausalModel(Emu3ForConditionalGeneration.from_pretrained("BAAI/Emu3-Gen-hf"))
    SpeculativeJacobi(window=16).sample(model, prompt, 90 * 91, Sampling(top_k=2048, raster=raster), guidance=guidance)

Nothing here imports transformers: the models come with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from isthmus.codec import UserError
from isthmus.samplers.feed import Guidance

_ONE_BY_ONE = {
    "moshi": "its attention has a window of keys but no mask for it, so that several tokens see other keys than one",
}
"""Model types whose forward over several tokens differs from one token at a time, and why."""
_WHOLE = {"cpmant": "it wants all ids in every pass"}
_ROWS_TOGETHER = {"git"}
"""Types that widen the mask of a cache themselves, so that rows of a batch cannot be shifted against each other."""


class CausalModel:
    """Any transformers model whose ``forward`` takes ids and a cache and returns logits.

    Args:
        model: the model, in evaluation mode.
        first: more arguments for the first call only, such as ``pixel_values`` of pictures in the prompt.

    Raises:
        UserError: the model has no cache of keys and values.

    Attributes:
        takes_positions: whether rows of a batch may stand at different places.
        one_by_one: why the model cannot take several tokens after its cache, or nothing.
    """

    def __init__(self, model: Any, **first: Any) -> None:
        self.model, self.first = model, first
        self.forward = _Remembering(model)
        kind = getattr(getattr(model, "config", None), "model_type", "")
        self.takes_positions = self.forward.places and kind not in _ROWS_TOGETHER
        self.one_by_one = _ONE_BY_ONE.get(kind)

    def __call__(self, inputs: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
        """Ids ``(B, L)`` or vectors ``(B, L, D)`` to logits ``(B, L, V)`` and the cache."""
        out, cache = self.forward(inputs, cache, positions, mask, **(self.first if cache is None else {}))
        return out.logits, cache


class ChameleonImages:
    """Chameleon and Anole with their image tokens, which ``ChameleonForConditionalGeneration.forward`` rules out.

    ``image_tokens`` are the ids for a raster: ``Raster(32, 32, tokens=model.image_tokens)``.

    Args:
        model: the model, in evaluation mode.
        first: more arguments for the first call only, such as ``pixel_values`` of pictures in the prompt.
    """

    def __init__(self, model: Any, **first: Any) -> None:
        self.model, self.first = model, first
        self.forward = _Remembering(model.model)
        self.image_tokens: list[int] = sorted(int(token) for token in model.model.vocabulary_mapping.image_tokens)

    def __call__(self, inputs: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
        """Ids ``(B, L)`` to logits ``(B, L, V)`` of text and image tokens, and the cache."""
        out, cache = self.forward(inputs, cache, positions, mask, **(self.first if cache is None else {}))
        return self.model.lm_head(out.last_hidden_state), cache


class JanusImages:
    """Janus' image tokens: the prompt is text, all that follows has the vocabulary, embedding and head of images."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forward = _Remembering(model.model.language_model)
        self.length = int(model.model.vision_model.config.num_image_tokens)

    def __call__(self, inputs: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
        """Ids ``(B, L)``, of text without a cache and of image tokens with one, to logits ``(B, L, V)`` of images."""
        embed = (
            self.model.get_input_embeddings() if cache is None else self.model.prepare_embeddings_for_image_generation
        )
        out, cache = self.forward(embed(inputs), cache, positions, mask)
        return self.model.model.generation_head(out.last_hidden_state), cache

    def guidance(self, prompt: Tensor, scale: float, bos: int, begin_of_image: int, pad: int) -> Guidance:
        """Guidance as Janus was trained for: every token of the prompt but these two becomes padding that is seen."""
        keep = (prompt == bos) | (prompt == begin_of_image)
        return Guidance(scale, prompt.masked_fill(~keep, pad))


class _Remembering:
    """Calls a transformers module with its cache, whose argument newer versions call ``cache``."""

    def __init__(self, module: Any) -> None:
        names = inspect.signature(module.forward).parameters
        memory = [name for name in ("cache", "past_key_values") if name in names]
        kind = getattr(getattr(module, "config", None), "model_type", "")
        if kind in _WHOLE:
            raise UserError(f"{type(module).__name__} is no model to feed: {_WHOLE[kind]}; use its own generate().")
        if not memory:
            raise UserError(f"{type(module).__name__} remembers no keys and values; wrap it in WholeSequence instead.")
        self.module: Callable[..., Any] = module
        self.memory = memory[0]
        self.places = "position_ids" in names

    def __call__(
        self, inputs: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None, **more: Any
    ) -> tuple[Any, Any]:
        given = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs, self.memory: cache, **more}
        if self.places:
            given["position_ids"] = positions
        out = self.module(**given, attention_mask=None if mask is None else mask.long(), use_cache=True)
        if getattr(out, self.memory, None) is None:
            raise UserError(f"{type(self.module).__name__} returned no cache; wrap it in WholeSequence instead.")
        return out, getattr(out, self.memory)
