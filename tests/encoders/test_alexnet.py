"""AlexNet with batch norm: shapes of the sheet, stages by name, published names."""

from __future__ import annotations

import pytest
import timm
import torch

from isthmus.encoders.images.alexnet import AlexNet, architecture_of, from_official

WIDTHS = (4, 6, 8, 5, 5, 16)


def test_map_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = timm.create_model("rotnet_alexnet").eval()
        features = network.named_features(torch.empty(1, 3, 224, 224), network.stage_names)
    shapes = {name: tuple(feature.shape[1:]) for name, feature in features.items()}
    assert shapes == {
        "conv1": (64, 55, 55),
        "pool1": (64, 27, 27),
        "conv2": (192, 27, 27),
        "pool2": (192, 13, 13),
        "conv3": (384, 13, 13),
        "conv4": (256, 13, 13),
        "conv5": (256, 13, 13),
        "pool5": (256, 6, 6),
        "fc_block": (4096,),
        "classifier": (4,),
    }


def test_has_the_habits_of_timm_at_any_input_size() -> None:
    network = timm.create_model("rotnet_alexnet", widths=WIDTHS, num_classes=7).eval()
    for size in (64, 96, 224):
        images = torch.rand(2, 3, size, size)
        features = network.forward_features(images)
        torch.testing.assert_close(network.forward_head(features), network(images))
    assert network.forward_head(features, pre_logits=True).shape == (2, 16)
    network.reset_classifier(0)
    assert network(images).shape == (2, 16)
    with pytest.raises(ValueError, match="fixed head"):
        network.reset_classifier(0, global_pool="max")
    _, levels = network.forward_intermediates(images)
    assert [level.shape[1] for level in levels] == [info["num_chs"] for info in network.feature_info]


def test_published_names_load_even_without_batch_counts() -> None:
    network = AlexNet(widths=WIDTHS).eval()
    blocks = {"conv1": 0, "conv2": 2, "conv3": 4, "conv4": 5, "conv5": 6}
    official = {}
    for name, tensor in network.state_dict().items():
        words = name.split(".")
        if words[0] == "stages":
            theirs = f"_feature_blocks.{blocks[words[1]]}.{('conv', 'bn').index(words[2])}.{words[3]}"
        elif words[1] == "fc_block":
            theirs = f"_feature_blocks.8.{int(words[2]) - 1}.{words[3]}"
        else:
            theirs = f"_feature_blocks.9.0.{words[2]}"
        if words[-1] != "num_batches_tracked":
            official[theirs] = tensor
    ours = from_official(official)
    assert architecture_of(ours) == {"num_classes": 4, "in_chans": 3, "widths": list(WIDTHS)}
    again = AlexNet(widths=WIDTHS).eval()
    again.load_state_dict(ours)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images), network(images))
    with pytest.raises(ValueError, match="no parameter"):
        from_official({"_feature_blocks.3.0.weight": torch.zeros(1)})


def test_refuses_other_than_six_widths() -> None:
    with pytest.raises(ValueError, match="six numbers"):
        AlexNet(widths=(64, 192))
