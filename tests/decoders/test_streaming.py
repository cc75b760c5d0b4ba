"""Samples decoded as they arrive: the answers of whole windows, whatever the packets; the past alone decides."""

from __future__ import annotations

import pytest
import torch

from isthmus.codec import Codec
from isthmus.decoders.latent_heads import LatentHeads
from isthmus.decoders.streaming import StreamingDecoder
from isthmus.encoders.signals.meg_conv import MEGConv
from isthmus.layers.robust_scale import RobustScale

LENGTH, BEFORE = 12, 4


@pytest.fixture
def codec() -> Codec:
    torch.manual_seed(0)
    encoder = MEGConv(2, 6, attention=5, position_dim=8, mix=4, hidden=6, layout=torch.rand(7, 2).tolist())
    return Codec(encoder, decoder=LatentHeads(6, 3, length=LENGTH)).eval()


def whole(codec: Codec, scale: RobustScale, recording: torch.Tensor, end: int) -> torch.Tensor:
    window = recording[None, :, end - LENGTH : end]
    window = window - window[..., :BEFORE].mean(-1, keepdim=True)
    subject = torch.tensor([1])
    return codec(scale(window, subject), {"subject": subject}).prediction.retrieval[0]


@torch.no_grad()
@pytest.mark.parametrize("packets", [[1] * 40, [40], [3, 20, 1, 16], [13, 27]])
def test_every_step_is_the_whole_window_that_ends_then(codec: Codec, packets: list[int]) -> None:
    recording = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    scale = RobustScale(7, 2).fit(torch.randn(20, 7, 9), torch.arange(20) % 2)
    decoder = StreamingDecoder(codec, scale, rate=100, length=LENGTH, before=BEFORE, stride=5, subject=1)
    steps = [step for part in recording.split(packets, 1) for step in decoder.push(part)]
    ends = list(range(LENGTH, 41, 5))
    assert [round(step.time * 100) for step in steps] == ends
    for end, step in zip(ends, steps, strict=True):
        torch.testing.assert_close(step.latents.retrieval[0], whole(codec, scale, recording, end), rtol=1e-4, atol=1e-5)
        assert step.milliseconds > 0
        assert step.latency >= (LENGTH - BEFORE) / 100 + step.waiting
    if packets == [40]:
        assert [round(step.waiting * 100) for step in steps] == [40 - end for end in ends]


def test_the_future_changes_nothing_and_reset_forgets(codec: Codec) -> None:
    recording = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    decoder = StreamingDecoder(codec, None, rate=100, length=LENGTH, before=BEFORE)
    first = decoder.push(recording[:, :LENGTH])[0].latents.retrieval
    decoder.push(100 * recording[:, LENGTH:])
    decoder.reset()
    assert torch.equal(decoder.push(recording[:, :LENGTH])[0].latents.retrieval, first)
    assert decoder.push(recording[:, :0]) == []


def test_an_encoder_that_does_not_fold_is_called_whole() -> None:
    torch.manual_seed(0)
    encoder = MEGConv(1, 6, attention=5, position_dim=8, mix=4, mix_activation=True, hidden=6)
    codec = Codec(encoder, decoder=LatentHeads(6, 3, length=LENGTH)).eval()
    places, recording = torch.rand(7, 2), torch.randn(7, LENGTH)
    step = StreamingDecoder(codec, None, 100, LENGTH, positions=places).push(recording)[0]
    torch.testing.assert_close(
        step.latents.retrieval, codec(recording[None], {"positions": places}).prediction.retrieval
    )


def test_wrong_samples_and_sizes_are_refused(codec: Codec) -> None:
    for options, told in (({"rate": 0}, "above 0"), ({"before": LENGTH}, "before less than length")):
        with pytest.raises(ValueError, match=told):
            StreamingDecoder(codec, None, **{"rate": 100, "length": LENGTH, **options})  # type: ignore[arg-type]
    decoder = StreamingDecoder(codec, None, 100, LENGTH)
    decoder.push(torch.zeros(7, 3))
    with pytest.raises(ValueError, match=r"samples must be \(7, n\), got \(6, 1\)"):
        decoder.push(torch.zeros(6, 1))
    with pytest.raises(ValueError, match=r"samples after 0\.030 s have NaN"):
        decoder.push(torch.full((7, 1), torch.nan))
