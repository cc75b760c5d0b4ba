"""A handful of the classes of results/causal_classes.md: what they keep in their caches is taken back, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from isthmus.codec import UserError
from isthmus.samplers import ordinary
from isthmus.samplers.cache import check, prepare, select, truncate
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.samplers.transformers_models import CausalModel
from tests.causal_classes import RESULTS, tiny, tried

transformers = pytest.importorskip("transformers")
RECORDED = json.loads((RESULTS / "causal_classes.json").read_text(encoding="utf-8"))
KINDS = {
    "llama": "full attention", "mistral": "sliding windows", "gemma3n_text": "shared keys",
    "lfm2": "short convolutions",
    "deepseek_v32": "indexed attention", "falcon_h1": "attention beside a recurrent state", "qwen3_next": "recurrent",
    "mamba": "recurrent without any token", "deepseek_v4": "compressed", "minimax": "a cache that says no itself",
    "git": "rows that cannot part", "moshi": "a window without a mask", "bart": "an encoder-decoder's cache",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_windows_give_generates_greedy_tokens_or_are_refused_as_recorded(kind: str) -> None:
    outcome, why = tried(kind)
    assert outcome == RECORDED[kind]["outcome"]
    assert outcome == "exact" or why == RECORDED[kind]["why"]


def test_every_class_that_could_be_built_is_exact_or_refused() -> None:
    outcomes = [each["outcome"] for each in RECORDED.values()]
    assert set(outcomes) == {"exact", "refused", "not built", "not generating"}
    assert outcomes.count("exact") > 140
    assert outcomes.count("refused") > 20


@pytest.mark.parametrize("kind", ["falcon_h1", "deepseek_v4"])
def test_a_refusal_leaves_the_cache_as_it_was(kind: str) -> None:
    model, ids = tiny(kind), torch.arange(9)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        before = [layer.keys.clone() for layer in cache.layers if torch.is_tensor(getattr(layer, "keys", None))]
        for change in (check, prepare, lambda cache: truncate(cache, 5), lambda cache: select(cache, torch.arange(5))):
            with pytest.raises(UserError, match="cannot be cut"):
                change(cache)
    after = [layer.keys for layer in cache.layers if torch.is_tensor(getattr(layer, "keys", None))]
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_models_with_a_state_still_decode_one_token_a_pass() -> None:
    model, ids = tiny("mamba"), torch.arange(8, 15)[None].repeat(2, 1)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[:, 7:]
    assert torch.equal(ordinary.sample(CausalModel(model), ids, 6, greedy=True).tokens, want)
    stop = ordinary.at_any([int(want[0, 2])])
    decoded = SpeculativeJacobi(1, "jacobi").sample(CausalModel(model), ids, 6, stop=stop)
    assert torch.equal(decoded.tokens[:, :3], want[:, :3])


def test_a_static_cache_is_cut_by_its_counter_even_when_it_is_full() -> None:
    model, ids = tiny("llama"), torch.randint(8, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        cache = transformers.StaticCache(config=model.config, max_cache_len=12)
        model(torch.cat([ids[:, :7], ids[:, :5]], 1), cache=cache)
        with pytest.raises(UserError, match="cannot be cut"):
            select(cache, torch.arange(3))
        out = model(ids[:, 7:], cache=truncate(cache, 7)).logits
    assert torch.allclose(out, whole[:, 7:], atol=1e-5)


def test_a_window_that_has_dropped_its_past_is_refused_unless_it_was_prepared() -> None:
    model, ids = tiny("mistral"), torch.randint(8, 90, (1, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short = model(ids[:, :6], use_cache=True).cache
        assert truncate(short, 4).get_seq_length() == 4, "nothing has been dropped yet"
        cache = model(ids, use_cache=True).cache
        with pytest.raises(UserError, match=r"call prepare\(\) after the prompt"):
            truncate(cache, 12)
        cache = prepare(model(ids[:, :9], use_cache=True).cache)
        model(ids[:, :5], cache=cache)
        out = model(ids[:, 9:], cache=truncate(cache, 9)).logits
        whole = model(ids).logits
    assert torch.allclose(out, whole[:, 9:], atol=1e-5)


def test_a_layer_whose_crop_does_not_know_what_it_keeps_is_refused() -> None:
    class Both(transformers.cache_utils.DynamicLayer):
        def update_more(self, x: torch.Tensor) -> None:
            self.more = x

    cache = transformers.DynamicCache()
    cache.layers = [Both()]
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    with pytest.raises(UserError, match=r"update_more\(\) adds, which its crop\(\) knows nothing of"):
        truncate(cache, 2)


def test_a_static_layer_whose_crop_forgets_its_keys_is_refused() -> None:
    """Its ``crop`` takes back the short convolution and leaves the keys."""
    layers = transformers.cache_utils
    layer, keys = layers.LinearAttentionAndStaticFullAttentionLayer(max_cache_len=16), torch.randn(1, 1, 5, 2)
    layer.update(keys, keys)
    cache = layers.Cache(layers=[layer])
    layer.activate_past_recording()
    layer.update_conv_state(torch.randn(1, 3, 5), conv_kernel_size=3)
    with pytest.raises(UserError, match="cannot be cut"):
        prepare(cache)
    with pytest.raises(UserError, match=r"update\(\) adds, which its crop\(\) knows nothing of"):
        truncate(cache, 3)
    assert int(layer.get_seq_length()) == 5


def test_layers_that_share_keys_and_never_hold_any_are_passed_over() -> None:
    layers, keys = transformers.cache_utils, torch.randn(1, 1, 5, 2)
    used, shared = layers.DynamicSlidingWindowLayer(8), layers.DynamicSlidingWindowLayer(8)
    used.update(keys, keys)
    cache = prepare(layers.Cache(layers=[shared, used]))
    assert truncate(cache, 5) is cache
    truncate(cache, 3)
    assert used.keys.shape[-2] == 3
