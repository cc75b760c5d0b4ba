"""Small members of timm's families run sparse without being touched: nothing leaks, tiles equal masked maps."""

from __future__ import annotations

import pytest
import torch
from benchmarks.spark_families import FAMILIES

from isthmus.codec import UserError
from isthmus.encoders.backbone import Backbone
from isthmus.layers.sparse_conv import check_leaks, sparse_features

QUICK = [
    "ResNet", "ResNet-D", "ResNeXt", "SE-ResNet", "ECA-ResNet", "SK-ResNet", "ResNeSt", "ResNet, anti-aliased",
    "ResNet v2", "NF-ResNet", "Res2Net", "RegNetX", "RegNetY", "EfficientNet-Lite, TensorFlow padding",
    "EfficientNetV2", "MobileNetV2", "MobileNetV3", "MobileNetV4", "MNASNet", "LCNet", "GhostNet", "RepGhostNet",
    "StarNet", "HGNetV2", "DenseNet", "DLA", "HRNet", "VGG", "RepVGG", "GENet", "VoVNet", "CSPNet", "CS3-DarkNet",
    "DPN", "Xception", "ConvNeXt", "ConvNeXt V2", "InceptionNeXt", "PoolFormer", "MambaOut",
]  # fmt: skip


@pytest.mark.parametrize("family", QUICK)
def test_family(family: str) -> None:
    torch.manual_seed(0)
    member = FAMILIES[family]
    assert check_leaks(Backbone(member.model), member.size, member.cell) == []


@pytest.mark.parametrize(
    ("family", "told"),
    [("EdgeNeXt", "SplitTransposeBlock"), ("EfficientViT", "LiteMLA"), ("GC-ResNet", "GlobalContext")],
)
def test_a_family_without_a_sparse_form_is_refused_by_name(family: str, told: str) -> None:
    encoder = Backbone(FAMILIES[family].model).eval()
    with pytest.raises(UserError, match=told), torch.no_grad():
        sparse_features(encoder, torch.zeros(1, 3, 64, 64), torch.ones(1, 2, 2, dtype=torch.bool))
