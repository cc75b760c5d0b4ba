"""Every causal class of transformers in a tiny configuration: do windows of guesses give generate's greedy tokens?

    nice python -m tests.causal_classes [TYPE …]      # some minutes; without types all, and results/ is written

A class is *exact* where greedy tokens by windows equal those of ``generate`` (prompts one by one and as a batch),
*refused* where its cache cannot take tokens back and ours says so, *not built* where no tiny configuration of it was
found, *not generating* where transformers' own ``generate`` fails with it. There is no fifth kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from isthmus.codec import UserError, write_atomically
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.samplers.transformers_generate import custom_generate

RESULTS = Path(__file__).resolve().parent.parent / "results"
LENGTH, NEW, SEEDS = 7, 24, (0, 1)

WIDTH, HEADS, VOCABULARY, LAYERS = 32, 4, 96, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_model": WIDTH, "n_embd": WIDTH, "emb_dim": WIDTH,
    "embedding_size": WIDTH, "intermediate_size": 48, "moe_intermediate_size": 16, "ffn_dim": 48, "n_inner": 48,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "intermediate_size_mlp": 48,
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8,
    "attention_head_dim": 8,
    "global_head_dim": 8, "num_global_key_value_heads": 2, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "kv_channels": 8,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_layers": 2, "num_decoder_layers": LAYERS, "num_encoder_layers": 2, "first_k_dense_replace": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "zero_expert_num": 1,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "sliding_window": 8,
    "attention_chunk_size": 8, "window_size": 8, "attention_window_size": 8, "local_attention": 8,
    "index_topk": 12, "index_n_heads": 32, "index_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_dt_rank": 4,
    "state_size": 8, "ssm_state_size": 8,
    "n_mamba_heads": 2, "mamba_headdim": 8, "mamba_ngroups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "n_groups": 1,
    "time_step_rank": 4, "lru_width": WIDTH, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "conv_dim": WIDTH, "conv_dim_out": WIDTH,
    "block_multiple_of": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4, "altup_num_inputs": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_token_id": 5, "video_token_id": 6, "audio_token_id": 4, "original_max_position_embeddings": 64,
}  # fmt: skip
"""Sizes of any configuration that has a field of that name."""


def types() -> dict[str, str]:
    """Configuration types and the names of their causal classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def tiny(kind: str) -> Any:
    """The class of a configuration type, of default settings but small, in evaluation mode and with lively weights.

    Weights as transformers draws them make all logits nearly alike, so that a wrong cache would not be seen.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = _small(CONFIG_MAPPING[kind])
    made = getattr(transformers, types()[kind])
    if not isinstance(config, made.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in made(config).parameters())
    if count > 20_000_000:
        raise ValueError(f"its smallest configuration here has {count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = made(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and 0 < parameter.std() < 0.15:
                parameter.mul_(0.15 / parameter.std())
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _small(kind: type) -> Any:
    """A configuration with every size it has made small, per-layer lists cut to layers of each type."""
    default = kind()
    own = OWN.get(default.model_type, {})
    given: dict[str, Any] = {}
    names = set(vars(default)) | set(getattr(kind, "attribute_map", {}))
    for name in getattr(kind, "sub_configs", {}):
        part = _get(default, name)
        if part is not None and name not in own:
            given[name] = _small(type(part))
    layers = next((_get(default, n) for n in ("num_hidden_layers", "n_layer", "num_layers") if n in names), None)
    lists = {
        name: value for name, value in vars(default).items()
        if isinstance(value, (list, tuple)) and layers is not None and len(value) == layers and not name.startswith("_")
    }  # fmt: skip
    kept: Any = range(LAYERS)
    if lists:
        kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
        first = sorted({each: i for i, each in reversed(list(enumerate(kinds)))}.values())
        kept = sorted((first + [i for i in range(len(kinds)) if i not in first])[: max(LAYERS, len(first))])
        given |= {name: [value[i] for i in kept] for name, value in lists.items()}
    for name, size in SIZES.items():
        if name in names and name not in given and (_get(default, name) is not None or name in EVEN_IF_NONE):
            given[name] = len(kept) if size == LAYERS and "layer" in name else size
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = HEADS
    for name, value in {"is_decoder": True, "is_encoder_decoder": False}.items():
        if isinstance(_get(default, name), bool):
            given[name] = value
    return kind(**given | own)


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # sizes that vary among layers are asked for otherwise
        return None


EVEN_IF_NONE = (
    "num_experts_per_tok",
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
)
HALF = {"layer_types": ["linear_attention", "full_attention"] * 2}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": HALF,
    "inkling2_text": {"unpadded_vocab_size": 96, "sliding_window_size": 8},
    "inkling2_loop_text": {"unpadded_vocab_size": 96, "sliding_window_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "hc_lowrank": 8,
        "ple_embed_dim": 32, "ngram_vocab_size_base": 500, "split_ngram_parts": 2,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "xlstm": {"embedding_dim": 32, "num_blocks": 4, "ffn_round_up_to_multiple_of": 8},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
              "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
               "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 8, "adapter_rank": 4,
               "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What single types need beyond that."""


def tried(kind: str) -> tuple[str, str]:
    """What becomes of a type: its kind of outcome and the reason or the numbers."""
    try:
        model = tiny(kind)
    except Exception as error:  # whatever a foreign constructor raises
        return "not built", _sentence(error)
    given = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    passes, tokens = 0, 0
    for seed in SEEDS:
        high = min(90, int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 90)))
        ids = torch.randint(8, high, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        for prompt in (ids[:1], ids):
            given["attention_mask"] = torch.ones_like(prompt)
            try:
                theirs = model.generate(prompt, **given)
            except Exception as error:  # whatever foreign code raises
                return "not generating", _sentence(error)
            ours = custom_generate(SpeculativeJacobi(6, start="repeat_horizon"))
            try:
                out = model.generate(prompt, custom_generate=ours, **given)
            except UserError as error:
                return "refused", str(error)
            except Exception as error:  # a raw error is what this is looking for
                return "WRONG", f"{type(error).__name__}: {_sentence(error)}"
            assert ours.decoded is not None
            if not torch.equal(out, theirs):
                row, place = (out != theirs).nonzero()[0].tolist()
                return "WRONG", f"with {len(prompt)} rows token {place - LENGTH} of row {row} is another"
            passes, tokens = passes + ours.decoded.passes, tokens + NEW
    return "exact", f"{passes} passes for {tokens} tokens"


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:160]}"


def table(found: dict[str, dict[str, str]]) -> str:
    """The outcomes as Markdown, the reasons that several types share as footnotes."""
    import transformers

    counts = Counter(each["outcome"] for each in found.values())
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = [
        "# Causal classes of transformers under speculative Jacobi decoding", "",
        f"transformers {transformers.__version__}, {len(found)} configuration types: {told}.",
        "Written by `python -m tests.causal_classes`, which says what the words mean.", "",
        "| type | class | outcome | |", "|-|-|-|-|",
    ]  # fmt: skip
    lines += [f"| {kind} | {each['class']} | {each['outcome']} | {each['why']} |" for kind, each in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    asked = parser.parse_args().types
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for kind, name in types().items():
        if not asked or kind in asked:
            outcome, why = tried(kind)
            found[kind] = {"class": name, "outcome": outcome, "why": why}
            sys.stdout.write(f"{kind:28} {outcome:15} {why}\n")
    counts = Counter(each["outcome"] for each in found.values())
    sys.stdout.write(f"{dict(counts)}\n")
    if not asked:
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        write_atomically(RESULTS / "causal_classes.json", text.encode())
        write_atomically(RESULTS / "causal_classes.md", table(found).encode())
    sys.exit(int(counts["WRONG"] > 0))


if __name__ == "__main__":
    main()
