"""Speculative Jacobi decoding is exact, in every setting, and faster; samplers that are almost right are found out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.metrics.distributions import chi_square
from isthmus.priors.markov import MarkovChain
from isthmus.priors.tiny_lm import tiny_llama
from isthmus.samplers import ordinary
from isthmus.samplers.acceptance import verify
from isthmus.samplers.feed import Guidance
from isthmus.samplers.ordinary import Sampling, at_any
from isthmus.samplers.raster import Raster
from isthmus.samplers.speculative_jacobi import SpeculativeJacobi, settled
from isthmus.samplers.transformers_models import CausalModel
from isthmus.tasks.tokens.exactness import newest_as_draft, residual_forgotten

SEQUENCES, LENGTH = 6000, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain() -> MarkovChain:
    return MarkovChain(4, generator=generator(3))


def p_value(decoder: SpeculativeJacobi, sampling: Sampling, seed: int = 0) -> float:
    model = chain()
    drawn = decoder.sample(model, model.prompt(SEQUENCES), LENGTH, sampling, generator=generator(seed)).tokens
    places = torch.arange(LENGTH)

    def change(logits: Tensor) -> Tensor:
        return sampling(logits, places.expand(len(logits), -1), logits)

    sequences, probabilities = model.exact(LENGTH, change)
    assert bool((probabilities[model.number(drawn)] > 0).all()), "a sequence that cannot be was drawn"
    counts = torch.bincount(model.number(drawn), minlength=len(sequences))
    return chi_square(counts, probabilities).p_value


SETTINGS: dict[str, tuple[dict[str, Any], Sampling]] = {
    "random": ({}, Sampling()),
    "cold": ({}, Sampling(temperature=0.6)),
    "hot": ({}, Sampling(temperature=1.7)),
    "top-k": ({"start": "repeat_horizon"}, Sampling(top_k=3)),
    "top-p": ({}, Sampling(top_p=0.8)),
    "left": ({"start": "repeat_horizon"}, Sampling()),
    "likeliest left": ({"start": "sample_horizon"}, Sampling()),
    "above": ({"start": "repeat_vertical"}, Sampling(raster=Raster(3, 2))),
    "likeliest above": ({"start": "sample_vertical"}, Sampling(raster=Raster(3, 2))),
    "together": ({"advance": "together"}, Sampling()),
    "matching": ({"scheme": "matching"}, Sampling()),
    "late": ({"after": 2}, Sampling()),
    "early": ({"until": 3}, Sampling()),
    "grammar": ({}, Sampling(raster=Raster(2, 1, range(3), end_of_line=3))),
    "longer than the picture": ({"window": 9}, Sampling()),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sequences_have_the_exact_distribution(name: str) -> None:
    settings, sampling = SETTINGS[name]
    assert p_value(SpeculativeJacobi(**{"window": 3, **settings}), sampling) > 0.005


@pytest.mark.parametrize("accept", [residual_forgotten, newest_as_draft])
def test_samplers_that_are_almost_right_fail_the_same_test(accept: Any) -> None:
    assert p_value(SpeculativeJacobi(3, accept=accept), Sampling()) < 1e-6


def test_filters_applied_twice_to_the_residual_fail_it_too() -> None:
    """What the released code does: temperature acts once more on what is left after a refusal."""

    def twice(p: Tensor, q: Tensor, tokens: Tensor, g: torch.Generator | None) -> tuple[Tensor, Tensor]:
        count, residual = verify(p, q, tokens, g)
        return count, (residual.log() / 0.5).softmax(-1)

    cold = Sampling(temperature=0.5)
    assert p_value(SpeculativeJacobi(3), cold) > 0.005
    assert p_value(SpeculativeJacobi(3, accept=twice), cold) < 1e-6


def test_a_window_of_one_draws_what_ordinary_sampling_draws() -> None:
    model, sampling = chain(), Sampling(temperature=1.2)
    plain = ordinary.sample(model, model.prompt(20), 9, sampling, generator=generator())
    narrow = SpeculativeJacobi(1).sample(model, model.prompt(20), 9, sampling, generator=generator())
    assert torch.equal(plain.tokens, narrow.tokens)
    assert narrow.passes == 9
    assert narrow.passes_per_token == 1


def test_a_predictable_model_takes_whole_windows() -> None:
    model = MarkovChain(4, generator=generator())
    model.table[:] = -20.0
    model.table[..., 2] = 0.0
    decoded = SpeculativeJacobi(4, start="repeat_horizon").sample(model, model.prompt(2), 13, generator=generator())
    assert decoded.passes == 4
    assert [a.tolist() for a in decoded.advances] == [[1, 1], [4, 4], [4, 4], [4, 4]]
    late = SpeculativeJacobi(4, start="repeat_horizon", after=3, until=8)
    decoded = late.sample(model, model.prompt(1), 13, generator=generator())
    assert [int(a) for a in decoded.advances] == [1, 1, 1, 4, 4, 1, 1]


def test_rows_go_on_by_themselves_or_together() -> None:
    model = chain()
    own = SpeculativeJacobi(4).sample(model, model.prompt(8), 12, generator=generator())
    together = SpeculativeJacobi(4, advance="together").sample(model, model.prompt(8), 12, generator=generator())
    assert any(len(set(a.tolist())) > 1 for a in own.advances[:-1])
    assert all(len(set(a.tolist())) == 1 for a in together.advances)
    assert own.passes <= together.passes
    for decoded in (own, together):
        assert torch.stack(decoded.advances).sum(0).tolist() == [12] * 8


def test_the_released_rule_of_a_window_is_spelled_out() -> None:
    guesses, later = torch.tensor([[1, 2, 3]]), torch.tensor([[11, 12, 13]])
    following = torch.tensor([9])

    def window(count: int, added: int) -> list[int]:
        return settled(guesses, torch.tensor([count]), following, later, torch.tensor([added]))[0].tolist()

    assert window(0, 1) == [9, 11, 12, 13]
    assert window(2, 3) == [1, 2, 9, 13]
    assert window(3, 4) == [1, 2, 3, 9]
    assert window(2, 1) == [1, 11, 12, 13], "a row held back by another forgets what it had accepted beyond"


def test_rows_end_at_end_tokens_inside_a_window() -> None:
    model = chain()
    decoded = SpeculativeJacobi(5).sample(model, model.prompt(300), 10, stop=at_any([2]), pad=-1, generator=generator())
    lengths = decoded.lengths.tolist()
    for tokens, length in zip(decoded.tokens.tolist(), lengths, strict=True):
        assert 2 not in tokens[: length - 1]
        assert tokens[length - 1] == 2 or length == 10
        assert tokens[length:] == [-1] * (10 - length)
    assert torch.stack(decoded.advances).sum(0).tolist() == lengths
    plain = ordinary.sample(model, model.prompt(300), 10, stop=at_any([2]), generator=generator(1))
    assert sum(lengths) / 300 == pytest.approx(float(plain.lengths.float().mean()), abs=0.6)


def test_rows_that_have_ended_are_fed_tokens_that_the_model_knows() -> None:
    """As in Janus, whose prompt is text and whose image tokens have a vocabulary of their own."""
    model = chain()

    def images_only(inputs: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
        if cache is not None:
            assert 0 <= int(inputs.min()) <= int(inputs.max()) < 4
            return model(inputs, cache, positions, mask)
        return model(torch.full_like(inputs, 4), cache, positions, mask)

    prompt = torch.full((50, 2), 100016)
    for decoder in (SpeculativeJacobi(4), SpeculativeJacobi(4, "matching")):
        drawn = decoder.sample(images_only, prompt, 9, stop=at_any([2]), pad=-100, generator=generator())
        assert len(set(drawn.lengths.tolist())) > 1
    drawn = ordinary.sample(images_only, prompt, 9, stop=at_any([2]), pad=-100, generator=generator())
    assert len(set(drawn.lengths.tolist())) > 1


def test_grammar_is_kept_and_forced_tokens_are_never_refused() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = CausalModel(tiny_llama(30, 1, 16).eval())
    raster = Raster(4, 3, range(4, 20), end_of_line=25, end=26, header=(27, 28))
    sampling = Sampling(top_k=5, raster=raster)
    decoder = SpeculativeJacobi(8, start="repeat_vertical")
    prompt = torch.tensor([[1, 2], [3, 3]])
    tokens = decoder.sample(model, prompt, len(raster), sampling, generator=generator()).tokens
    assert tokens[:, :2].tolist() == [[27, 28]] * 2
    lines = tokens[:, 2:-1].view(2, 4, 4)
    assert bool((lines[..., 3] == 25).all())
    assert bool(((lines[..., :3] >= 4) & (lines[..., :3] < 20)).all())
    assert tokens[:, -1].tolist() == [26, 26]
    forced = Raster(9, 1, range(4, 5), end_of_line=25)
    decoded = decoder.sample(model, prompt, len(forced), Sampling(raster=forced), generator=generator())
    assert decoded.passes == 1 + -(-17 // 8), "one token only is possible everywhere"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("start", ["random", "repeat_horizon"])
def test_greedy_decoding_gives_the_tokens_of_generate(guidance: float, start: Any) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    network = tiny_llama(40, 2, 32).eval()
    prompts, mask = torch.randint(1, 40, (10, 6), generator=generator()), torch.ones(10, 6, dtype=torch.long)
    for row in range(5):
        mask[row, :row] = 0
    other = torch.randint(1, 40, (10, 3), generator=generator(1))
    theirs = network.generate(
        prompts, attention_mask=mask, do_sample=False, max_new_tokens=64, pad_token_id=0,
        guidance_scale=guidance, negative_prompt_ids=other, negative_prompt_attention_mask=torch.ones_like(other),
    )  # fmt: skip
    decoder = SpeculativeJacobi(8, "jacobi", start)
    given = {"mask": mask, "guidance": Guidance(guidance, other)}
    ours = decoder.sample(CausalModel(network), prompts, 64, **given)
    assert torch.equal(theirs[:, 6:], ours.tokens)
    plain = ordinary.sample(CausalModel(network), prompts, 64, greedy=True, **given)
    assert torch.equal(plain.tokens, ours.tokens)
    assert int((torch.stack(ours.advances) > 0).sum()) < 64 * 10, "some passes gave several tokens"


@pytest.mark.parametrize("start", ["random", "repeat_vertical"])
def test_guided_and_filtered_windows_have_ordinary_samplings_distribution(start: Any) -> None:
    """Four tokens of a tiny Llama with a cache, guidance, top-k and top-p: all 625 outcomes against their chances."""
    pytest.importorskip("transformers")
    decoder, sampling = SpeculativeJacobi(3, start=start), Sampling(0.9, 4, 0.95)
    assert guided_p_value(decoder, sampling) > 0.01


@pytest.mark.parametrize("accept", [residual_forgotten, newest_as_draft])
def test_guided_and_filtered_windows_that_are_almost_right_are_found_out(accept: Any) -> None:
    pytest.importorskip("transformers")
    assert guided_p_value(SpeculativeJacobi(3, accept=accept), Sampling(0.9, 4, 0.95)) < 1e-6


def guided_p_value(decoder: SpeculativeJacobi, sampling: Sampling) -> float:
    torch.manual_seed(2)
    network = tiny_llama(9, 1, 16).eval()
    network.lm_head.weight.data *= 40
    model, guidance = CausalModel(network), Guidance(1.8, torch.tensor([[2, 7]]))
    prompt, raster = torch.tensor([[4, 5, 6]]), Raster(2, 2, range(5))
    sampling = dataclasses.replace(sampling, raster=raster)
    sequences = torch.cartesian_prod(*[torch.arange(5)] * 4)
    logits = [
        model(torch.cat([p.expand(625, -1), sequences], 1), None, None, None)[0] for p in (prompt, guidance.prompt)
    ]  # type: ignore[union-attr]
    c, u = (each[:, -5:-1].detach() for each in logits)
    chances = sampling(u + 1.8 * (c - u), torch.arange(4).expand(625, -1), sequences).softmax(-1)
    exact = chances.gather(2, sequences[..., None])[..., 0].prod(1)
    drawn = decoder.sample(model, prompt.expand(8000, -1), 4, sampling, guidance=guidance, generator=generator())
    assert any(int(each.max()) > 1 for each in drawn.advances), "some guesses stay"
    number = drawn.tokens @ torch.tensor([125, 25, 5, 1])
    counts = torch.bincount(number, minlength=625)
    assert bool((exact[counts > 0] > 0).all()), "what the filters rule out was drawn"
    return chi_square(counts, exact).p_value


def test_half_precision_and_logits_that_are_not_numbers() -> None:
    model = chain()

    def half(*given: Any) -> tuple[Tensor, Any]:
        logits, cache = model(*given)
        return logits.bfloat16(), cache

    drawn = SpeculativeJacobi(4).sample(half, model.prompt(3), 8, generator=generator())  # type: ignore[arg-type]
    assert drawn.tokens.shape == (3, 8)
    model.table[1, 1] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        SpeculativeJacobi(4).sample(model, model.prompt(200), 8, generator=generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"scheme": "greedy"}, "scheme must be speculative, jacobi or matching"),
        ({"start": "left"}, "start must be one of random"),
        ({"advance": "both"}, "advance must be own or together"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeJacobi(**settings)


def test_vertical_neighbours_need_a_raster_and_lengths_a_token() -> None:
    model = chain()
    with pytest.raises(ValueError, match="needs to know the width of the image"):
        SpeculativeJacobi(4, start="repeat_vertical").sample(model, model.prompt(1), 8)
    with pytest.raises(ValueError, match="length must be at least 1"):
        SpeculativeJacobi(4).sample(model, model.prompt(1), 0)
