"""Every image architecture that we register with timm has timm's habits. A new one joins by one line here.

What makes an architecture that paper is tested in the file of its own name.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters, is_model_pretrained, list_pretrained
from timm.models._registry import _model_entrypoints as entry_points
from torch import Tensor, nn

import isthmus.encoders  # noqa: F401 - registers the architectures
from isthmus.encoders.backbone import Backbone
from tests.layers.test_reparam import trained


class Tiny(NamedTuple):
    """A registered name, arguments that make it small, the image sides it is tried at, and which it need not have."""

    name: str
    arguments: dict[str, Any]
    sides: tuple[int, int] = (64, 75)
    floors: bool = False  # levels of odd images are rounded down


CONVIT = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 9, "local_up_to_layer": 2}
TRANSNEXT = {
    "embed_dims": (8, 12, 16, 24),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 3),
    "mlp_ratios": (3, 2, 2, 2),
    "pretrain_size": 64,
}
FFNET = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "stem_width": 8, "layer_scale": 0.5}
UNIREPLKNET = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 16, 24, 32),
    "kernel_sizes": ((3,), (13,), (7, 5), (0,)),
    "layer_scale": 0.5,
}
REPLKNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "large_kernel_sizes": (31, 13, 9, 5), "dw_ratio": 1.5}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 16, 24, 32), "ls_init_value": 0.5}
HORNET = {"depths": (1, 1, 2, 1), "dims": (32, 32, 64, 64), "layer_scale": 0.5}

#: By the file that registers it; several where one file has several kinds of network.
ARCHITECTURES: dict[str, list[Tiny]] = {
    "alexnet": [Tiny("rotnet_alexnet", {"widths": (8, 12, 16, 12, 12, 20)}, (96, 107), floors=True)],
    "convit": [Tiny("convit_tiny_plus", CONVIT, (32, 27))],
    "ffnet": [
        Tiny("ffnet18", {"layers": (1, 1, 1, 1), "widths": (4, 8, 12, 16), "stem": (4,)}),
        Tiny("ffnet46ns", {"layers": (1, 1, 1), "widths": (4, 8, 12, 16), "stem": (4, 4)}),
    ],
    "hornet": [Tiny("hornet_tiny_7x7", HORNET, floors=True), Tiny("hornet_tiny_gf", HORNET, floors=True)],
    "inceptionnext": [
        Tiny("inceptionnext_isotropic_small", {"depths": (2,), "dims": (16,), "layer_scale": 0.5}, floors=True),
        Tiny("convnext_tiny_k3_par1_4", CONVNEXT, floors=True),
    ],
    "metamixer": [Tiny("metamixer_ffnet_1", FFNET), Tiny("metamixer_ffnet_seg", FFNET)],
    "nin": [Tiny("nin_cifar_tiny", {}, (32, 27))],
    "replknet": [Tiny("replknet_31b", REPLKNET)],
    "resnet_cifar": [Tiny("cifar_resnet20", {"blocks": 1, "width": 8}, (32, 27))],
    "transnext": [Tiny("transnext_micro", TRANSNEXT), Tiny("transnext_micro_aaaa", TRANSNEXT)],
    "unireplknet": [Tiny("unireplknet_a", UNIREPLKNET)],
}
every = pytest.mark.parametrize("tiny", [t for tinies in ARCHITECTURES.values() for t in tinies], ids=lambda t: t.name)


def make(tiny: Tiny, **kwargs: Any) -> Any:
    """The small network with weights away from their initial values, in evaluation mode."""
    torch.manual_seed(0)
    model = trained(timm.create_model(tiny.name, **{"num_classes": 5, **tiny.arguments, **kwargs}))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def image(side: int, width: int | None = None, channels: int = 3, batch: int = 2) -> Tensor:
    shape = (batch, channels, side, width or side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(side))


def registered() -> dict[str, str]:
    """Name → the file that registers it."""
    found = {name: make_.__module__ for name, make_ in entry_points.items()}
    return {n: m.rpartition(".")[2] for n, m in found.items() if m.startswith("isthmus.encoders.")}


def test_every_architecture_is_tried_here() -> None:
    assert set(registered().values()) == set(ARCHITECTURES)
    for file, tinies in ARCHITECTURES.items():
        assert {registered()[tiny.name] for tiny in tinies} == {file}


@pytest.mark.parametrize("name", sorted(registered()))
def test_timm_knows_the_input_and_the_ends_of_every_size(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(cfg["classifier"]).out_features == cfg["num_classes"] == model.num_classes
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    settings = resolve_model_data_config(model)
    assert settings["input_size"] == cfg["input_size"]
    assert len(settings["mean"]) == len(settings["std"]) == 3
    if cfg["pool_size"] is not None:
        last = model.feature_info[-1]["reduction"]
        assert all(abs(s / last - p) <= 1 for s, p in zip(cfg["input_size"][1:], cfg["pool_size"], strict=True))
    if is_model_pretrained(name):
        assert any(each.split(".")[0] == name for each in list_pretrained())
        assert cfg["hf_hub_id"] or cfg["url"] or cfg["file"]


@every
def test_levels_are_what_feature_info_says_at_any_size(tiny: Tiny) -> None:
    model, (even, odd) = make(tiny), tiny.sides
    for height, width in ((even, even), (odd, even), (even, odd + 20)):
        x = image(height, width)
        with torch.no_grad():
            last, levels = model.forward_intermediates(x)
            features = model.forward_features(x)
            torch.testing.assert_close(model.forward_head(features), model(x))
            normed, _ = model.forward_intermediates(x, norm=True)
            assert normed.shape == last.shape == features.shape
        assert len(levels) == len(model.feature_info)
        for level, info in zip(levels, model.feature_info, strict=True):
            assert level.shape[1] == info["num_chs"]
            for side, cells in zip((height, width), level.shape[2:], strict=True):
                exact = side / info["reduction"]
                assert abs(cells - exact) < (2 if tiny.name == "rotnet_alexnet" else 1)
                assert cells <= exact if tiny.floors else cells >= exact


@every
def test_features_only_gives_the_same_maps_and_drops_the_rest(tiny: Tiny) -> None:
    model, x = make(tiny), image(tiny.sides[0])
    wanted = list(range(len(model.feature_info)))[:2]
    features: Any = timm.create_model(tiny.name, features_only=True, out_indices=wanted, **tiny.arguments).eval()
    state = {name.replace(".", "").replace("_", ""): value for name, value in model.state_dict().items()}
    own = {name: name.removeprefix("model.").replace(".", "").replace("_", "") for name in features.state_dict()}
    features.load_state_dict({name: state[plain] for name, plain in own.items()})
    assert features.feature_info.channels() == [model.feature_info[i]["num_chs"] for i in wanted]
    assert features.feature_info.reduction() == [model.feature_info[i]["reduction"] for i in wanted]
    with torch.no_grad():
        early = model.forward_intermediates(x, wanted, stop_early=True, intermediates_only=True)
        for got, want, deep in zip(features(x), early, model.forward_intermediates(x, wanted)[1], strict=True):
            assert torch.equal(got, want)
            assert torch.equal(want, deep)
    assert not any("head" in name or "classifier" in name for name in features.state_dict())
    if len(model.feature_info) > 2:
        assert len(features.state_dict()) < 0.9 * len(model.state_dict())
    if not type(model).__module__.startswith("timm."):  # the paper's ConvNeXt is timm's own and asserts
        with pytest.raises(ValueError, match="output_fmt"):
            model.forward_intermediates(x, output_fmt="NHWC")


@every
def test_the_pyramid_is_cut_for_good(tiny: Tiny) -> None:
    model, x = make(tiny), image(tiny.sides[0])
    with torch.no_grad():
        want = model.forward_intermediates(x, [0], intermediates_only=True)[0]
        model.prune_intermediate_layers([0], prune_norm=True)
        assert torch.equal(model.forward_intermediates(x, [0], intermediates_only=True)[0], want)


@every
def test_head_is_replaced_and_left_out(tiny: Tiny) -> None:
    model, x = make(tiny), image(tiny.sides[0])
    with torch.no_grad():
        assert model(x).shape == (2, 5)
        width = model.forward_head(model.forward_features(x), pre_logits=True).shape[1]
        assert width == model.head_hidden_size
        model.reset_classifier(7)
        assert model.num_classes == 7
        assert model.get_classifier().out_features == 7
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity)
        assert model(x).shape == (2, width)
        bare = make(tiny, num_classes=0)  # a head of hidden layers may be left out as a whole
        assert bare(x).shape == (2, bare.head_hidden_size)
    half = make(tiny).half()
    half.reset_classifier(3)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@every
def test_dropout_and_pooling_are_set_by_timms_keywords(tiny: Tiny) -> None:
    pooling = {} if tiny.name == "rotnet_alexnet" or "convit" in tiny.name else {"global_pool": "avg"}
    model, x = make(tiny, drop_rate=0.5, **pooling), image(tiny.sides[0])
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model.forward_head(features))
        model.train()
        assert not torch.equal(model.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize("name", ["cifar_resnet20", "ffnet18", "ffnet46ns", "unireplknet_a"])
def test_stochastic_depth_drops_branches_in_training_only(name: str) -> None:
    tiny = next(t for tinies in ARCHITECTURES.values() for t in tinies if t.name == name)
    model, x = make(tiny, drop_path_rate=0.5), image(tiny.sides[0], batch=16)
    with torch.no_grad():
        assert torch.equal(model(x), make(tiny)(x))
        for module in model.modules():
            module.training = type(module).__name__ == "DropPath"
        torch.manual_seed(0)
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["cifar_resnet20", "nin_cifar_tiny"])
def test_a_map_comes_out_where_nothing_is_pooled(name: str) -> None:
    model: Any = timm.create_model(name, num_classes=5).eval()
    model.reset_classifier(0, "")
    with torch.no_grad():
        assert model(image(32)).shape == model.forward_features(image(32)).shape


@every
def test_other_channels_and_a_batch_of_one(tiny: Tiny) -> None:
    with torch.no_grad():
        assert make(tiny, in_chans=1)(image(tiny.sides[0], channels=1, batch=1)).shape == (1, 5)
    model = make(tiny)
    if not type(model).__module__.startswith("timm."):  # as above
        told = re.escape(f"the input is (2, 4, {tiny.sides[0]}, {tiny.sides[0]}); this network takes (B, 3, H, W)")
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=told):
                call(image(tiny.sides[0], channels=4))


@every
def test_half_precision_and_autocast_are_finite(tiny: Tiny) -> None:
    model, x = make(tiny), 100 * image(tiny.sides[0])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(x)).all()
        for dtype in (torch.bfloat16, torch.float16):
            out = make(tiny).to(dtype)(x.to(dtype))
            assert out.dtype == dtype
            assert torch.isfinite(out).all()


@every
def test_gradients_reach_all_parameters_and_checkpointing_keeps_them(tiny: Tiny) -> None:
    found = []
    for checkpointing in (False, True):
        model = make(tiny).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model(image(tiny.sides[0])).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        bound = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(found[1][name], gradient, atol=bound, rtol=1e-3)


@every
def test_layers_are_grouped_for_layer_wise_learning_rates(tiny: Tiny) -> None:
    model = make(tiny)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sorted(name for names in groups.values() for name in names) == sorted(dict(model.named_parameters()))
        assert len(groups) >= 3
        assert any("head" in name or "fc" in name for name in groups[max(groups)])


@every
def test_any_of_them_is_an_encoder(tiny: Tiny) -> None:
    encoder = Backbone(make(tiny))
    with torch.no_grad():
        levels = encoder(image(tiny.sides[0]))
    assert [level.shape[1] for level in levels] == [info.channels for info in encoder.feature_info]
