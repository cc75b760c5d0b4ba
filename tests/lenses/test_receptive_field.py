"""The receptive field of networks whose field is known, and everything that could break a measurement."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from isthmus.lenses.receptive_field import (
    area_ratio,
    contribution,
    effective_receptive_field,
    normalise,
    receptive_field,
    rms_radius,
)


def box(kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution of ones: its receptive field is a square of equal contributions."""
    conv = nn.Conv2d(3, 2, kernel, stride, kernel // 2, bias=False)
    nn.init.ones_(conv.weight)
    return nn.Sequential(conv)


def images(count: int = 2, height: int = 33, width: int = 33) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) + 0.1


def test_field_of_one_convolution_is_its_kernel() -> None:
    field = receptive_field(box(7), images())
    assert field.images == 2
    square = torch.zeros(33, 33)
    square[13:20, 13:20] = 6  # 3 input channels, 2 output channels
    assert torch.equal(field.map, square)
    side, ratio = field.area_ratio((0.2, 0.99), "raw")
    assert side.tolist() == [5, 7]
    assert ratio.tolist() == pytest.approx([25 / 33**2, 49 / 33**2])
    assert field.rms_radius == pytest.approx((2 * (9 + 4 + 1) * 2 / 7) ** 0.5)


def test_signs_are_clipped_before_channels_are_summed() -> None:
    conv = nn.Conv2d(2, 1, 1, bias=False)
    conv.weight.data.copy_(torch.tensor([3.0, -1.0]).view(1, 2, 1, 1))
    x = torch.ones(1, 2, 5, 5)
    assert float(effective_receptive_field(conv, x)[2, 2]) == 3


def test_squares_are_those_of_a_search_by_hand() -> None:
    """Side 2i + 1 from i = 1, strictly more than the share, and nothing beyond min(H, W) // 2 - 1."""
    m = torch.rand(14, 20, generator=torch.Generator().manual_seed(1)) + 0.01
    a = normalise(m).double()
    for threshold in (0.01, 0.2, 0.5, 0.7, 0.99):
        expected = -1
        for i in range(1, 14 // 2):
            if a[7 - i : 8 + i, 10 - i : 11 + i].sum() / a.sum() > threshold:
                expected = 2 * i + 1
                break
        side, ratio = area_ratio(m, (threshold,))
        assert int(side) == expected
        assert float(ratio) == pytest.approx(expected**2 / 280 if expected > 0 else -1)


def test_scales() -> None:
    m = torch.tensor([[0.0, 9.0], [99.0, 999.0]])
    torch.testing.assert_close(normalise(m), torch.tensor([[0, 1 / 3], [2 / 3, 1]]))
    assert float(normalise(m, "raw")[1, 0]) == pytest.approx(99 / 999)
    torch.testing.assert_close(normalise(m, "relative"), normalise(1e-6 * m, "relative"))
    with pytest.raises(ValueError, match="scale"):
        normalise(m, "log")  # type: ignore[arg-type]
    for bad in (torch.zeros(4, 4), torch.full((4, 4), float("nan")), torch.ones(4)):
        with pytest.raises(ValueError, match="finite and positive"):
            normalise(bad)


def test_rms_radius_of_a_ring() -> None:
    m = torch.zeros(21, 21)
    for y, x in ((10, 15), (10, 5), (5, 10), (15, 10)):
        m[y, x] = 2
    assert rms_radius(m) == pytest.approx(5)


class Picky(nn.Module):
    """NaN gradients for images marked 1, a dead centre for images marked 2."""

    def forward(self, x: Tensor) -> Tensor:
        mark = float(x.detach()[0, 0, 0, 0])
        return x * (float("nan") if mark == 1 else -1.0 if mark == 2 else 1.0)


def test_bad_images_are_skipped_and_named() -> None:
    x = images(4)
    x[:, 0, 0, 0] = torch.tensor([1.0, 0.5, 2.0, 0.5])
    field = receptive_field(Picky(), x)
    assert (field.images, field.skipped) == (2, (0, 2))
    with pytest.raises(ValueError, match="all 1 images are zero or not finite"):
        receptive_field(Picky(), x[:1])
    with pytest.raises(ValueError, match="no images"):
        receptive_field(Picky(), x[:0])


def test_model_is_measured_in_eval_mode_and_given_back_as_it_was() -> None:
    net = nn.Sequential(*box(3), nn.BatchNorm2d(2), nn.Dropout(0.9), nn.BatchNorm2d(2))
    net.train()
    net[3].eval()
    mean = net[1].running_mean.clone()
    first, second = (effective_receptive_field(net, images()) for _ in range(2))
    assert torch.equal(first, second)
    assert [m.training for m in net] == [True, True, True, False]
    assert torch.equal(net[1].running_mean, mean)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="is that of a map"):
        receptive_field(nn.Sequential(net, nn.Flatten()), images())
    assert net.training


def test_inference_mode_and_no_grad_outside_do_no_harm() -> None:
    net, x = box(3), images()
    expected = effective_receptive_field(net, x)
    with torch.no_grad():
        assert torch.equal(effective_receptive_field(net, x), expected)
    with torch.inference_mode():
        assert torch.equal(effective_receptive_field(net, x), expected)
        born_inside = box(3)
    with pytest.raises(ValueError, match="inference_mode"):
        effective_receptive_field(born_inside, x)


def test_gradients_cut_inside_are_told() -> None:
    class Cut(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    with pytest.raises(ValueError, match="no gradient reaches the input"):
        receptive_field(Cut(), images())


def test_timm_models_are_measured_before_head_and_pooling_and_without_checkpointing() -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8))
    x = images(1, 64, 96)
    expected = effective_receptive_field(model, x)
    model.set_grad_checkpointing(True)
    assert torch.equal(effective_receptive_field(model, x), expected)
    assert model.stages[0].grad_checkpointing
    torch.testing.assert_close(expected, contribution(model.eval(), x[0], lambda x: model.stages(model.stem(x))))


def test_transformers_are_measured_on_their_map_of_tokens() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, img_size=48)
    field = receptive_field(model, images(1, 48, 48))
    assert field.map.shape == (48, 48)
    assert bool((field.map > 0).any())


def test_bytes_and_batches_are_no_images() -> None:
    with pytest.raises(ValueError, match=r"of real numbers, normalised .*, not \(3, 33, 33\) of torch\.uint8"):
        receptive_field(box(3), images().byte())
    with pytest.raises(ValueError, match=r"an image is \(C, H, W\) .*, not \(2, 3, 33, 33\)"):
        receptive_field(box(3), [images()])


def test_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="image 1 is"):
        receptive_field(box(3), [images(1)[0], images(1, 20, 20)[0]])


def test_figure_shows_map_and_shares() -> None:
    figure = receptive_field(box(7), images()).figure()
    assert len(figure.axes) == 2
    assert len(figure.axes[1].lines) == 3
