"""Ridge: scikit-learn's numbers in both forms, penalties by leave-one-out, moments, and edges."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge as Reference
from sklearn.linear_model import RidgeCV

from isthmus.codec import Codec
from isthmus.decoders.ridge import Ridge, match_moments

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


def problem(samples: int, width: int, targets: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, width, generator=g, dtype=torch.float64) + 3
    weight = torch.randn(5, targets, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, targets)
    return x, x[:, :5] @ weight + 3 * torch.randn(samples, targets, generator=g, dtype=torch.float64) + 7


@pytest.mark.parametrize(("samples", "width"), [(40, 90), (150, 20), (30, 30)])
def test_equals_scikit_learn_in_both_forms(samples: int, width: int) -> None:
    x, y = problem(samples, width)
    ours, theirs = Ridge(5.0).fit(x, y), Reference(5.0).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(ours.weight, torch.as_tensor(theirs.coef_.T))
    torch.testing.assert_close(ours(x), torch.as_tensor(theirs.predict(x.numpy())))
    chosen = RidgeCV(GRID, alpha_per_target=True).fit(x.numpy(), y.numpy())
    searched = Ridge(GRID).fit(x, y)
    assert searched.alphas.tolist() == list(chosen.alpha_)
    torch.testing.assert_close(searched(x), torch.as_tensor(chosen.predict(x.numpy())))
    assert len(set(searched.alphas.tolist())) > 1


def test_known_penalties_for_each_target() -> None:
    x, y = problem(30, 10)
    penalties = torch.tensor([0.5, 5.0, 50.0, 0.0], dtype=torch.float64)
    together = Ridge().fit(x, y, penalties)
    for i, alpha in enumerate(penalties.tolist()):
        torch.testing.assert_close(together(x)[:, i], Ridge(alpha).fit(x, y[:, i])(x)[:, 0])


def test_no_penalty_is_least_squares_even_where_columns_repeat() -> None:
    x, y = problem(30, 10)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1, dtype=x.dtype)], 1), y).solution
    torch.testing.assert_close(Ridge(0.0).fit(x, y).weight, solution[:10])
    twice = Ridge(0.0).fit(torch.cat([x, x], 1), y)
    torch.testing.assert_close(twice.weight[:10] + twice.weight[10:], solution[:10])


def test_dtype_trials_and_a_constant_channel() -> None:
    x, y = problem(40, 24)
    ridge = Ridge(GRID).fit(x.float().view(40, 4, 6), y.float())
    assert ridge.weight.dtype == torch.float32
    assert ridge(x.float().view(40, 4, 6)).shape == (40, 4)
    assert torch.equal(ridge([x.float()]), ridge(x.float()))
    x[:, 3] = 2.0
    assert Ridge(1.0).fit(x, y).weight[3].abs().max() < 1e-12


def test_it_is_saved_with_a_codec(tmp_path) -> None:
    from isthmus.encoders.signals.meg_conv import MEGConv

    x, y = problem(20, 12)
    ridge = Ridge(GRID).fit(x.float(), y.float())
    codec = Codec(MEGConv(out_channels=12, attention=2, position_dim=8, hidden=4, mix=2), decoder=ridge)
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path).decoder
    assert isinstance(again, Ridge)
    assert again.fitted
    assert torch.equal(again(x.float()), ridge(x.float()))


def test_wrong_use_is_refused() -> None:
    x, y = problem(20, 12)
    with pytest.raises(ValueError, match="has not been fitted"):
        Ridge()(x)
    for alpha in (-1.0, (), (1.0, 0.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match=r"alpha (must be|is at least 0)"):
            Ridge(alpha)
    with pytest.raises(ValueError, match="fitted to 12 inputs, got 11"):
        Ridge().fit(x, y)(x[:, :11])
    for a, b, told in (
        (x, y[:5], "as many targets as inputs"),
        (x[:1], y[:1], "two or more"),
        (x.masked_fill(x > 4, torch.nan), y, "inputs of ridge have NaN"),
    ):
        with pytest.raises(ValueError, match=told):
            Ridge().fit(a, b)
    with pytest.raises(ValueError, match="4 penalties of 0 or more"):
        Ridge().fit(x, y, torch.ones(3))


def test_matched_predictions_have_the_moments_of_targets() -> None:
    g = torch.Generator().manual_seed(0)
    predicted = 0.1 * torch.randn(200, 3, generator=g) + 5
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    out = match_moments(predicted, mean, std)
    torch.testing.assert_close(out.mean(0), mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.std(0), std)
    one = match_moments(predicted[:1], mean, std, predicted.mean(0), predicted.std(0))
    torch.testing.assert_close(one, out[:1])
    with pytest.raises(ValueError, match="one prediction has no spread"):
        match_moments(predicted[:1], mean, std)
    predicted[:, 1] = 7
    assert match_moments(predicted, mean, std)[:, 1].tolist() == [2.0] * 200
