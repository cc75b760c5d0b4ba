"""The acceptance test: exact whatever the drafts, right in the corners."""

from __future__ import annotations

import pytest
import torch

from isthmus.metrics.distributions import chi_square
from isthmus.samplers.acceptance import verify
from isthmus.samplers.logits import draw


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_first_token_that_comes_out_is_distributed_as_p() -> None:
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.7, 0.1, 0.1, 0.1])
    n, g = 20_000, generator()
    rows_p, rows_q = p.expand(n, 1, 4), q.expand(n, 1, 4)
    guesses = draw(rows_q, g)
    count, residual = verify(rows_p, rows_q, guesses, g)
    out = torch.where(count > 0, guesses[:, 0], draw(residual + (count > 0)[:, None], g))
    assert chi_square(torch.bincount(out, minlength=4), p).p_value > 0.01
    assert float(count.float().mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.02)


def test_counts_stop_at_the_first_refusal_and_name_its_residual() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.2, 0.8], [1.0, 0.0, 0.0], [0.1, 0.2, 0.7]]])
    q = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.9, 0.1], [1.0, 0.0, 0.0]]])
    tokens = torch.tensor([[0, 1, 0]])
    count, residual = verify(p, q, tokens, chance=torch.tensor([[0.49, 0.5, 0.0]]))
    assert count.tolist() == [1], "0.2 / 0.9 is below 0.5"
    torch.testing.assert_close(residual, torch.tensor([[0.0, 0.0, 1.0]]))
    count, residual = verify(p, q, tokens, chance=torch.tensor([[0.49, 0.2, 0.99]]))
    assert count.tolist() == [3]
    torch.testing.assert_close(residual, p[:, 3], msg="all stay: the row after the last")
    count, residual = verify(p[:, :3], q, tokens, chance=torch.tensor([[0.49, 0.2, 0.99]]))
    assert count.tolist() == [3]
    assert float(residual.sum()) == 0, "no such row was given"


def test_forced_tokens_of_no_draft_mass_stay_exactly_where_p_has_them() -> None:
    p = torch.tensor([[[0.3, 0.7]], [[0.0, 1.0]]])
    q = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    count, residual = verify(p, q, torch.zeros(2, 1, dtype=torch.long), generator())
    assert count.tolist() == [1, 0]
    assert bool(residual.isfinite().all())


def test_equal_distributions_keep_every_guess_and_an_empty_residual_falls_back_to_p() -> None:
    p = torch.rand(64, 5, 7, generator=generator()).softmax(-1)
    tokens = draw(p, generator(1))
    count, _ = verify(p, p, tokens, generator(2))
    assert bool((count == 5).all())
    tiny = torch.tensor([[[0.5, 0.5 - 1e-7, 1e-7]]])
    larger = torch.tensor([[[0.5, 0.5, 1e-7]]])
    _, residual = verify(tiny, larger, torch.tensor([[1]]), chance=torch.ones(1, 1))
    torch.testing.assert_close(residual, tiny[:, 0], msg="p < q everywhere but for rounding")


def test_half_precision_is_judged_in_float32() -> None:
    p = torch.rand(200, 3, 300, generator=generator()).softmax(-1)
    q = torch.rand(200, 3, 300, generator=generator(1)).softmax(-1)
    tokens = draw(q, generator(2))
    chance = torch.rand(200, 3, generator=generator(3))
    _, residual = verify(p.bfloat16(), q.bfloat16(), tokens, chance=chance)
    assert residual.dtype == torch.float32
    refused = residual.sum(-1) > 0
    torch.testing.assert_close(residual[refused].sum(-1), torch.ones(int(refused.sum())))
    exact = verify(p.bfloat16().float(), q.bfloat16().float(), tokens, chance=chance)
    assert torch.equal(verify(p.bfloat16(), q.bfloat16(), tokens, chance=chance)[0], exact[0])


def test_no_guesses_leave_the_row_after_them_and_wrong_shapes_are_refused() -> None:
    p = torch.tensor([[[0.25, 0.75]]])
    count, residual = verify(p, p[:, :0], torch.zeros(1, 0, dtype=torch.long))
    assert count.tolist() == [0]
    torch.testing.assert_close(residual, p[:, 0])
    with pytest.raises(ValueError, match=r"need q of shape \(1, 2, V\)"):
        verify(p, p, torch.zeros(1, 2, dtype=torch.long))
