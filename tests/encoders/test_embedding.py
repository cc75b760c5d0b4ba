"""Embeddings: pooled, flat or token by token, and centred."""

from __future__ import annotations

import pytest
import torch

from isthmus.encoders.images.pixels import Pixels
from isthmus.encoders.words.embedding import Embedding


def test_places_are_pooled_laid_out_or_kept() -> None:
    x = torch.rand(2, 3, 4, 5)
    (mean,) = Embedding(Pixels(), 3)(x)
    torch.testing.assert_close(mean, x.mean((2, 3))[:, None])
    (flat,) = Embedding(Pixels(), 60, "flat")(x)
    torch.testing.assert_close(flat, x.flatten(1)[:, None])
    (tokens,) = Embedding(Pixels(), 3, "none")(x)
    torch.testing.assert_close(tokens, x.flatten(2).transpose(1, 2))
    (grey,) = Embedding(Pixels(), 20, "flat", grey=True)(x)
    torch.testing.assert_close(grey, x.mean(1).flatten(1)[:, None])


def test_the_mean_is_taken_off_and_taking_it_again_changes_nothing() -> None:
    x = 5 + torch.rand(30, 3, 4, 4)
    embedding = Embedding(Pixels(), 48, "flat")
    for _ in range(2):
        embedding.centre(embedding(x)[0])
        torch.testing.assert_close(embedding(x)[0].mean(0), torch.zeros(1, 48), atol=1e-5, rtol=0)


def test_another_size_is_told() -> None:
    with pytest.raises(ValueError, match="embeddings have 48 numbers, got 75"):
        Embedding(Pixels(), 48, "flat")(torch.rand(1, 3, 5, 5))
