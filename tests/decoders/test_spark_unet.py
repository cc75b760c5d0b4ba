"""The U-Net of SparK: what is computed in another order gives the same values, gradients and statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.codec import FeatureInfo
from isthmus.decoders import spark_unet
from isthmus.decoders.spark_unet import Densify, SparKUNet, composition_pays, up_and_convolve

PYRAMID = [FeatureInfo(12, 4), FeatureInfo(20, 8), FeatureInfo(40, 32)]  # without the scale of 16, odd channels


def _maps(height: int = 96, width: int = 64, batch: int = 2, **kwargs) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, i.channels, height // i.reduction, width // i.reduction, generator=g, **kwargs)
        for i in PYRAMID
    ]


def _visible() -> Tensor:
    """Ragged: two cells of the first picture, four of the second."""
    return torch.tensor([[[1, 0], [0, 0], [0, 1]], [[1, 1], [0, 1], [1, 0]]], dtype=torch.bool)


def _always_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spark_unet, "composition_pays", lambda _x: True)
    monkeypatch.setattr(spark_unet, "ROWS_PAY", 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_composed_kernels_equal_the_two_convolutions(size: tuple[int, int], bias: bool) -> None:
    """Values and all gradients, border included; float64, so nothing but the algebra is tested."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 6, *size), "up": (6, 8, 4, 4), "bias": (8,), "weight": (5, 8, 3, 3)}
    a = {k: torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for k, s in shapes.items()}
    if not bias:
        a["bias"] = None  # type: ignore[assignment]
    plain = F.conv2d(F.conv_transpose2d(a["x"], a["up"], a["bias"], 2, 1), a["weight"], padding=1)
    fused = up_and_convolve(a["x"], a["up"], a["bias"], a["weight"])
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    direction = torch.randn(plain.shape, generator=g, dtype=torch.float64)
    leaves = [value for value in a.values() if value is not None]
    for one, other in zip(
        torch.autograd.grad(fused, leaves, direction), torch.autograd.grad(plain, leaves, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_fused_decoder_equals_the_plain_one(norm: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _always_fuse(monkeypatch)
    torch.manual_seed(0)
    plain = SparKUNet(PYRAMID, 64, norm, fused=False).double()
    fused = SparKUNet(PYRAMID, 64, norm, fused=True).double()
    for module in plain.modules():  # statistics that are not the initial ones
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    fused.load_state_dict(plain.state_dict())
    found = []
    for decoder in (plain.train(training), fused.train(training)):
        maps = [m.requires_grad_() for m in _maps(dtype=torch.float64)]
        out = decoder(maps, {"visible": _visible()})
        out.square().sum().backward()
        found.append([out, *(m.grad for m in maps), *(p.grad for p in decoder.parameters()), *decoder.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_fused_decoder_stays_close_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the tolerance of the golden tensors, 2e-5 of the largest value."""
    _always_fuse(monkeypatch)
    torch.manual_seed(0)
    plain = SparKUNet(PYRAMID, 64, fused=False)
    fused = SparKUNet(PYRAMID, 64)
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        one, other = (decoder(_maps(), {"visible": _visible()}) for decoder in (plain, fused))
    assert float((one - other).abs().max()) < 2e-5 * float(one.abs().max())


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_fused_decoder_works_in_half_precision(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _always_fuse(monkeypatch)
    torch.manual_seed(0)
    decoder = SparKUNet(PYRAMID, 64, norm).eval()
    full = decoder(_maps(), {"visible": _visible()})
    with torch.autocast("cpu", torch.bfloat16):
        half = decoder(_maps(), {"visible": _visible()})
    half.float().square().sum().backward()
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.03 * float(full.detach().abs().max()))


def test_composition_is_chosen_where_the_batch_repays_it() -> None:
    """The published decoder at 224 px: three blocks at batch 8, four at 64, all at 512 (figures of the docstring)."""
    blocks = [(768 >> k, 7 << k) for k in range(5)]

    def composed(batch: int) -> int:
        return sum(composition_pays(torch.empty(batch, c, s, s, device="meta")) for c, s in blocks)

    assert [composed(batch) for batch in (8, 64, 512)] == [3, 4, 5]


@pytest.mark.parametrize("fused", [True, False])
def test_hidden_features_are_not_read_and_tokens_stand_in_their_place(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _always_fuse(monkeypatch)
    torch.manual_seed(0)
    neck = Densify(PYRAMID, 64, fused=fused).eval()
    maps, visible = _maps(), _visible()
    wild = []
    for m in maps:
        side = m.shape[2] // visible.shape[1]
        pixels = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
        wild.append(torch.where(pixels, m, torch.full_like(m, float("nan"))))
    for one, other in zip(neck(maps, {"visible": visible}), neck(wild, {"visible": visible}), strict=True):
        assert torch.equal(one, other)
    changed = copy.deepcopy(neck)
    changed.mask_tokens[0].data.add_(1)
    one, other = neck(maps, {"visible": visible}), changed(maps, {"visible": visible})
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_with_everything_visible_tokens_do_not_matter() -> None:
    torch.manual_seed(0)
    neck = Densify(PYRAMID, 64)
    loss = sum(level.square().sum() for level in neck(_maps()))
    loss.backward()
    assert all(token.grad is None or not token.grad.any() for token in neck.mask_tokens)
    assert all(norm.weight.grad.any() for norm in neck.norms)


def test_batch_norm_of_the_neck_sees_visible_places_only() -> None:
    torch.manual_seed(0)
    neck = Densify(PYRAMID, 64)
    maps, visible = _maps(), _visible()
    neck(maps, {"visible": visible})
    rows = maps[2].permute(0, 2, 3, 1)[visible]
    torch.testing.assert_close(neck.norms[2].running_mean, 0.1 * rows.mean(0))
    torch.testing.assert_close(neck.norms[2].running_var, 0.9 + 0.1 * rows.var(0, unbiased=True))


def test_identity_projection_where_the_width_fits() -> None:
    assert isinstance(Densify(PYRAMID, 40).projections[-1], torch.nn.Identity)
    assert not isinstance(Densify(PYRAMID, 80).projections[-1], torch.nn.Identity)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_output_stride_keeps_the_size_of_the_picture_with_fewer_blocks(stride: int) -> None:
    decoder = SparKUNet(PYRAMID, 64, output_stride=stride)
    assert len(decoder.blocks) == {1: 5, 2: 4, 4: 3}[stride]
    out = decoder(_maps(), {"visible": _visible()})
    assert out.shape == (2, 3, 96, 64)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters() if p.ndim > 1)


def test_every_scale_reaches_the_prediction() -> None:
    torch.manual_seed(0)
    for stride in (1, 4):
        decoder = SparKUNet(PYRAMID, 64, output_stride=stride).eval()
        maps = [m.requires_grad_() for m in _maps()]
        decoder(maps, {"visible": _visible()}).square().sum().backward()
        assert all(m.grad.any() for m in maps)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"feature_info": [(8, 4), (16, 12)]}, "reduction 12 is no power of two"),
        ({"feature_info": [(8, 8), (16, 4)]}, "ascend, finest level first"),
        ({"feature_info": [(8, 8), (16, 8)]}, "without repeats"),
        ({"feature_info": []}, "no levels"),
        ({"width": 40}, "multiple of 32"),
        ({"output_stride": 3}, "power of two"),
        ({"output_stride": 8}, "would leave the scale of reduction 4 unread"),
        ({"norm": "group"}, '"batch", "layer" or "none"'),
    ],
)
def test_what_cannot_be_built_is_told(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SparKUNet(**{"feature_info": PYRAMID, "width": 64, **arguments})


def test_maps_and_masks_that_do_not_fit_are_told() -> None:
    decoder = SparKUNet(PYRAMID, 64)
    with pytest.raises(ValueError, match="2 maps were given; this neck was made for 3"):
        decoder(_maps()[1:], {"visible": _visible()})
    with pytest.raises(ValueError, match="has 40 channels; 12 were expected"):
        decoder(_maps()[::-1], {"visible": _visible()})
    with pytest.raises(ValueError, match="5x2 cells does not divide a map of 24x16"):
        decoder(_maps(), {"visible": torch.ones(2, 5, 2, dtype=torch.bool)})
