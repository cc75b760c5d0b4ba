"""Every part that tests/contracts.py lists meets the contract of its room, alone and inside a Codec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.codec import (
    Bottleneck,
    Code,
    Codec,
    Decoder,
    Encoder,
    FeatureInfo,
    Neck,
    build,
    call_part,
    conditions_of,
    spec_of,
)
from tests.contracts import BOTTLENECKS, DECODERS, ENCODERS, NECKS


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_returns_the_pyramid_it_describes(name: str) -> None:
    make, feed = ENCODERS[name]
    encoder, x = make().eval(), feed(_seeded())
    assert isinstance(encoder, Encoder)
    assert isinstance(x, Tensor)
    with torch.no_grad():
        features = call_part(encoder, x)
    assert isinstance(features, list)
    assert len(features) == len(encoder.feature_info)
    for level, info in zip(features, encoder.feature_info, strict=True):
        assert isinstance(info, FeatureInfo)
        assert info.format in ("NCHW", "NTC")
        assert level.shape[0] == x.shape[0]
        assert level.shape[1 if info.format == "NCHW" else 2] == info.channels
        assert torch.isfinite(level).all()
        if info.format == "NCHW":
            for side, given in zip(level.shape[2:], x.shape[2:], strict=True):
                assert abs(side - given / info.reduction) <= 1.0
    reductions = [info.reduction for info in encoder.feature_info]
    assert reductions == sorted(reductions), "finest level first"


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_learns_and_does_not_mix_samples_in_eval(name: str) -> None:
    make, feed = ENCODERS[name]
    encoder, x = make(), feed(_seeded())
    assert isinstance(x, Tensor)
    sum(level.square().mean() for level in encoder(x)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    encoder.eval()
    with torch.no_grad():
        together, alone = encoder(x), encoder(x[:1])
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[:1], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottleneck_returns_a_code(name: str) -> None:
    make, feed = BOTTLENECKS[name]
    bottleneck, features = make(), feed(_seeded())
    assert isinstance(bottleneck, Bottleneck)
    assert isinstance(features, list)
    code = call_part(bottleneck, features)
    batch = features[0].shape[0]
    assert isinstance(code, Code)
    assert all(level.shape[0] == batch and torch.isfinite(level).all() for level in code.features)
    assert code.loss.ndim == 0
    assert torch.isfinite(code.loss)
    if code.indices is not None:
        assert code.indices.dtype == torch.int64
        assert code.indices.shape[0] == batch
        assert 0 <= int(code.indices.min()) <= int(code.indices.max()) < bottleneck.num_codes
    if code.bits is not None:
        assert code.bits.shape == (batch,)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_predicts_for_every_sample(name: str) -> None:
    make, feed = DECODERS[name]
    decoder, features = make().eval(), feed(_seeded())
    assert isinstance(decoder, Decoder)
    assert isinstance(features, list)
    with torch.no_grad():
        prediction = call_part(decoder, features)
    first = prediction if isinstance(prediction, Tensor) else prediction[0]
    assert len(first) == features[0].shape[0]


@pytest.mark.parametrize("name", NECKS)
def test_neck_returns_the_pyramid_it_describes(name: str) -> None:
    make, feed = NECKS[name]
    neck, features = make().eval(), feed(_seeded())
    assert isinstance(neck, Neck)
    assert isinstance(features, list)
    with torch.no_grad():
        together, alone = neck(features), neck([level[:1] for level in features])
    assert [level.shape[1] for level in together] == [info.channels for info in neck.feature_info]
    reductions = [info.reduction for info in neck.feature_info]
    assert reductions == sorted(reductions), "finest level first"
    for many, one in zip(together, alone, strict=True):
        assert torch.isfinite(many).all()
        torch.testing.assert_close(many[:1], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*ENCODERS, *BOTTLENECKS, *DECODERS, *NECKS])
def test_part_is_rebuilt_from_its_description(name: str, tmp_path: Path) -> None:
    """A Codec made of it saves, and the loaded one computes the same."""
    make, feed = ({**ENCODERS, **BOTTLENECKS, **DECODERS, **NECKS})[name]
    part, x = make().eval(), feed(_seeded())
    again = build(spec_of(part)).eval()
    assert [(n, p.shape) for n, p in again.state_dict().items()] == [(n, p.shape) for n, p in part.state_dict().items()]
    assert conditions_of(again) == conditions_of(part)
    if name in ENCODERS:
        Codec(part).save_pretrained(tmp_path)
        with torch.no_grad():
            for a, b in zip(Codec(part)(x).prediction, Codec.from_pretrained(tmp_path)(x).prediction, strict=True):
                assert torch.equal(a, b)
