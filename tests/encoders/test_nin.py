"""Network in Network: shapes of the sheet, stages by name, timm's habits, published names."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.nin import NetworkInNetwork, architecture_of, from_official


def _tiny(**kwargs: object) -> NetworkInNetwork:
    torch.manual_seed(0)
    return timm.create_model("nin_cifar_tiny", **kwargs).eval()


def test_map_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        features = timm.create_model("nin_cifar").named_features(
            torch.empty(1, 3, 32, 32), ["conv1", "conv2", "conv3", "conv4"]
        )
    assert features["conv1"].shape == (1, 96, 16, 16)
    assert {features[f"conv{i}"].shape for i in (2, 3, 4)} == {(1, 192, 8, 8)}


def test_extra_pool_after_block_3_needs_more_than_three_blocks() -> None:
    images = torch.rand(1, 3, 32, 32)
    for depths, side in (((3, 1, 1), 8), ((3, 1, 1, 1), 4)):
        network = _tiny(depths=depths, pool_conv3=True)
        assert network.named_features(images, ["conv3"])["conv3"].shape[-1] == side
        assert network.feature_info[-1]["reduction"] == 32 // side


def test_runs_only_as_deep_as_asked() -> None:
    network, ran = _tiny(), []
    for name, stage in network.stages.items():
        stage.register_forward_hook(lambda *_, name=name: ran.append(name))
    features = network.named_features(torch.rand(2, 3, 32, 32), ["conv2", "conv1"])
    assert list(features) == ["conv2", "conv1"], "the order asked for"
    assert ran == ["conv1", "conv2"]
    ran.clear()
    Backbone(network, reductions=(2,))(torch.rand(2, 3, 32, 32))
    assert ran == ["conv1"]


@pytest.mark.parametrize(
    ("names", "message"), [([], "at least one"), (["conv1", "conv1"], "once"), (["conv9"], "no stage 'conv9'")]
)
def test_refuses_empty_repeated_and_unknown_names(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tiny().named_features(torch.rand(1, 3, 32, 32), names)
    with pytest.raises(ValueError, match=r"\['conv1'\]"):
        _tiny().named_features(torch.rand(1, 3, 32, 32), "conv1")


def test_has_the_habits_of_timm() -> None:
    images = torch.rand(2, 1, 32, 32)
    network = _tiny(in_chans=1, num_classes=7)
    features = network.forward_features(images)
    torch.testing.assert_close(network.forward_head(features), network(images))
    assert network(images).shape == (2, 7)
    assert network.forward_head(features, pre_logits=True).shape == (2, network.num_features)
    network.reset_classifier(0)
    assert network(images).shape == (2, network.num_features)
    network.reset_classifier(3, global_pool="max")
    torch.testing.assert_close(network(images), network.get_classifier()(features.amax((2, 3))))
    network.reset_classifier(0, global_pool="")
    assert network(images).shape == features.shape
    assert _tiny(num_classes=0)(torch.rand(2, 3, 32, 32)).shape == (2, 32)
    last, levels = network.forward_intermediates(images, indices=2)
    assert [level.shape[1] for level in levels] == [info["num_chs"] for info in network.feature_info[-2:]]
    torch.testing.assert_close(last, features)
    pyramid = timm.create_model("nin_cifar_tiny", features_only=True, out_indices=(0, 1))
    assert [f.shape[1] for f in pyramid(torch.rand(1, 3, 32, 32))] == pyramid.feature_info.channels()


def test_timm_groups_its_layers_for_layer_decay() -> None:
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(_tiny(), layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]


def test_published_names_load_even_without_batch_counts() -> None:
    """PyTorch 0.2 did not write ``num_batches_tracked``."""
    network = _tiny(depths=(3, 2, 2, 1))
    official = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("stages."):
            block, unit = name.split(".")[1].removeprefix("conv"), int(name.split(".")[2]) + 1
            kind = {"conv": "Conv", "bn": "BatchNorm"}[name.split(".")[3]]
            theirs = f"_feature_blocks.{int(block) - 1}.Block{block}_ConvB{unit}.layers.{kind}.{name.split('.')[4]}"
        else:
            theirs = f"_feature_blocks.4.Classifier.{name.split('.')[-1]}"
        if not name.endswith("num_batches_tracked"):
            official[theirs] = tensor
    ours = from_official(official)
    assert architecture_of(ours) == {"num_classes": 4, "in_chans": 3, "depths": [3, 2, 2, 1], "widths": [32, 24, 16]}
    again = NetworkInNetwork(**architecture_of(ours)).eval()
    again.load_state_dict(ours)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), network(images))
    with pytest.raises(ValueError, match="no parameter"):
        from_official({"fc.weight": torch.zeros(1)})


def test_timm_loads_a_saved_encoder(tmp_path) -> None:
    network = _tiny()
    save_file(network.state_dict(), tmp_path / "encoder.safetensors")
    again = timm.create_model("nin_cifar_tiny", checkpoint_path=str(tmp_path / "encoder.safetensors")).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), network(images))


def test_refuses_widths_that_do_not_fit_block_1() -> None:
    with pytest.raises(ValueError, match="depths counts the convolutions"):
        NetworkInNetwork(depths=(2, 2))
