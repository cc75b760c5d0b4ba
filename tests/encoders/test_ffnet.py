"""FFNet bodies: published layouts, odd sizes, the released smoothing, official names, refusals."""

from __future__ import annotations

import pytest
import timm
import torch

from isthmus.codec import UserError
from isthmus.decoders.ffnet_head import released
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.ffnet import SIZES, FFNet, Smoothing, arguments_of, checkpoint_filter_fn

SMALL = {"layers": (1, 1, 1, 1), "widths": (4, 8, 12, 16), "num_classes": 0}


def test_levels_are_of_the_published_reductions_at_any_size() -> None:
    images = torch.rand(1, 3, 65, 97)
    for body, stem in (("resnet", (4,)), ("slim", (2, 4))):
        for first in (False, True):
            encoder = Backbone(FFNet(body, stem=stem, stride_first=first, **SMALL).eval())
            features = encoder(images)
            scale = 2 if first else 1
            assert [level.reduction for level in encoder.feature_info] == [4 * scale, 8 * scale, 16 * scale, 32 * scale]
            assert [f.shape[2] for f in features] == [-(-65 // (r * scale)) for r in (4, 8, 16, 32)]
    narrow = Backbone(FFNet("narrow", (1, 1, 1), (4, 8, 12, 16), (4, 4), num_classes=0).eval())
    assert [f.shape[1] for f in narrow(images)] == [4, 8, 12, 16], "the stem's last map is the first level"


def test_basic_blocks_have_two_wide_convolutions_and_bottlenecks_stride_in_the_middle() -> None:
    basic, deep = FFNet(stem=(4,), **SMALL), FFNet(stem=(4,), bottleneck=True, **SMALL)
    block = deep.stages[1].blocks[0]
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)
    assert [c.kernel_size for c in (basic.stages[1].blocks[0].conv1, basic.stages[1].blocks[0].conv2)] == [
        (3, 3),
        (3, 3),
    ]
    assert deep.feature_info[0]["num_chs"] == 16


def test_the_start_is_the_published_one() -> None:
    torch.manual_seed(0)
    network = FFNet(stem=(64,), layers=(1, 1, 1, 1), num_classes=10)
    assert network.stages[3].blocks[0].conv2.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert network.head.fc.weight.abs().max() <= 10**-0.5
    assert network.head.fc.bias.eq(0).all()


def test_smoothing_pads_rows_only() -> None:
    smooth = Smoothing(3)
    assert smooth(torch.rand(1, 3, 64, 128)).shape == (1, 3, 31, 62)
    assert smooth.weight.sum((2, 3)).allclose(torch.ones(3, 1))
    with pytest.raises(ValueError, match="at least 5×5"):
        smooth(torch.rand(1, 3, 4, 64))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ffnet86S_dBBB_mobile", 26_607_347),
        ("ffnet122NS_CCC_mobile_pre_down", 32_165_683),
        ("segmentation_ffnet101_dAAA", 47_545_171),
        ("classification_ffnet50_AAX", 37_964_968),
        ("ffnet46N_CBB", 20_214_035),
    ],
)
def test_released_networks_have_the_published_size(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in released(name).parameters()) == count


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ffnet86S_AAA", "B bodies an S"),
        ("ffnet86S_BBD", "names are like"),
        ("ffnet99_AAA", "no model 'ffnet99'"),
        ("ffnet50_AAX", "names are like"),
        ("resnet50", "names are like"),
    ],
)
def test_names_that_were_never_published_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        released(name)


def test_impossible_bodies_are_refused() -> None:
    with pytest.raises(ValueError, match="body is one of resnet, slim, narrow"):
        FFNet("wide")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 stages"):
        FFNet("narrow", (1, 1, 1, 1))
    with pytest.raises(ValueError, match="no first stage"):
        FFNet("narrow", (1, 1, 1), stem=(4, 4), stride_first=True)
    with pytest.raises(ValueError, match="widths and stem must be 1 or more"):
        FFNet(widths=(0, 8, 8, 8))
    with pytest.raises(ValueError, match="depth 40N"):
        arguments_of(40, "N")


def test_a_published_backbone_loads_through_timms_hook() -> None:
    torch.manual_seed(0)
    model = timm.create_model("ffnet46n", layers=(1, 1, 1), num_classes=3)
    official = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("head."):
            continue
        parts = key.split(".")
        name = f"layer{parts[1]}.{parts[3]}.{'.'.join(parts[4:])}" if "blocks" in key else ".".join(parts[-2:])
        official[f"backbone_model.{name}"] = tensor + 1
    renamed = checkpoint_filter_fn(official, model)
    assert renamed.keys() == model.state_dict().keys()
    assert torch.equal(
        renamed["stages.2.blocks.0.conv2.weight"], model.state_dict()["stages.2.blocks.0.conv2.weight"] + 1
    )
    assert "ffnet150s_d" in SIZES
