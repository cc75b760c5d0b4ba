"""Summaries over time and heads."""

from __future__ import annotations

import pytest
import torch

from isthmus.decoders.latent_heads import LatentHeads, TimeAttention, TimeMean


def test_one_head_serves_both_losses_or_each_has_its_own() -> None:
    tokens = [torch.randn(2, 9, 5)]
    one = LatentHeads(5, 3, length=9)(tokens)
    assert one.retrieval is one.generation
    both = LatentHeads(5, 3, length=9, two=True, hidden=4)(tokens)
    assert not torch.equal(both.retrieval, both.generation)
    assert both.retrieval.shape == both.generation.shape == (2, 3)


def test_aggregations() -> None:
    tokens = torch.randn(2, 9, 5)
    torch.testing.assert_close(TimeMean()(tokens), tokens.mean(1))
    attention = TimeAttention(5, 4)
    same = tokens[:, :1].expand(-1, 9, -1)
    torch.testing.assert_close(attention(same), tokens[:, 0])
    for kind in ("attention", "mean"):
        heads = LatentHeads(5, 3, aggregation=kind)  # type: ignore[arg-type]
        assert heads([tokens]).retrieval.shape == heads([tokens[:, :4]]).retrieval.shape


def test_windows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="windows of 9 samples, got 8; cut or resample"):
        LatentHeads(5, 3, length=9)([torch.randn(2, 8, 5)])
    with pytest.raises(ValueError, match="needs the length of the window"):
        LatentHeads(5, 3)
