"""The MEG decoder's loss: weights of its terms, and randomness that several processes share."""

from __future__ import annotations

import pytest
import torch

from isthmus.codec import Codec
from isthmus.decoders.latent_heads import LatentHeads
from isthmus.encoders.signals.meg_conv import MEGConv
from isthmus.layers.random import ShardedGenerator
from isthmus.layers.robust_scale import RobustScale
from isthmus.objectives.latent_matching import LatentMatching


def made(**options: float) -> tuple[LatentMatching, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    encoder = MEGConv(2, 6, attention=4, position_dim=8, mix=4, hidden=5, depth=2)
    codec = Codec(encoder, decoder=LatentHeads(6, 3, length=10, two=True))
    g = torch.Generator().manual_seed(0)
    batch = {
        "signal": torch.randn(8, 5, 10, generator=g),
        "subject": torch.arange(8) % 2,
        "positions": torch.rand(5, 2, generator=g).expand(8, -1, -1),
        "latent": torch.randn(8, 3, generator=g),
    }
    scale = RobustScale(5, 2).fit(batch["signal"], batch["subject"])
    return LatentMatching(codec, scale, **options), batch  # type: ignore[arg-type]


def test_each_term_moves_its_own_head_only() -> None:
    for weight, moved in ((1.0, "retrieval"), (0.0, "generation")):
        objective, batch = made(weight=weight)
        loss = objective(batch, torch.Generator().manual_seed(1))
        loss.loss.backward()
        for name in ("retrieval", "generation"):
            grads = [p.grad for p in getattr(objective.codec.decoder, name).parameters()]  # type: ignore[union-attr]
            assert any(g is not None and g.abs().sum() > 0 for g in grads) == (name == moved)
    objective, batch = made(weight=0.75)
    loss = objective.eval()(batch, torch.Generator())
    expected = 0.75 * loss.metrics["contrastive"] + 0.25 * loss.metrics["regression"]
    torch.testing.assert_close(loss.loss.detach(), expected)


def test_two_processes_see_the_disc_and_the_noise_of_one() -> None:
    objective, batch = made(noise=0.5)
    seen = []

    def spy(module, inputs) -> None:
        seen.append((inputs[0], inputs[1]["centre"]))

    objective.codec.register_forward_pre_hook(spy)
    objective(batch, ShardedGenerator("s"))
    for rank in (0, 1):
        half = {key: value[4 * rank : 4 * rank + 4] for key, value in batch.items()}
        objective(half, ShardedGenerator("s", rank=rank, world=2))
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][0], torch.cat([seen[1][0], seen[2][0]]))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\]"):
        made(weight=1.5)
