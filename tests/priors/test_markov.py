"""A chain whose distribution is known."""

from __future__ import annotations

import pytest
import torch

from isthmus.priors.markov import MarkovChain


def chain(order: int = 2) -> MarkovChain:
    return MarkovChain(3, order, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_all_sequences_sum_to_one_and_are_numbered(order: int) -> None:
    model = chain(order)
    sequences, probabilities = model.exact(4)
    assert float(probabilities.sum()) == pytest.approx(1)
    assert model.number(sequences).tolist() == list(range(81))
    first = model(model.prompt(1))[0][0, -1].softmax(0)
    torch.testing.assert_close(probabilities.view(3, 27).sum(1).float(), first)


def test_pieces_give_what_the_whole_gives_and_it_forgets_what_is_further_back() -> None:
    model = chain()
    ids = torch.tensor([[3, 0, 1, 2, 2, 1]])
    whole, _ = model(ids)
    first, cache = model(ids[:, :2])
    second, _ = model(ids[:, 2:], cache)
    assert torch.equal(whole, torch.cat([first, second], 1))
    other = ids.clone()
    other[0, 2] = 0
    assert torch.equal(model(other)[0][:, 4:], whole[:, 4:])
    assert not torch.equal(model(other)[0][:, 3], whole[:, 3])
    masked, _ = model(torch.tensor([[1, 3, 0]]), None, None, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(masked[:, 2], whole[:, 1], msg="padding is as nothing")


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="two tokens and an order of 1"):
        MarkovChain(1)
    with pytest.raises(ValueError, match="two tokens and an order of 1"):
        MarkovChain(3, 0)
