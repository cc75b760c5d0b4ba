"""A small causal language model over any vocabulary: transformers' Llama (arXiv 2302.13971) in a few sizes.

It serves as the prior of a tokenizer's codes, and as the stand-in for a large model where a sampler is tried. ::

    model = tiny_llama(vocab=64 + 1, layers=4, width=128)
"""

from __future__ import annotations

from typing import Any

from isthmus.bounds import Count, checked
from isthmus.codec import extra, part


@part
@checked
def tiny_llama(
    vocab: Count, layers: Count = 4, width: Count = 128, heads: Count | None = None, length: Count = 1024
) -> Any:
    """A ``LlamaForCausalLM`` with new weights, drawn from torch's global generator.

    Args:
        vocab: number of tokens.
        layers: number of blocks.
        width: of the tokens; the MLPs are 8/3 times as wide, rounded up to a multiple of 16.
        heads: of attention; one for every 32 channels by default.
        length: longest sequence that positions are made for.

    Raises:
        ValueError: a number below 1, or heads that do not divide the width into even parts.
        UserError: transformers is not installed.
    """
    heads = max(1, width // 32) if heads is None else heads
    if width % (2 * heads):
        raise ValueError(f"width {width} must be a multiple of twice the {heads} heads, for rotary positions.")
    transformers = extra("transformers", "language")
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 48) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)
