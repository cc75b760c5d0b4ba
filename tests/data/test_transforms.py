"""Augmentation: the picture, its mask and its boxes move together, whatever the device count."""

import numpy as np
import pytest
import torch

from isthmus.data.transforms import (
    CenterCrop,
    ColorJitter,
    Compose,
    Flip,
    Mixup,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    divided,
)
from isthmus.layers.random import ShardedGenerator


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(count=6, height=40, width=60):
    """Black pictures with one white rectangle each, which its mask and its only box tell too."""
    image, mask, boxes = torch.zeros(count, 3, height, width), torch.zeros(count, height, width).long(), []
    for i in range(count):
        left, top, right, bottom = 20 + i, 8 + i, 36 + 2 * i, 24 + i
        image[i, :, top:bottom, left:right] = 1
        mask[i, top:bottom, left:right] = 1
        boxes.append(torch.tensor([[left, top, right, bottom]], dtype=torch.float32))
    return {"image": image, "mask": mask, "boxes": boxes, "labels": [torch.tensor([i]) for i in range(count)]}


@pytest.mark.parametrize(
    "transform",
    [
        Flip(1.0),
        Flip(0.5),
        CenterCrop(32),
        CenterCrop((64, 64)),
        Resize(80),
        Resize((20, 90)),
        RandomCrop(32, padding=4),
        RandomResizedCrop(48, scale=(0.3, 1.0)),
        Compose([RandomResizedCrop(32, scale=(0.5, 1.0)), Flip()]),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_image_mask_and_boxes_move_together(transform):
    batch = transform(scene(), generator())
    seen = 0
    for image, mask, boxes, labels in zip(*(batch[k] for k in ("image", "mask", "boxes", "labels")), strict=True):
        assert image.shape[1:] == mask.shape
        assert len(boxes) == len(labels)
        assert ((image[0] > 0.5) != mask.bool()).float().mean() < 0.06  # edges that fall between pixels
        if len(boxes):
            seen += 1
            left, top, right, bottom = boxes[0].tolist()
            y, x = torch.nonzero(mask, as_tuple=True)
            edges = torch.tensor([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])
            assert (edges - torch.tensor([left, top, right, bottom])).abs().max() <= 2
        else:
            assert mask.sum() == 0
    assert seen >= 3


def test_a_box_outside_the_crop_is_dropped_with_its_label():
    batch = scene(1)
    batch["boxes"] = [torch.tensor([[0.0, 0.0, 4.0, 4.0], [20.0, 10.0, 40.0, 30.0]])]
    batch["labels"] = [torch.tensor([7, 8])]
    out = CenterCrop(20)(batch, generator())
    assert out["labels"][0].tolist() == [8]
    assert out["boxes"][0].tolist() == [[0, 0, 20, 20]]


@pytest.mark.parametrize("transform", [Flip(0.5), CenterCrop(24), RandomCrop(32, 4), RandomResizedCrop(24)], ids=repr)
def test_planes_of_objects_and_depth_move_like_the_mask(transform):
    batch = scene()
    batch["masks"] = [mask[None] == 1 for mask in batch["mask"]]
    batch["depth"] = batch["mask"] * 7
    out = transform(batch, generator())
    assert torch.equal(out["depth"], out["mask"] * 7)
    for masks, mask, boxes in zip(out["masks"], out["mask"], out["boxes"], strict=True):
        assert masks.dtype == torch.bool
        assert len(masks) == len(boxes)
        assert torch.equal(masks.any(0), mask == 1)


def test_flip_is_its_own_inverse_and_takes_about_its_share():
    image = torch.rand(400, 3, 4, 6)
    twice = Flip(1.0)(Flip(1.0)({"image": image}, generator()), generator())["image"]
    assert torch.equal(twice, image)
    flipped = (Flip(0.25)({"image": image}, generator())["image"] != image).flatten(1).any(1).sum()
    assert 60 < flipped < 140


def test_random_crop_shows_every_place_and_pads_with_zeros():
    image = torch.arange(1, 26, dtype=torch.float32).view(1, 1, 5, 5).repeat(2000, 1, 1, 1)
    out = RandomCrop(5, padding=1)({"image": image}, generator())["image"][:, 0]
    kinds = {tuple(each.flatten().tolist()) for each in out}
    assert len(kinds) == 9
    assert torch.tensor(sorted(kinds)[0]).view(5, 5)[0].tolist() == [0] * 5


def test_random_resized_crop_keeps_to_its_scale_and_ratio():
    crop = RandomResizedCrop(32, scale=(0.2, 0.5), ratio=(0.5, 2.0))
    top, left, height, width = crop.windows(4000, 300, 400, generator()).unbind(1)
    share = height * width / (300 * 400)
    assert 0.195 < share.min() < 0.25
    assert 0.45 < share.max() < 0.505
    ratio = width / height
    assert ratio.min() > 0.49
    assert ratio.max() < 2.03
    assert abs(ratio.log().mean()) < 0.05
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    assert len(top.unique()) > 100


def test_a_ratio_that_never_fits_gives_the_largest_middle_window():
    windows = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0)).windows(3, 20, 50, generator())
    assert windows.tolist() == [[0, 15, 20, 20]] * 3


def test_a_crop_of_everything_resizes_like_torchvision():
    from torchvision.transforms.v2 import functional

    image = torch.rand(2, 3, 50, 40, generator=generator())
    ours = RandomResizedCrop(24, scale=(1.0, 1.0), ratio=(0.8, 0.8))({"image": image}, generator())["image"]
    theirs = functional.resize(
        image, [24, 24], interpolation=functional.InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 1)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_bytes_stay_bytes_and_agree_with_floats():
    coarse = torch.rand(4, 3, 5, 5, generator=generator()) * 180 + 40  # smooth: 8-bit bicubic cuts what overshoots
    image = torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bilinear").round().to(torch.uint8)
    for transform in (RandomResizedCrop(24), CenterCrop(30), RandomCrop(32, 2), Flip(), ColorJitter(0.4, 0.4, 0.4)):
        small = transform({"image": image}, generator(1))["image"]
        large = transform({"image": image.float() / 255}, generator(1))["image"]
        assert small.dtype == torch.uint8
        assert (small.float() / 255 - large).abs().max() < 0.012


@pytest.mark.parametrize(
    "transform",
    [RandomResizedCrop(16), RandomCrop(20, 2), Flip(), ColorJitter(0.4, 0.4, 0.4), Mixup(5), Mixup(5, mixup=0)],
    ids=repr,
)
def test_two_devices_together_see_what_one_sees(transform):
    batch = {"image": torch.rand(12, 3, 24, 24, generator=generator()), "label": torch.arange(12) % 5}
    whole = transform(batch, ShardedGenerator(1, "x"))
    halves = [
        transform({k: v[6 * r : 6 * r + 6] for k, v in batch.items()}, ShardedGenerator(1, "x", rank=r, world=2))
        for r in range(2)
    ]
    for key in whole:
        assert torch.equal(whole[key], torch.cat([half[key] for half in halves]))


def test_color_jitter_of_nothing_changes_nothing_and_of_something_stays_in_range():
    image = torch.rand(8, 3, 6, 6, generator=generator())
    assert torch.allclose(ColorJitter()({"image": image}, generator())["image"], image, atol=1e-6)
    out = ColorJitter(0.8, 0.8, 0.8)({"image": image}, generator())["image"]
    assert 0 <= out.min() <= out.max() <= 1
    assert not torch.allclose(out[0], image[0], atol=0.01)


def test_saturation_reaches_from_grey_to_double():
    image = torch.rand(2000, 3, 1, 1, generator=generator())
    jittered = ColorJitter(saturation=1.0)({"image": image}, generator())["image"]
    spread = jittered.std(dim=1) / image.std(dim=1)
    assert spread.min() < 0.05  # factors fall anywhere between grey and double
    assert 0.8 < spread.mean() < 1.1


def test_normalize_gives_the_statistics_asked_for():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = torch.tensor(mean).view(3, 1, 1) + torch.tensor(std).view(3, 1, 1) * torch.ones(2, 3, 4, 4)
    assert torch.allclose(Normalize(mean, std)({"image": pixels}, generator())["image"], torch.ones(2, 3, 4, 4))


def test_mixup_labels_tell_how_much_of_each_picture_is_there():
    image = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 20, 20).contiguous()
    batch = {"image": image, "label": torch.arange(8)}
    for mix in (Mixup(8, cutmix=0, smoothing=0), Mixup(8, mixup=0, smoothing=0), Mixup(8, smoothing=0)):
        out = mix(batch, generator(3))
        expected = (out["label"] * torch.arange(8.0)).sum(1)
        assert torch.allclose(out["image"].mean(dim=(1, 2, 3)), expected, atol=1e-4)
        assert torch.allclose(out["label"].sum(1), torch.ones(8))
        partners = out["label"].topk(2).indices.sort(1).values
        assert all(a // 2 == b // 2 for a, b in partners.tolist())


def test_mixup_smooths_labels_and_asks_for_pairs():
    batch = {"image": torch.rand(4, 3, 4, 4), "label": torch.tensor([0, 1, 2, 3])}
    plain = Mixup(4, mixup=0, cutmix=0, smoothing=0.1)(batch, generator())
    assert torch.allclose(plain["label"].diagonal(), torch.full((4,), 0.925))
    assert torch.allclose(plain["label"].sum(1), torch.ones(4))
    with pytest.raises(ValueError, match="even batch"):
        Mixup(4)({"image": torch.rand(3, 3, 4, 4), "label": torch.tensor([0, 1, 2])}, generator())


def test_mixups_ratio_follows_its_beta_distribution():
    batch = {"image": torch.zeros(8000, 1, 1, 1), "label": torch.arange(8000) % 2}
    top = Mixup(2, mixup=0.4, cutmix=0, smoothing=0)(batch, generator())["label"][::2, 0].double().numpy()
    assert abs(top.mean() - 0.5) < 0.02
    assert abs(top.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01


def test_only_what_makes_sizes_equal_runs_on_single_samples():
    steps = [Resize(40), RandomCrop(32), Flip()]
    each, whole = divided(Compose(steps), None)
    assert each.transforms == steps[:2]
    assert whole.transforms == steps[2:]
    assert divided(Compose(steps), (50, 50))[0] is None
    assert divided(None, None) == (None, None)


def test_a_single_sample_is_a_batch_of_one():
    batch = scene(1)
    sample = {key: values[0] for key, values in batch.items()}
    transform = Compose([RandomResizedCrop(24), Flip()])
    one, many = transform.one(sample, generator()), transform(batch, generator())
    for key in ("image", "mask", "boxes", "labels"):
        assert np.array_equal(one[key], many[key][0])


def test_pictures_of_one_pixel_come_out() -> None:
    batch = {"image": torch.full((2, 3, 5, 9), 200, dtype=torch.uint8), "index": torch.arange(2)}
    out = Compose([Resize(1), CenterCrop(1)])(batch, torch.Generator())["image"]
    assert out.shape == (2, 3, 1, 1)
    torch.testing.assert_close(
        out.float() / (255 if out.dtype == torch.uint8 else 1), torch.full((2, 3, 1, 1), 200 / 255)
    )
