"""Rotation prediction: the copies are exact, the labels are right, and it stands on any encoder."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.codec import Objective
from isthmus.encoders.backbone import Backbone
from isthmus.objectives.rotation import Rotation, centre_circle, rotate, rotate_all
from isthmus.objectives.together import Together


def _images(batch: int = 3, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


class _Corners(nn.Module):
    """Knows the answer for images that are bright in their top left corner: where the bright corner went."""

    def forward(self, x: Tensor) -> Tensor:
        return 100 * torch.stack([x[:, 0, 0, 0], x[:, 0, -1, 0], x[:, 0, -1, -1], x[:, 0, 0, -1]], 1)


def test_rotations_are_counter_clockwise_like_numpy() -> None:
    image = _images(1)[0]
    for label, degrees in enumerate((0, 90, 180, 270)):
        expected = np.rot90(image.permute(1, 2, 0).numpy(), k=label)
        assert np.array_equal(rotate(image, degrees).permute(1, 2, 0).numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_rotations_form_the_cyclic_group(batch: int, size: int, a: int, b: int) -> None:
    images = _images(batch, size, seed=size)
    assert torch.equal(rotate(rotate(images, 90 * a), 90 * b), rotate(images, 90 * ((a + b) % 4)))
    four = images
    for _ in range(4):
        four = rotate(four, 90)
    assert torch.equal(four, images)


@pytest.mark.parametrize("rotations", [(0, 90, 180, 270), (0, 180), (90, 270)])
def test_copies_are_image_major_with_labels_in_the_order_of_the_rotations(rotations: tuple[int, ...]) -> None:
    images = _images(5)
    copies, target = Rotation(_Corners(), nn.Identity(), rotations).copies(images)
    assert target.dtype == torch.int64
    assert target.tolist() == list(range(len(rotations))) * 5
    for i, image in enumerate(images):
        for label, degrees in enumerate(rotations):
            expected = torch.rot90(image, degrees // 90, (1, 2))
            assert torch.equal(copies[i * len(rotations) + label], expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_copies_keep_dtype_layout_and_values(dtype: torch.dtype, layout: torch.memory_format) -> None:
    images = (255 * _images(4, 6)).to(dtype)
    copies = rotate_all(images.contiguous(memory_format=layout))
    assert copies.dtype == dtype
    assert copies.is_contiguous(memory_format=layout)
    assert torch.equal(copies.contiguous(), rotate_all(images))


def test_batches_larger_than_the_cache_are_turned_whole() -> None:
    images = torch.rand(7, 3, 256, 256)  # 786 kB each: two at a time
    expected = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
    assert torch.equal(rotate_all(images), expected)
    assert rotate_all(images[:0]).shape == (0, 3, 256, 256)


def test_gradient_flows_back_through_all_copies() -> None:
    """Discriminators use the objective on generated images."""
    images = _images().requires_grad_()
    (rotate_all(images) * 2).sum().backward()
    assert torch.equal(images.grad, torch.full_like(images, 8.0))


def test_eight_rotations_by_45_degrees_are_exact_at_every_second_and_blank_their_corners_otherwise() -> None:
    images = _images(2, 16) + 1
    copies = rotate_all(images, range(0, 360, 45)).unflatten(0, (2, 8))
    assert torch.equal(copies[:, ::2].flatten(0, 1), rotate_all(images))
    assert (copies[:, 1::2, :, 0, 0] == 0).all()
    inside = centre_circle(16, 16)
    assert (copies[:, 1::2][..., inside] > 0).all(), "the circle keeps only what every rotation fills"
    # Two turns by 45 degrees are one by 90, up to two interpolations; the other direction is not.
    smooth = nn.functional.avg_pool2d(torch.rand(1, 3, 72, 72, generator=torch.Generator().manual_seed(1)), 9, 1)
    twice = rotate(rotate(smooth, 45), 45)
    middle = centre_circle(64, 64)
    assert (twice - rotate(smooth, 90))[..., middle].abs().mean() < (twice - rotate(smooth, 270))[
        ..., middle
    ].abs().mean() / 5


def test_circle_hides_corners_and_is_the_same_in_every_rotation() -> None:
    for size in (7, 8, 32):
        inside = centre_circle(size, size)
        assert all(torch.equal(inside, torch.rot90(inside, k)) for k in range(4))
        assert not inside[0, 0]
        assert inside[size // 2].all()
    marked = torch.zeros(4, 1, 8, 8)
    marked[:, :, 0, 0] = 1
    task = {"image": marked}
    seen = Rotation(_Corners(), nn.Identity())(task, torch.Generator())
    hidden = Rotation(_Corners(), nn.Identity(), circle=True)(task, torch.Generator())
    assert seen.metrics["accuracy"] == 1
    assert seen.loss < 1e-6
    assert hidden.metrics["accuracy"] == 0.25, "with the corners gone all rotations look alike"


def test_loss_is_the_mean_cross_entropy_over_all_copies_times_the_weight() -> None:
    objective = Rotation(Backbone("resnet10t"), weight=0.25).eval()
    batch = {"image": _images(3, 32)}
    result = objective(batch, torch.Generator())
    logits, target = result.outputs["logits"], result.outputs["target"]
    assert logits.shape == (12, 4)
    by_hand = torch.stack([-logits[i].log_softmax(0)[target[i]] for i in range(12)]).mean()
    torch.testing.assert_close(result.loss, 0.25 * by_hand)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("nin_cifar_tiny", {}),
        ("resnet10t", {}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 48, "img_size": 32}),
    ],
)
def test_trains_any_timm_backbone_with_the_default_head(name: str, kwargs: dict) -> None:
    objective = Rotation(Backbone(name, **kwargs))
    assert isinstance(objective, Objective)
    objective({"image": _images(2, 32)}, torch.Generator()).loss.backward()
    assert all(p.grad is not None for p in objective.head.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.encoder.parameters())


def test_trains_a_network_s_own_classifier_and_takes_single_gray_images() -> None:
    network = timm.create_model("nin_cifar_tiny", in_chans=1, num_classes=2)
    result = Rotation(network, nn.Identity(), (90, 270))({"image": _images(1, 32, channels=1)}, torch.Generator())
    result.loss.backward()
    assert network.get_classifier().weight.grad.abs().sum() > 0


def test_a_few_steps_learn_the_rotation_of_images_that_are_bright_on_top() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(1, -1, 16)[None, None, :, None]
    images = ramp.expand(8, 3, 16, 16) + 0.1 * torch.randn(8, 3, 16, 16)
    objective = Rotation(Backbone("nin_cifar_tiny"))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        result = objective({"image": images}, torch.Generator())
        result.loss.backward()
        optimizer.step()
    assert result.metrics["accuracy"] > 0.95


def test_telling_the_rotation_of_a_turned_image_turns_the_answer() -> None:
    torch.manual_seed(0)
    objective = Rotation(Backbone("nin_cifar_tiny")).eval()
    images = _images(3, 32)
    told = objective.tell(images)
    torch.testing.assert_close(told.sum(1), torch.ones(3))
    for k in range(4):
        torch.testing.assert_close(
            objective.tell(torch.rot90(images, k, (2, 3))), told.roll(k, 1), rtol=1e-4, atol=1e-6
        )
    bright = torch.zeros(1, 1, 8, 8)
    bright[:, :, 0, -1] = 1  # top left, turned clockwise
    assert Rotation(_Corners(), nn.Identity()).tell(bright).argmax() == 3
    pair = Rotation(_Corners(), nn.Identity(), (0, 90, 180, 271))  # no group: one look
    torch.testing.assert_close(pair.tell(bright), pair.logits(bright).softmax(1))


def test_stands_beside_another_objective() -> None:
    encoder = Backbone("nin_cifar_tiny")
    both = Together({"rotation": Rotation(encoder, weight=0.5), "halves": Rotation(encoder, rotations=(0, 180))}).eval()
    batch = {"image": _images(2, 32)}
    result = both(batch, torch.Generator())
    alone = [objective(batch, torch.Generator()) for objective in both.objectives.values()]
    torch.testing.assert_close(result.loss, alone[0].loss + alone[1].loss)
    assert set(result.metrics) == {"rotation_accuracy", "halves_accuracy", "rotation_loss", "halves_loss"}
    assert len(list(both.parameters())) == len(list(encoder.parameters())) + 4, "the encoder is shared"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotations": (0,)}, "at least two"),
        ({"rotations": (0, 90, 360)}, "at least two different"),
        ({"encoder": nn.Identity()}, "does not describe a pyramid"),
    ],
)
def test_refuses_what_cannot_be_learnt(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rotation(**{"encoder": Backbone("nin_cifar_tiny"), **arguments})


def test_refuses_images_and_heads_that_do_not_fit() -> None:
    wide = torch.rand(2, 3, 8, 10)
    with pytest.raises(ValueError, match="8×10 pixels"):
        rotate_all(wide)
    assert rotate_all(wide, (0, 180)).shape == (4, 3, 8, 10)
    with pytest.raises(ValueError, match="must be"):
        rotate_all(wide[0])
    with pytest.raises(ValueError, match="4 logits"):
        Rotation(Backbone("nin_cifar_tiny"), nn.Sequential())({"image": _images(2, 32)}, torch.Generator())
    with pytest.raises(ValueError, match=r"gave \(16, 10\)"):
        Rotation(timm.create_model("nin_cifar_tiny", num_classes=10), nn.Identity())(
            {"image": _images(4, 32)}, torch.Generator()
        )
