"""Learning what follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.objectives.forecasting import Forecasting


class Still(nn.Module):
    """Tells the last value again."""

    def forward(self, past: torch.Tensor) -> torch.Tensor:
        return past[..., -1:].expand(-1, -1, 2)


def test_loss_is_the_squared_error_of_what_follows() -> None:
    signal = torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])
    told = Forecasting(Still(), 2)({"signal": signal}, torch.Generator())
    assert float(told.loss) == pytest.approx((1 + 9) / 2)
    assert float(told.metrics["mae"]) == pytest.approx(2)
    assert torch.equal(told.outputs["forecast"], torch.ones(1, 1, 2))


def test_windows_without_a_future_are_refused() -> None:
    with pytest.raises(ValueError, match="windows of 4 values leave nothing to tell after 4"):
        Forecasting(Still(), 4).split(torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="history 0"):
        Forecasting(Still(), 0)
