"""Values of one thing, gradients of another."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from isthmus.layers.straight_through import fake_quant, lower_bound, straight_through
from tests.conftest import shared


def test_value_of_q_and_gradient_of_x() -> None:
    x = torch.tensor([0.2, 1.7, -3.1], requires_grad=True)
    y = straight_through(x, x.round())
    assert y.tolist() == [0.0, 2.0, -3.0], "exactly, not up to rounding of a sum"
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="two tensors of one shape"):
        straight_through(x, x[:2])


def test_a_bound_lets_only_gradients_out_that_lead_up() -> None:
    x = torch.tensor([0.1, 0.1, 2.0, 2.0], requires_grad=True)
    y = lower_bound(x, 1.0)
    assert y.tolist() == [1.0, 1.0, 2.0, 2.0]
    (y * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -1.0]


def test_quantised_values_are_the_levels_and_gradients_stop_outside() -> None:
    x, t = torch.tensor([-2.0, -0.4, 0.1, 0.55, 3.0], requires_grad=True), torch.tensor(0.6, requires_grad=True)
    y = fake_quant(x, 3, t)
    torch.testing.assert_close(y, torch.tensor([-0.6, -0.4, 0.0, 0.6, 0.6]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert t.grad is not None
    fine = fake_quant(torch.linspace(-1, 1, 999), 4)
    assert len(fine.unique()) == 15


def test_every_channel_has_its_own_range_and_an_empty_one_stays_zero() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.0])[:, None, None]
    y = fake_quant(x, 8, axis=0)
    for channel in range(2):
        assert float((x - y)[channel].abs().max()) <= float(x[channel].abs().max()) / 127 / 2 * 1.001
    assert bool((y[2] == 0).all())
    torch.testing.assert_close(
        fake_quant(x, 8, torch.tensor([1.0, 2.0, 3.0]), axis=0)[1].abs().max(), torch.tensor(2.0)
    )


def test_published_formula() -> None:
    """CoDeNet's quantiser: 4-bit weights by output channel, 8-bit activations with a threshold given."""
    case = load_file(shared("parity/29-codenet/quantizer.safetensors"))
    weights, inputs = fake_quant(case["in/w"], 4, axis=0), fake_quant(case["in/x"], 8, case["in/t_x"])
    torch.testing.assert_close(weights, case["out/w_q"], atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs, case["out/x_q"], atol=1e-5, rtol=0)
    torch.testing.assert_close(fake_quant(case["in/w"], 4, case["in/t_w"], axis=0), weights)


def test_settings_that_make_no_levels_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="at least 2 bits, got 1"):
        fake_quant(x, 1)
    with pytest.raises(ValueError, match="threshold has 3 values"):
        fake_quant(x, 4, torch.ones(3), axis=0)
    with pytest.raises(ValueError, match="not be negative"):
        fake_quant(x, 4, -1.0)
