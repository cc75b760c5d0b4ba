"""Windows read as shifted views give the numbers of unfolded windows, and so do their derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.layers import neighbourhood
from isthmus.layers.neighbourhood import neighbour_mix, neighbour_scores, visible_neighbours


def maps(height: int, width: int, channels: int = 3, batch: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(height * width + channels)
    return torch.randn(batch, 2, channels, height, width, generator=g, dtype=torch.float64, requires_grad=True)


def unfolded(x: Tensor, window: int) -> Tensor:
    """``(B, h, d, H, W)`` → ``(B, h, d, k·k, H, W)``."""
    return F.unfold(x.flatten(1, 2), window, padding=window // 2).view(*x.shape[:3], window * window, *x.shape[3:])


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (5, 3)], ids=str)
def test_numbers_are_those_of_unfolded_windows(window: int, size: tuple[int, int]) -> None:
    q, k, w = maps(*size), maps(*size) + 1, maps(*size, channels=window * window)
    scores, mixed = (q.unsqueeze(3) * unfolded(k, window)).sum(2), (w.unsqueeze(2) * unfolded(k, window)).sum(3)
    torch.testing.assert_close(neighbour_scores(q, k, window), scores)
    torch.testing.assert_close(neighbour_mix(w, k, window), mixed)
    inside = unfolded(torch.ones_like(k), window)[0, 0, 0] > 0
    assert torch.equal(visible_neighbours(*size, window), inside)


def test_derivatives_of_first_and_second_order() -> None:
    q, k, w = maps(2, 3, 2, 1), maps(2, 3, 2, 1), maps(2, 3, 9, 1)
    for function, inputs in ((neighbour_scores, (q, k)), (neighbour_mix, (w, k))):
        assert torch.autograd.gradcheck(lambda a, b, f=function: f(a, b, 3), inputs)
        assert torch.autograd.gradgradcheck(lambda a, b, f=function: f(a, b, 3), inputs)


def test_only_gradients_that_are_asked_for() -> None:
    q, k = maps(3, 4), maps(3, 4).detach()
    neighbour_scores(q, k, 3).sum().backward()
    assert q.grad is not None


def test_portions_of_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, w = maps(4, 5, batch=5), maps(4, 5, batch=5), maps(4, 5, channels=9, batch=5)
    found = []
    for cached in (1, 10**9):
        monkeypatch.setattr(neighbourhood, "_CACHED", cached)
        y = neighbour_mix(w, neighbour_scores(q, k, 3)[:, :, :3] + k, 3)
        found.append([y, *torch.autograd.grad(y.square().sum(), (q, k, w))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_no_copies_of_windows_are_stored() -> None:
    q, k, w = maps(16, 16, 8), maps(16, 16, 8), maps(16, 16, 9)
    for output in (neighbour_scores(q, k, 3), neighbour_mix(w, k, 3)):
        kept = output.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert sum(t.numel() for t in kept) <= q.numel() + max(w.numel(), k.numel())


def test_bad_windows_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="window 2: a window around a place has an odd side"):
        neighbour_scores(maps(3, 3), maps(3, 3), 2)
    with pytest.raises(ValueError, match=r"\(2, 2, 3, 3, 3\) and \(2, 2, 3, 3, 4\) do not fit"):
        neighbour_scores(maps(3, 3), maps(3, 4), 3)
    with pytest.raises(ValueError, match="do not fit with a window of 3"):
        neighbour_mix(maps(3, 3, channels=8), maps(3, 3), 3)
