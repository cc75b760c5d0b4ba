"""The MEG encoder: what mixes what, folding, and what it refuses. Parity with the published code is elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.codec import Codec
from isthmus.decoders.latent_heads import LatentHeads
from isthmus.encoders.signals.meg_conv import MEGConv, from_official
from isthmus.encoders.signals.sensor_attention import SpatialAttention, drop_channels, fourier, missing, usage_penalty

SMALL = {"attention": 6, "position_dim": 18, "mix": 5, "hidden": 8, "out_channels": 7}


def inputs(batch: int = 3, sensors: int = 9, length: int = 16) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, sensors, length, generator=g)
    places = torch.rand(sensors, 2, generator=g)
    return x, {"positions": places, "subject": torch.arange(batch) % 2}


def test_dilations_double_and_start_again_and_the_first_layer_has_no_skip() -> None:
    encoder = MEGConv(subjects=2, **SMALL, depth=7, dilation_period=5)
    convs = [layer.body[0] for layer in encoder.layers]
    assert [c.dilation[0] for c in convs] == [1, 2, 4, 8, 16, 1, 2]
    assert [layer.skip for layer in encoder.layers] == [False] + [True] * 6
    gates = [not isinstance(layer.gate, nn.Identity) for layer in encoder.layers]
    assert gates == [False, True, False, True, False, True, False]


def test_the_window_keeps_its_length_and_samples_do_not_mix() -> None:
    x, known = inputs()
    encoder = MEGConv(subjects=2, **SMALL).eval()
    (tokens,) = encoder(x, known)
    assert tokens.shape == (3, 16, 7)
    alone = encoder(x[1:2], {**known, "subject": known["subject"][1:2]})[0]
    torch.testing.assert_close(tokens[1:2], alone)


def test_the_order_of_sensors_does_not_matter_and_missing_ones_are_not_read() -> None:
    x, known = inputs()
    encoder = MEGConv(subjects=2, **SMALL).eval()
    out = encoder(x, known)[0]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    turned = encoder(x[:, order], {**known, "positions": known["positions"][order]})[0]
    torch.testing.assert_close(out, turned)
    padded = torch.cat([x, torch.full((3, 2, 16), 1e3)], 1)
    places = torch.cat([known["positions"], torch.full((2, 2), -0.1)])
    torch.testing.assert_close(encoder(padded, {**known, "positions": places})[0], out)


def test_recordings_of_different_layouts_share_a_batch() -> None:
    x, known = inputs(batch=4)
    encoder = MEGConv(subjects=2, **SMALL).eval()
    other = known["positions"].flip(0)
    mixed = torch.stack([known["positions"], other, other, known["positions"]])
    together = encoder(x, {**known, "positions": mixed})[0]
    for i in range(4):
        one = {"positions": mixed[i], "subject": known["subject"][i : i + 1]}
        torch.testing.assert_close(together[i : i + 1], encoder(x[i : i + 1], one)[0])


def test_folded_spatial_part_is_exact() -> None:
    x, known = inputs()
    for options in ({}, {"subject_layer": None}, {"mix_depth": 2, "mix_activation": True}):
        encoder = MEGConv(subjects=2, **SMALL, **options).eval()  # type: ignore[arg-type]
        if options.get("mix_activation"):
            with pytest.raises(ValueError, match="without activations"):
                encoder.fold(known["positions"])
            continue
        weight, bias = encoder.fold(known["positions"], subject=1)
        folded = encoder.temporal(weight @ x + bias[:, None], torch.ones(3, dtype=torch.int64))
        whole = encoder.trunk(x, {**known, "subject": torch.ones(3, dtype=torch.int64)})
        torch.testing.assert_close(folded, whole)
        with pytest.raises(ValueError, match="evaluation mode"):
            encoder.train().fold(known["positions"])


def test_what_the_condition_leaves_out_is_filled_in_or_asked_for() -> None:
    x, known = inputs()
    own = MEGConv(layout=known["positions"].tolist(), **SMALL).eval()
    torch.testing.assert_close(own(x)[0], own(x, {"positions": known["positions"]})[0])
    with pytest.raises(ValueError, match="needs the condition positions"):
        MEGConv(**SMALL)(x)
    with pytest.raises(ValueError, match="needs the condition subject"):
        MEGConv(subjects=2, **SMALL)(x, {"positions": known["positions"]})
    anybody = MEGConv(subjects=2, subject_dropout=0.2, **SMALL).eval()
    strangers = {**known, "subject": torch.full((3,), -1)}
    torch.testing.assert_close(anybody(x, {"positions": known["positions"]})[0], anybody(x, strangers)[0])


def test_wrong_inputs_are_refused_with_a_reason() -> None:
    x, known = inputs()
    for options, told in (
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"position_dim": 20}, r"2·n\^2 numbers"),
        ({"attention": 0}, "in_channels given where there is no attention"),
        ({"subject_embedding": 3, "subject_dropout": 0.1}, "subject_dropout must be 0"),
    ):
        with pytest.raises(ValueError, match=told):
            MEGConv(**{**SMALL, **options})  # type: ignore[arg-type]
    encoder = MEGConv(subjects=2, **SMALL)
    broken = x.clone()
    broken[1, 4, 3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite samples in channels \[4\]"):
        encoder(broken, known)
    with pytest.raises(ValueError, match="subject 7 has no weights"):
        encoder(x, {**known, "subject": torch.tensor([0, 1, 7])})
    with pytest.raises(ValueError, match="positions of 8 sensors, and the signal has 9"):
        encoder(x, {**known, "positions": known["positions"][:8]})
    with pytest.raises(ValueError, match="no sensor with a position"):
        encoder(x, {**known, "positions": torch.full((9, 2), -0.1)})
    with pytest.raises(ValueError, match=r"reads \(B, C, T\)"):
        encoder(x[0], known)
    with pytest.raises(ValueError, match="windows of 12 samples, got 16"):
        LatentHeads(7, 4, length=12)(encoder(x, known))


def test_a_disc_of_sensors_is_banned_in_training_and_only_there() -> None:
    x, known = inputs()
    attention = SpatialAttention(4, 18, dropout=0.3)
    centre = known["positions"][2]
    banned = torch.linalg.vector_norm(known["positions"] - centre, dim=-1) <= 0.3
    weights = attention.train().weights(known["positions"], centre=centre)
    assert weights[:, banned].abs().sum() == 0
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert (attention.eval().weights(known["positions"], centre=centre) > 0).all()
    everything = SpatialAttention(4, 18, dropout=5.0).train().weights(known["positions"], centre=centre)
    assert (everything > 0).all(), "a recording whose sensors all lie in the disc keeps them"
    zeroed = drop_channels(x, known["positions"], centre, 0.3)
    assert torch.equal(zeroed[:, ~banned], x[:, ~banned])
    assert zeroed[:, banned].abs().sum() == 0
    penalty = usage_penalty(attention.weights(known["positions"]), 0.5)
    assert float(penalty.detach()) == pytest.approx(0.5), "the published penalty is a constant"


def test_heads_of_each_subject_and_places_in_space() -> None:
    x, known = inputs()
    attention = SpatialAttention(4, 18, subjects=2)
    out = attention(x, known)
    own = SpatialAttention(4, 18)
    own.heads.data = attention.heads.data[1]
    torch.testing.assert_close(own.eval()(x[1:2], known), attention.eval()(x, known)[1:2])
    assert out.shape == (3, 4, 16)
    with pytest.raises(ValueError, match="needs the condition subject"):
        attention(x, {"positions": known["positions"]})
    with pytest.raises(ValueError, match="heads for subjects 0 to 1"):
        attention(x, {**known, "subject": torch.tensor([0, 1, 2])})
    space = fourier(torch.rand(5, 3), 16)
    assert space.shape == (5, 16)
    with pytest.raises(ValueError, match="must have 2 coordinates"):
        own(x, {"positions": torch.rand(9, 3)})
    assert missing(torch.tensor([[-0.1, -0.1], [-0.1, 0.5]])).tolist() == [True, False]


def test_fourier_phases_are_those_of_the_paper() -> None:
    place = torch.tensor([[0.3, 0.7]])
    found = fourier(place, 8)[0]
    phases = [2 * torch.pi * (i * 0.5 + j * 0.9) / 1.4 for i in (0, 1) for j in (0, 1)]
    wanted = [torch.cos(torch.tensor(p)) for p in phases] + [torch.sin(torch.tensor(p)) for p in phases]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_half_precision_is_finite_and_a_batch_of_one_works() -> None:
    x, known = inputs(batch=1)
    encoder = MEGConv(subjects=2, **SMALL).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(encoder(x, known)[0]).all()
    assert torch.isfinite(encoder.bfloat16()(x.bfloat16(), known)[0]).all()


def test_a_saved_codec_brings_its_layout_along(tmp_path) -> None:
    x, known = inputs()
    codec = Codec(
        MEGConv(layout=known["positions"].tolist(), **SMALL), decoder=LatentHeads(7, 4, length=16, two=True, hidden=5)
    ).eval()
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    for a, b in zip(codec(x).prediction, again(x).prediction, strict=True):
        assert torch.equal(a, b)


def test_foreign_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder\.weight belongs to no published MEG trunk"):
        from_official({"decoder.weight": torch.zeros(1)})
