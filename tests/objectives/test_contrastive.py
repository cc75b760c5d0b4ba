"""Contrastive losses: limits, sides, directions, further negatives, and edges. Parity is elsewhere."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from isthmus.objectives.contrastive import contrastive_loss, sigmoid_loss, similarity


def pair(count: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=g), torch.randn(count, width, generator=g)


def test_limits() -> None:
    a, _ = pair()
    assert float(contrastive_loss(a, a, scale=1e3)) == pytest.approx(0, abs=1e-4)
    assert float(contrastive_loss(a, torch.zeros_like(a), normalize=None)) == pytest.approx(math.log(6))


@pytest.mark.parametrize(
    ("side", "free"),
    [("both", (True, True)), ("estimates", (True, False)), ("candidates", (False, True)), (None, (False, False))],
)
def test_lengths_matter_only_on_the_side_that_is_not_normalised(side, free: tuple[bool, bool]) -> None:
    a, b = pair()
    before = contrastive_loss(a, b, normalize=side)
    for longer, does_not in (
        (contrastive_loss(3 * a, b, normalize=side), free[0]),
        (contrastive_loss(a, 3 * b, normalize=side), free[1]),
    ):
        assert torch.allclose(longer, before, atol=1e-5) == does_not


def test_both_directions_are_symmetric_and_more_negatives_are_harder() -> None:
    a, b = pair()
    torch.testing.assert_close(contrastive_loss(a, b), contrastive_loss(b, a))
    one = contrastive_loss(a, b, symmetric=False)
    assert contrastive_loss(a, torch.cat([b, torch.randn(5, 8)]), symmetric=False) > one
    with pytest.raises(ValueError, match="set symmetric=False"):
        contrastive_loss(a, torch.cat([b, b]))
    with pytest.raises(ValueError, match="3 candidates for 6 estimates"):
        contrastive_loss(a, b[:3], symmetric=False)
    with pytest.raises(ValueError, match="8 numbers and candidates 7"):
        similarity(a, b[:, :7])


def test_targets_say_whose_is_whose() -> None:
    a, b = pair()
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(contrastive_loss(a, b[order.argsort()], targets=order), contrastive_loss(a, b))
    soft = torch.nn.functional.one_hot(order).float()
    torch.testing.assert_close(contrastive_loss(a, b[order.argsort()], targets=soft), contrastive_loss(a, b))
    with pytest.raises(ValueError, match="name every candidate once"):
        contrastive_loss(a, b, targets=torch.tensor([0, 0, 1, 2, 3, 4]))


def test_a_batch_of_one_says_nothing_and_warns() -> None:
    a, b = pair(1)
    a.requires_grad_()
    with pytest.warns(UserWarning, match="over one candidate is zero"):
        loss = contrastive_loss(a, b)
    loss.backward()
    assert loss.item() == 0.0
    assert a.grad is not None
    assert a.grad.abs().sum() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contrastive_loss(*pair(2)).item() > 0


def test_sixteen_bits_are_scored_in_thirty_two() -> None:
    a, b = pair()
    big = similarity((300 * a).half(), (300 * b).half(), normalize=None)
    assert big.dtype == torch.float32
    assert torch.isfinite(big).all()
    assert big.abs().max() > 65504, "it would have overflowed"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(similarity(a, b), similarity(a.clone(), b.clone()), rtol=0, atol=0)
        assert similarity(a, b).dtype == torch.float32
    assert torch.isfinite(contrastive_loss(torch.zeros(3, 4), torch.zeros(3, 4)))


def test_duplicates_count_as_right_in_the_sigmoid_loss() -> None:
    a, b = pair(4)
    twice = torch.cat([b, b[:1]])
    strict, kind = sigmoid_loss(a, twice, same=None), sigmoid_loss(a, twice)
    assert not torch.isclose(strict, kind)
    assert float(sigmoid_loss(b, b, scale=100.0, bias=-50.0)) < float(sigmoid_loss(a, b, scale=100.0, bias=-50.0))
    with pytest.raises(ValueError, match="at least as many"):
        sigmoid_loss(a, b[:2])
