"""One linear layer a person: grouped products are the published per-sample ones; who has no weights is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isthmus.layers.subject import SubjectLinear


def published(layer: SubjectLinear, x: Tensor, subject: Tensor) -> Tensor:
    """A weight matrix for every sample, as the published code gathers them."""
    assert isinstance(layer.weights, Tensor)
    return torch.einsum("bct,bcd->bdt", x, layer.weights[subject])


def test_grouped_products_are_those_of_gathered_weights_forward_and_backward() -> None:
    torch.manual_seed(0)
    layer, x = SubjectLinear(5, 7, 4), torch.randn(9, 5, 3)
    subject = torch.tensor([3, 0, 1, 1, 3, 0, 3, 1, 0])  # nobody is number 2
    torch.testing.assert_close(layer(x, subject), published(layer, x, subject))
    grads = []
    for out in (layer(x, subject), published(layer, x, subject)):
        layer.zero_grad()
        out.square().sum().backward()
        assert isinstance(layer.weights, Tensor)
        grads.append(layer.weights.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(*grads)
    assert grads[0][2].abs().sum() == 0


def test_one_person_and_no_time_axis() -> None:
    layer = SubjectLinear(5, 7, 2, bias=True)
    torch.nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    x = torch.randn(4, 5, 3)
    for who in (0, 1):
        subject = torch.full((4,), who)
        torch.testing.assert_close(layer(x, subject)[..., 1], layer(x[..., 1], {"subject": subject}))
        torch.testing.assert_close(layer(x, subject), published(layer, x, subject) + layer.bias[who, :, None])  # type: ignore[index]


def test_widths_may_differ_and_what_lies_beyond_is_not_read() -> None:
    layer = SubjectLinear([3, 5], 4, 2)
    x, subject = torch.randn(2, 5), torch.tensor([0, 1])
    out = layer(x, subject)
    changed = x.clone()
    changed[0, 3:] = 100
    torch.testing.assert_close(layer(changed, subject), out)
    changed[1, 4] += 1
    assert not torch.allclose(layer(changed, subject)[1], out[1])


def test_somebody_unknown_has_a_row_of_their_own_trained_by_dropout() -> None:
    torch.manual_seed(0)
    layer = SubjectLinear(4, 4, 2, dropout=0.5)
    x, subject = torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)
    layer(x, subject).sum().backward()
    touched = layer.weights.grad.abs().sum((1, 2)) > 0  # type: ignore[union-attr]
    assert touched.tolist() == [True, False, True]
    layer.eval()
    torch.testing.assert_close(layer(x, -torch.ones(64, dtype=torch.int64)), x @ layer.weights[2])
    assert torch.equal(layer(x, subject), x @ layer.weights[0])


@pytest.mark.parametrize("index", [2, -1, 99])
def test_an_index_without_weights_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"subject {index} has no weights; there are subjects 0 to 1"):
        SubjectLinear(3, 3, 2)(torch.randn(1, 3), torch.tensor([index]))


def test_impossible_sizes_are_refused() -> None:
    for arguments, told in (
        ((3, 3, 0), "subjects is at least 1, got 0"),
        (([3, 4], 3, 3), "one for each of 3 subjects"),
    ):
        with pytest.raises(ValueError, match=told):
            SubjectLinear(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no weights in common"):
        SubjectLinear([3, 4], 3, 2, dropout=0.1)
    with pytest.raises(ValueError, match="an identity needs equal widths"):
        SubjectLinear(3, 4, 2, identity=True)
    with pytest.raises(ValueError, match="has weights for 3 channels, got 4"):
        SubjectLinear(3, 3, 2)(torch.randn(1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="with subjects"):
        SubjectLinear(3, 3, 2)(torch.randn(2, 3), torch.tensor([0]))


def test_the_start_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    layer = SubjectLinear(100, 100, 3)
    assert isinstance(layer.weights, Tensor)
    assert float(layer.weights.detach().std()) == pytest.approx(0.1, rel=0.05)
    same = SubjectLinear(16, 16, 2, identity=True)
    torch.testing.assert_close(same(torch.eye(16), torch.zeros(16, dtype=torch.int64)), torch.eye(16) / 4)
