"""Inside transformers' generate(), on tiny configurations of the real classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.codec import UserError
from isthmus.metrics.distributions import chi_square
from isthmus.priors.tiny_lm import tiny_llama
from isthmus.samplers import ordinary
from isthmus.samplers.feed import Guidance
from isthmus.samplers.ordinary import Sampling
from isthmus.samplers.raster import Raster
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi
from isthmus.samplers.transformers_generate import custom_generate
from isthmus.samplers.transformers_models import CausalModel, ChameleonImages, JanusImages

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VQ: dict[str, Any] = {
    "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Configurations of classes are printed at warning level when they have no generation settings."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def llama() -> Any:
    torch.manual_seed(0)
    return tiny_llama(40, 2, 32).eval()


def chameleon() -> Any:
    torch.manual_seed(0)
    images = {f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(i))}Z": 4 + i for i in range(16)}
    vq = {**VQ, "in_channels": 3, "resolution": 16}
    config = transformers.ChameleonConfig(**TEXT, vocabulary_map={**images, "<image>": 30}, vq_config=vq)
    return transformers.ChameleonForConditionalGeneration(config).eval()


def emu3() -> Any:
    torch.manual_seed(0)
    names = {"<image>": 3, "<|extra_200|>": 4, **{f"<|visual token {i:06d}|>": 10 + i for i in range(16)}}
    vq = {"codebook_size": 16, "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 1}
    vq |= {k: v for k, v in VQ.items() if k != "num_embeddings"} | {"temporal_downsample_factor": 1}
    config = transformers.Emu3Config(vq_config=vq, text_config=TEXT, vocabulary_map=names)
    return transformers.Emu3ForConditionalGeneration(config).eval()


def janus(codes: int = 20) -> Any:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        "projection_dim": 32, "num_image_tokens": 16, "depth": 1, "hidden_act": "gelu",
    }  # fmt: skip
    vq = {**VQ, "double_latent": False, "projection_dim": 32, "image_token_embed_dim": 32, "num_patches": 4}
    vq["num_embeddings"] = codes
    config = transformers.JanusConfig(text_config=TEXT, vision_config=vision, vq_config=vq, image_token_id=5)
    network = transformers.JanusForConditionalGeneration(config).eval()
    settings = network.generation_config
    settings.generation_kwargs, settings.guidance_scale = {"boi_token_id": 7}, 3.0
    settings.pad_token_id, settings.bos_token_id = 0, 1
    return network


def prompts(batch: int = 3, length: int = 5, low: int = 1, high: int = 40) -> torch.Tensor:
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(0))


def both(model: Any, ids: torch.Tensor, decoder: SpeculativeJacobi | None = None, **given: Any) -> tuple[Any, Any, Any]:
    """Greedy decoding by transformers and by windows, and what the latter drew."""
    ours = custom_generate(decoder or SpeculativeJacobi(8, start="repeat_horizon"))
    given = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": 24,
        "pad_token_id": 0,
    } | given
    return model.generate(ids, **given), model.generate(ids, custom_generate=ours, **given), ours.decoded


GENERATE: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance": {"guidance_scale": 2.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "at least": {"min_new_tokens": 9, "eos_token_id": 7},
    "end of sequence": {"eos_token_id": [7, 9, 13]},
    "one constrained row": {"prefix_allowed_tokens_fn": lambda row, ids: [len(ids) % 30, 3 + row]},
    "suppressed": {"suppress_tokens": list(range(20)), "begin_suppress_tokens": [25]},
}


@pytest.mark.parametrize("name", GENERATE)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    theirs, ours, decoded = both(llama(), prompts(), **GENERATE[name])
    assert torch.equal(theirs, ours)
    assert decoded.lengths.max() == ours.shape[1] - 5


def test_left_padding_several_sequences_a_prompt_and_dictionaries() -> None:
    ids, mask = prompts(), torch.ones(3, 5, dtype=torch.long)
    mask[0, :2] = mask[2, :4] = 0
    theirs, ours, _ = both(llama(), ids, attention_mask=mask, return_dict_in_generate=True)
    assert torch.equal(theirs.sequences, ours.sequences)
    faster = custom_generate(SpeculativeJacobi(4))
    given = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 6, "pad_token_id": 0}
    other = {"guidance_scale": 2.0, "negative_prompt_ids": ids[:, :2]}
    out = llama().generate(ids, attention_mask=mask, custom_generate=faster, **given, **other)
    assert out.shape == (12, 11)
    assert torch.equal(out[:, :5], ids.repeat_interleave(4, 0))


def test_samples_have_the_distribution_of_generates_processors() -> None:
    """Four tokens by windows of three, so that guesses are judged: all sequences against their exact chances."""
    model = llama()
    model.lm_head.weight.data *= 7
    ids, faster = prompts(1), custom_generate(SpeculativeJacobi(3))
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=faster, do_sample=True, top_k=5, top_p=0.9,
        temperature=0.8, suppress_tokens=list(range(5, 40)), max_new_tokens=4, pad_token_id=0,
        num_return_sequences=8000,
    )[:, 5:]  # fmt: skip

    def processed(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.index_fill(-1, torch.arange(5, 40), -torch.inf).flatten(0, 1) / 0.8
        warped = transformers.TopPLogitsWarper(0.9)(None, transformers.TopKLogitsWarper(5)(None, logits))
        return warped.view(625, 4, 40)

    assert faster.decoded is not None
    assert fits(faster.decoded, out, CausalModel(model), ids, range(5), processed)


@pytest.mark.parametrize("name", ["chameleon", "emu3", "janus"])
def test_guided_image_tokens_have_the_distribution_of_ordinary_sampling(name: str) -> None:
    """Of the real classes: guidance, temperature, top-k and top-p inside the test of the guesses, with their caches."""
    network = {"chameleon": chameleon, "emu3": emu3, "janus": lambda: janus(5)}[name]()
    ids, other = prompts(1, 5, 60, 90), prompts(1, 3, 60, 90)
    tokens = {"chameleon": range(4, 9), "emu3": range(10, 15), "janus": range(5)}[name]
    wrap: Any = {"chameleon": ChameleonImages, "emu3": CausalModel, "janus": JanusImages}[name]
    head = network.model.generation_head if name == "janus" else network.lm_head
    for parameter in head.parameters():
        parameter.data *= 8
    raster, decoder = Raster(2, 2, tokens), SpeculativeJacobi(3, start="repeat_vertical")
    torch.manual_seed(0)
    if name == "janus":
        sampling = Sampling(0.9, 4, 0.95, raster)
        decoded = decoder.sample(wrap(network), ids.expand(8000, -1), 4, sampling, guidance=Guidance(1.5, other))
        out = decoded.tokens
    else:
        faster = custom_generate(decoder, raster, wrap)
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), custom_generate=faster, do_sample=True, temperature=0.9,
            top_k=4, top_p=0.95, guidance_scale=1.5, negative_prompt_ids=other, max_new_tokens=4,
            negative_prompt_attention_mask=torch.ones_like(other), num_return_sequences=8000, pad_token_id=0,
            eos_token_id=None,
        )[:, 5:]  # fmt: skip
        assert faster.decoded is not None
        decoded = faster.decoded

    def processed(logits: torch.Tensor) -> torch.Tensor:
        return Sampling(0.9, 4, 0.95, raster)(logits, torch.arange(4).expand(625, -1), ids)

    assert fits(decoded, out, wrap(network), ids, tokens, processed, Guidance(1.5, other))


def fits(
    decoded: Any, drawn: torch.Tensor, model: Any, prompt: torch.Tensor, tokens: range, processed: Any,
    guidance: Guidance | None = None,
) -> bool:  # fmt: skip
    """Whether sequences of four of five tokens have their exact chances, and whether guesses were judged at all."""
    sequences = torch.cartesian_prod(*[torch.as_tensor(tokens)] * 4)

    def logits_after(ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1] + 3).expand(625, -1)
        first, cache = model(ids.expand(625, -1), None, places[:, :-3], None)
        rest, _ = model(sequences[:, :3], cache, places[:, -3:], None)
        return torch.cat([first[:, -1:], rest], 1)

    with torch.no_grad():
        logits = logits_after(prompt)
        if guidance is not None and guidance.prompt is not None:
            without = logits_after(guidance.prompt)
            logits = without + guidance.scale * (logits - without)
    exact = processed(logits).softmax(-1).gather(2, sequences[..., None])[..., 0].prod(1)
    counts = torch.bincount((drawn - tokens[0]) @ torch.tensor([125, 25, 5, 1]), minlength=625)
    assert int((counts > 0).sum()) > 30, "many sequences are likely"
    assert not bool((counts > 0)[exact == 0].any()), "what filters rule out was drawn"
    assert any(int(added.max()) > 1 for added in decoded.advances), "some guesses stay"
    assert any(bool((added == 1).any()) for added in decoded.advances[1:]), "some are refused"
    return chi_square(counts, exact).p_value > 0.01


def test_tokens_are_streamed_as_they_are_settled() -> None:
    class Stream:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    stream, ids = Stream(), prompts(1)
    faster = custom_generate(SpeculativeJacobi(8), streamer=stream)
    out = llama().generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=faster, do_sample=False, max_new_tokens=24,
        streamer=stream, pad_token_id=0,
    )  # fmt: skip
    assert [token for part in stream.parts for token in part] == out[0].tolist()
    assert faster.decoded is not None
    assert len(stream.parts) == 1 + faster.decoded.passes
    assert stream.ended


def test_chameleon_draws_image_tokens_that_its_forward_rules_out() -> None:
    network = chameleon()
    model, ids = ChameleonImages(network), prompts(2, 5, 40, 90)
    assert model.image_tokens == list(range(4, 20))
    sampling = Sampling(top_k=12, raster=Raster(4, 4, model.image_tokens))
    drawn = SpeculativeJacobi(8, start="repeat_vertical").sample(model, ids, 16, sampling)
    assert set(drawn.tokens.unique().tolist()) <= set(model.image_tokens)
    greedy = ordinary.sample(model, ids, 16, sampling, greedy=True)
    assert torch.equal(greedy.tokens, SpeculativeJacobi(8, "jacobi").sample(model, ids, 16, sampling).tokens)
    theirs, ours, _ = both(network, ids)
    assert torch.equal(theirs, ours), "text by generate()"
    inside = custom_generate(SpeculativeJacobi(8), sampling.raster, ChameleonImages)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16}
    images_only = Sampling(raster=sampling.raster)
    want = ordinary.sample(model, ids, 16, images_only, greedy=True).tokens
    assert torch.equal(network.generate(ids, custom_generate=inside, **given)[:, 5:], want)


def test_pictures_in_chameleons_prompt_are_seen_when_image_tokens_are_drawn() -> None:
    network, raster = chameleon(), Raster(4, 4, range(4, 20))
    ids = torch.cat([prompts(1, 3, 40, 90), torch.full((1, 64), 30), prompts(1, 2, 40, 90)], 1)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16}
    drawn = []
    for picture in torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1:
        faster = custom_generate(SpeculativeJacobi(8), raster, ChameleonImages)
        out = network.generate(ids, pixel_values=picture, custom_generate=faster, **given)[:, -16:]
        model = ChameleonImages(network, pixel_values=picture)
        assert torch.equal(out, ordinary.sample(model, ids, 16, Sampling(raster=raster), greedy=True).tokens)
        with torch.no_grad():
            drawn.append(model(ids, None, None, None)[0])
    assert not torch.equal(*drawn), "another picture, other logits"
    blind = custom_generate(SpeculativeJacobi(8), raster, lambda model: ChameleonImages(model))
    with pytest.raises(ValueError, match="takes a prompt of ids only, and generate"):
        network.generate(ids, pixel_values=picture, custom_generate=blind, **given)


def test_emu3_with_guidance_and_a_grammar_given_as_prefix_constraint() -> None:
    network = emu3()
    ids, other = prompts(2, 5, 60, 90), prompts(2, 3, 60, 90)

    def allowed(row: int, seen: torch.Tensor) -> list[int]:
        return [50] if (len(seen) - 5) % 5 == 4 else list(range(10, 26))

    given = {"guidance_scale": 3.0, "negative_prompt_ids": other, "prefix_allowed_tokens_fn": allowed}
    given |= {"negative_prompt_attention_mask": torch.ones_like(other), "max_new_tokens": 20, "pad_token_id": 0}
    theirs, ours, decoded = both(network, ids, **given)
    assert torch.equal(theirs, ours)
    assert decoded.passes < 20
    faster = custom_generate(SpeculativeJacobi(8, start="repeat_vertical"), Raster(4, 4, range(10, 26), end_of_line=50))
    del given["prefix_allowed_tokens_fn"]
    out = network.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=faster, do_sample=True, top_k=2048, **given
    )
    lines = out[:, 5:].view(2, 4, 5)
    assert bool((lines[..., 4] == 50).all())
    assert bool(((lines[..., :4] >= 10) & (lines[..., :4] < 26)).all())


def test_janus_gives_the_image_tokens_of_its_own_generate() -> None:
    network = janus()
    ids = prompts(2, 5, 60, 90)
    ids[:, 0], ids[:, -1] = 1, 7
    theirs = network.generate(
        ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False, max_new_tokens=16
    )
    model = JanusImages(network)
    decoder = SpeculativeJacobi(8, "jacobi", "repeat_vertical")
    raster, guidance = Raster(4, 4), model.guidance(ids, 3.0, 1, 7, 0)
    ours = decoder.sample(model, ids, model.length, Sampling(raster=raster), guidance=guidance)
    assert torch.equal(theirs, ours.tokens)
    assert ours.passes < 16


def test_gpt2_and_a_picture_free_prompt_of_one_token() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=None
    )
    theirs, ours, _ = both(transformers.GPT2LMHeadModel(config).eval(), prompts(2, 1, 1, 30))
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 2}, "num_beams must be 1, got 2"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores, .* are not kept"),
        ({"do_sample": True}, "scheme jacobi decodes greedily"),
    ],
)
def test_what_windows_cannot_do_is_refused(given: dict[str, Any], message: str) -> None:
    ids = prompts(1)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0, **given}
    with pytest.raises(ValueError, match=message):
        llama().generate(ids, custom_generate=custom_generate(SpeculativeJacobi(4, "jacobi")), **settings)


def test_models_without_a_cache_and_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="remembers no keys and values; wrap it in WholeSequence"):
        CausalModel(torch.nn.Linear(2, 2))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'isthmus\[language\]'"):
        tiny_llama(9)


def test_sizes_of_the_tiny_llama() -> None:
    network = tiny_llama(65, layers=3, width=64, length=80)
    assert network(torch.zeros(2, 7, dtype=torch.long)).logits.shape == (2, 7, 65)
    assert network.config.num_attention_heads == 2
    with pytest.raises(ValueError, match="is at least 1"):
        tiny_llama(0)
    with pytest.raises(ValueError, match="must be a multiple of twice the 3 heads"):
        tiny_llama(9, width=32, heads=3)
