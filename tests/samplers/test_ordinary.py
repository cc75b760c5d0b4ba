"""Ordinary sampling, and feeding a model in pieces."""

from __future__ import annotations

import pytest
import torch

from isthmus.metrics.distributions import chi_square
from isthmus.priors.markov import MarkovChain
from isthmus.priors.tiny_lm import tiny_llama
from isthmus.samplers.feed import Feed, Guidance, WholeSequence
from isthmus.samplers.ordinary import Sampling, at_any, sample
from isthmus.samplers.transformers_models import CausalModel


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(vocab: int = 4) -> MarkovChain:
    return MarkovChain(vocab, generator=generator(7))


def llama() -> CausalModel:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return CausalModel(tiny_llama(20, 2, 32).eval())


def test_sequences_have_the_probabilities_of_the_chain() -> None:
    model, filters = chain(), Sampling(temperature=0.8, top_k=3)
    drawn = sample(model, model.prompt(6000), 4, filters, generator=generator()).tokens
    _, probabilities = model.exact(4, lambda x: filters(x, torch.zeros(x.shape[:2]), x))
    assert int((probabilities == 0).sum()) > 0
    assert chi_square(torch.bincount(model.number(drawn), minlength=256), probabilities).p_value > 0.01


def test_a_row_ends_with_its_first_end_token_and_is_padded() -> None:
    model = chain()
    drawn = sample(model, model.prompt(50), 12, stop=at_any([2]), pad=9, generator=generator())
    for tokens, length in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True):
        assert 2 not in tokens[: length - 1]
        assert tokens[length - 1] == 2 or length == 12
        assert tokens[length:] == [9] * (12 - length)
    assert drawn.passes <= 12
    assert int(torch.stack(drawn.advances).sum()) == int(drawn.lengths.sum())


@torch.no_grad()
def test_tokens_taken_back_in_rows_of_different_length_leave_no_trace() -> None:
    model, g = llama(), generator()
    prompt, mask = torch.randint(1, 20, (3, 5), generator=g), torch.ones(3, 5)
    mask[1, :2] = 0
    feed = Feed(model, prompt, mask)
    feed.first()
    rows = [prompt[b, int(mask[b].eq(0).sum()) :].tolist() for b in range(3)]
    for kept in ([2, 0, 3], [1, 4, 4], [4, 4, 4], [3, 0, 0]):
        inputs = torch.randint(1, 20, (3, 4), generator=g)
        got = feed(inputs)
        for b in range(3):
            whole = torch.tensor([rows[b] + inputs[b].tolist()])
            want, _ = model(whole, None, torch.arange(whole.shape[1])[None], None)
            torch.testing.assert_close(got[b], want[0, -4:], atol=2e-5, rtol=1e-4)
            rows[b] += inputs[b, : kept[b]].tolist()
        feed.keep(torch.tensor(kept))


@torch.no_grad()
def test_guidance_feeds_a_second_prompt_of_another_length() -> None:
    model, prompt = llama(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    other = torch.tensor([[1, 2, 9, 8, 7]])
    feed = Feed(model, prompt, guidance=Guidance(2.5, other))
    c, _ = model(prompt, None, torch.arange(3).expand(2, -1), None)
    u, _ = model(other, None, torch.arange(5)[None], None)
    torch.testing.assert_close(feed.first()[:, 0], u[:, -1] + 2.5 * (c[:, -1] - u[:, -1]), atol=1e-5, rtol=1e-4)
    last = Feed(model, prompt, guidance=Guidance(2.0)).first()
    u, _ = model(prompt[:, -1:], None, torch.zeros(2, 1, dtype=torch.long), None)
    torch.testing.assert_close(last, u + 2 * (c[:, -1:] - u), atol=1e-5, rtol=1e-4)
    masked = Guidance(2.0, prompt, torch.tensor([[0, 0, 1], [0, 0, 1]]))
    torch.testing.assert_close(Feed(model, prompt, guidance=masked).first(), last, atol=1e-5, rtol=1e-4)
    assert Feed(model, prompt, guidance=Guidance(1.0)).copies == 1


def test_a_function_of_the_whole_sequence_serves_as_model() -> None:
    model = chain()
    whole = WholeSequence(lambda ids, mask: model(ids, None, None, mask)[0])
    a = sample(model, model.prompt(5), 6, generator=generator()).tokens
    assert torch.equal(a, sample(whole, model.prompt(5), 6, generator=generator()).tokens)


def test_bad_prompts_lengths_and_logits_are_told_apart() -> None:
    model = chain()
    with pytest.raises(ValueError, match="length must be at least 1"):
        sample(model, model.prompt(1), 0)
    with pytest.raises(ValueError, match="at least one token"):
        sample(model, torch.zeros(2, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="shape of the prompt"):
        sample(model, model.prompt(2), 3, mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="pad shorter prompts on the left"):
        sample(model, model.prompt(2), 3, mask=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="prompt without condition must be"):
        sample(model, model.prompt(2), 3, guidance=Guidance(2.0, torch.zeros(3, 1, dtype=torch.long)))
    model.table[:] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        sample(model, model.prompt(1), 3)
    model.table[:] = -torch.inf
    with pytest.raises(ValueError, match="-inf for every token"):
        sample(model, model.prompt(1), 3)
    feed = Feed(chain(), model.prompt(1))
    feed.first()
    feed(model.prompt(1))
    with pytest.raises(RuntimeError, match="say with keep"):
        feed(model.prompt(1))
