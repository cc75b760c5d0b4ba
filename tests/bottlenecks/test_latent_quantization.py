"""Latent quantisation and the bottlenecks that it is compared with."""

from __future__ import annotations

import math

import pytest
import torch
from vector_quantize_pytorch import FSQ as PeerFSQ

from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.bottlenecks.latents import FSQ, GaussianLatents


def test_every_latent_takes_the_nearest_value_the_first_on_ties() -> None:
    bottleneck = LatentQuantization(3, (2, 3, 5))
    z = torch.tensor([[0.0, 0.25, 9.0], [0.1, -0.3, -0.13]])
    code = bottleneck([z])
    assert code.indices is not None
    assert code.indices.tolist() == [[0, 1, 4], [1, 0, 1]]
    torch.testing.assert_close(code.features[0], torch.tensor([[-0.5, 0.0, 0.5], [0.5, -0.5, -0.25]]))
    torch.testing.assert_close(bottleneck.embed(code.indices)[0], code.features[0])
    assert code.bits is not None
    assert code.bits[0] == pytest.approx(math.log2(2 * 3 * 5))


def test_the_decoder_moves_the_encoder_and_never_the_tables() -> None:
    bottleneck = LatentQuantization(4, 5, quantization=0, commitment=0)
    z = torch.randn(6, 4, requires_grad=True)
    (bottleneck([z]).features[0] * torch.arange(1, 5)).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.arange(1.0, 5).expand(6, 4))
    assert bottleneck.tables.grad is None or not bottleneck.tables.grad.any()


def test_quantisation_pulls_tables_and_commitment_pulls_latents() -> None:
    for weights, pulled in (((1, 0), "tables"), ((0, 1), "latents")):
        bottleneck = LatentQuantization(4, 5, quantization=weights[0], commitment=weights[1])
        z = torch.randn(6, 4, requires_grad=True)
        bottleneck([z]).loss.backward()
        assert bottleneck.tables.grad is not None
        assert z.grad is not None
        assert bool(bottleneck.tables.grad.any()) == (pulled == "tables")
        assert bool(z.grad.any()) == (pulled == "latents")


def test_frozen_shared_and_single_valued_tables() -> None:
    assert not LatentQuantization(3, 4, learned=False).tables.requires_grad
    assert LatentQuantization(3, 4, shared=True).tables.shape == (1, 4)
    code = LatentQuantization(3, 1)([torch.randn(2, 3)])
    assert code.features[0].unique().tolist() == [-0.5]
    assert code.bits is not None
    assert float(code.bits[0]) == 0


def test_maps_tokens_and_pooled_levels() -> None:
    assert LatentQuantization(8)([torch.randn(2, 8, 4, 4)]).features[0].shape == (2, 8, 4, 4)
    assert LatentQuantization(8)([torch.randn(2, 9, 8)]).features[0].shape == (2, 9, 8)
    pooled = LatentQuantization(5, channels=8)([torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)])
    assert pooled.features[0].shape == (2, 5)


def test_drawn_codes_are_even_over_every_table() -> None:
    bottleneck = LatentQuantization(2, (3, 5))
    index = bottleneck.draw(6000, torch.Generator().manual_seed(0))
    for latent, size in enumerate((3, 5)):
        share = torch.bincount(index[:, latent], minlength=size) / len(index)
        torch.testing.assert_close(share, torch.full((size,), 1 / size), atol=0.03, rtol=0)


def test_wrong_input_is_refused_in_a_sentence() -> None:
    bottleneck = LatentQuantization(4, 5).eval()
    for level, told in ((torch.randn(2, 7), "channels=7"), (torch.full((2, 4), torch.nan), "NaN")):
        with pytest.raises(ValueError, match=told):
            bottleneck([level])
    for index in (torch.full((1, 4), 5), torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="indices"):
            bottleneck.embed(index)
    for latents, values in ((0, 10), (2, 0), (2, (3,))):
        with pytest.raises(ValueError, match=r"at least (one|1)"):
            LatentQuantization(latents, values)
    with pytest.raises(ValueError, match="one size"):
        LatentQuantization(2, (3, 4), shared=True)
    with pytest.raises(ValueError, match="two levels"):
        FSQ(2, 1)
    with pytest.raises(ValueError, match="number of training samples"):
        GaussianLatents(2, total_correlation=True)


def test_finite_scalars_are_those_of_the_published_package() -> None:
    levels = [8, 5, 4, 3]
    ours, peer = FSQ(4, levels), PeerFSQ(levels)
    z = torch.randn(50, 1, 4, generator=torch.Generator().manual_seed(0)) * 2
    code = ours([z])
    quantised, index = peer(z)
    assert code.indices is not None
    basis = torch.tensor([1, 8, 40, 160])
    assert torch.equal((code.indices * basis).sum(-1), index.long())
    torch.testing.assert_close(ours.embed(code.indices)[0], code.features[0])
    assert float(code.features[0].abs().max()) == 1
    assert quantised.shape == code.features[0].shape


def test_normalised_scalars_survive_what_all_samples_share() -> None:
    """A common drift saturates the tanh, and every sample gets the same code; normalised, they stay apart."""
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 20
    plain, normalised = FSQ(6, 5)([z]).indices, FSQ(6, 5, normalise=True)([z]).indices
    assert plain is not None
    assert normalised is not None
    assert len(plain.unique(dim=0)) == 1
    assert len(normalised.unique(dim=0)) > 40
    with pytest.raises(ValueError, match="single latent"):
        FSQ(1, 5, normalise=True)


def test_gaussian_latents_sample_in_training_and_cost_kl() -> None:
    level = torch.cat([torch.full((3, 2), 1.5), torch.zeros(3, 2)], 1)
    vae = GaussianLatents(2, beta=2.0)
    assert float(vae([level]).loss) == pytest.approx(2 * 2 * 0.5 * 1.5**2)
    assert not torch.equal(vae([level]).features[0], level[:, :2])
    assert torch.equal(vae.eval()([level]).features[0], level[:, :2])


def test_total_correlation_is_what_latents_share() -> None:
    """Two latents that are the same have much of it, independent ones little; β = 0 leaves it out of the loss."""
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(256, 2, generator=generator)
    same = free[:, :1].repeat(1, 2)

    def cost(mean: torch.Tensor, beta: float) -> float:
        bottleneck = GaussianLatents(2, beta, total_correlation=True, samples=256).eval()
        return float(bottleneck([torch.cat([mean, torch.full((256, 2), -4.0)], 1)]).loss)

    shared, apart = (cost(z, 1) - cost(z, 0) for z in (same, free))
    assert shared > apart + 0.5
