"""Vector quantisation between an encoder and a decoder: an image tokenizer that learns, saves and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.bottlenecks.vq import VQ
from isthmus.codec import Codec
from isthmus.decoders.conv_tokenizer import ConvDetokenizer
from isthmus.encoders.tokenizers.conv_tokenizer import ConvTokenizer


def test_indices_name_the_nearest_codes_and_embed_is_what_the_decoder_got() -> None:
    torch.manual_seed(0)
    vq = VQ(7, 3).eval()
    x = torch.randn(2, 3, 4, 5)
    code = vq([x])
    assert code.indices is not None
    want = torch.cdist(x.movedim(1, -1).reshape(-1, 3), vq.codebook.codes).argmin(1).view(2, 4, 5)
    assert torch.equal(code.indices, want)
    assert torch.equal(code.features[0], vq.embed(code.indices)[0])
    assert code.bits is not None
    torch.testing.assert_close(code.bits, torch.full((2,), 20 * torch.tensor(7.0).log2().item()))
    tokens = vq([x.flatten(2).mT])
    assert tokens.indices is not None
    assert torch.equal(tokens.indices, want.flatten(1))
    assert torch.equal(tokens.features[0], vq.embed(tokens.indices)[0])


def test_gradients_pass_straight_through_and_commit() -> None:
    torch.manual_seed(0)
    vq = VQ(5, 3, commitment=0.0).eval()
    x = torch.randn(2, 3, 2, 2, requires_grad=True)
    (vq([x]).features[0] * 3).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 3).all())
    vq.commitment = 1.0
    code = vq([x])
    code.loss.backward()
    torch.testing.assert_close(x.grad - 3, 2 * (x - code.features[0]).detach() / x.numel())


def test_codes_start_on_the_first_batch_follow_it_and_stay_in_evaluation() -> None:
    torch.manual_seed(0)
    vq = VQ(16, 2)
    corners = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    for _ in range(30):
        x = corners.repeat(16, 1) + 0.1 * torch.randn(64, 2)
        vq([x[None]])
    assert float(torch.cdist(corners, vq.codebook.codes).amin(1).max()) < 0.3
    before = vq.codebook.codes.clone()
    vq.eval()([torch.randn(1, 50, 2)])
    assert torch.equal(before, vq.codebook.codes)


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_a_tokenizer_learns_to_rebuild_and_survives_saving(reduction: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(ConvTokenizer(4, reduction, 8), VQ(16, 4), ConvDetokenizer(4, reduction, 8))
    images = torch.rand(8, 3, 8, 12).round()
    optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        out = codec(images)
        loss = (out.prediction - images).square().mean() + out.code.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert out.prediction.shape == images.shape
    assert out.code.indices.shape == (8, 8 // reduction, 12 // reduction)
    assert losses[-1] < 0.7 * losses[0]
    codec.eval().save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    assert torch.equal(codec(images).prediction, again(images).prediction)
    assert bool(again.bottleneck.started), "a loaded code book does not start anew"


def test_half_precision_stays_half() -> None:
    vq = VQ(5, 3).eval()
    code = vq([torch.randn(1, 3, 2, 2).bfloat16()])
    assert code.features[0].dtype == torch.bfloat16
    assert bool(code.loss.isfinite())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two codes"):
        VQ(1, 3)
    vq = VQ(5, 3)
    with pytest.raises(ValueError, match=r"takes one level \(B, 3, H, W\)"):
        vq([torch.zeros(1, 4, 2, 2)])
    with pytest.raises(ValueError, match="takes one level"):
        vq([torch.zeros(1, 3, 2, 2)] * 2)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 5\), got 0 to 5"):
        vq.embed(torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        vq([torch.full((1, 3, 2, 2), torch.nan)])
    with pytest.raises(ValueError, match="power of two, got 3"):
        ConvTokenizer(reduction=3)
    with pytest.raises(ValueError, match="reduction is at least 1, got 0"):
        ConvDetokenizer(reduction=0)
    with pytest.raises(ValueError, match="multiples of 4, got 6 x 8"):
        ConvTokenizer(reduction=4)(torch.zeros(1, 3, 6, 8))
    with pytest.raises(ValueError, match=r"takes one map \(B, 16, h, w\)"):
        ConvDetokenizer()([torch.zeros(1, 3, 2, 2)])
