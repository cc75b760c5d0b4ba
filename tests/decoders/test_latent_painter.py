"""The small conditional decoder."""

from __future__ import annotations

import pytest
import torch

from isthmus.decoders.latent_painter import LatentPainter


def test_latents_become_pictures_in_the_unit_range() -> None:
    painter = LatentPainter(6, size=16, width=16)
    out = painter(100 * torch.randn(3, 6))
    assert out.shape == (3, 3, 16, 16)
    assert 0 <= float(out.detach().min()) <= float(out.detach().max()) <= 1
    with pytest.raises(ValueError, match="multiple of 8, got 20"):
        LatentPainter(6, size=20)
