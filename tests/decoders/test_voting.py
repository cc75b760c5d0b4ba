"""Votes and flat heads on fetched values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from isthmus.decoders.voting import FlatHead, Vote


def test_a_vote_is_the_mean_over_codebooks_and_tokens_without_parameters() -> None:
    values = torch.randn(2, 5, 6, 3)  # (B, C, N, V)
    tokens = values.transpose(1, 2).flatten(2)
    vote = Vote(3)
    assert not list(vote.parameters())
    torch.testing.assert_close(vote([tokens]), values.mean((1, 2)))
    torch.testing.assert_close(vote([tokens.transpose(1, 2).unflatten(2, (3, 2))]), values.mean((1, 2)))


def test_dropout_leaves_out_whole_codebooks_in_training_only() -> None:
    values = torch.ones(1000, 4, 3)
    vote = Vote(3, dropout=0.5)
    torch.manual_seed(0)
    told = vote.train()([values.flatten(1)])
    assert (told == told[:, :1]).all()
    assert {round(float(v), 3) for v in told.unique()} == {0.0, 0.5, 1.0, 1.5, 2.0}
    assert (vote.eval()([values.flatten(1)]) == 1).all()


def test_flat_heads_read_every_number() -> None:
    x = torch.randn(4, 6, 2, 2)
    linear = FlatHead(24, 3, bias=False)
    (layer,) = (m for m in linear.modules() if isinstance(m, torch.nn.Linear))
    assert layer.bias is None
    torch.testing.assert_close(linear([x]), F.linear(x.flatten(1), layer.weight))
    mlp = FlatHead(24, 3, hidden=128)
    assert sum(p.numel() for p in mlp.parameters()) == 24 * 128 + 128 + 128 * 3 + 3
    assert mlp([x]).shape == (4, 3)
