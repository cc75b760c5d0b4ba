"""Codec composes, hands conditions on, saves, loads, and refuses what it must not load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.codec import (
    Code,
    Codec,
    UserError,
    build,
    create_timm,
    extra,
    load_weights,
    save_weights,
    spec_of,
    write_atomically,
)
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.pixels import Pixels


def small() -> Codec:
    return Codec(Backbone("resnet10t", reductions=(8, 16)))


class Shift(nn.Module):
    """Adds a condition to every level."""

    conditions = frozenset({"shift"})

    def forward(self, features: list[Tensor], condition: dict[str, Tensor]) -> Code:
        return Code([level + condition["shift"].view(-1, 1, 1, 1) for level in features])


def test_prediction_without_decoder_is_the_features() -> None:
    codec, x = small().eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        prediction, code = codec(x)
        direct = codec.encoder(x)
    assert [level.shape[1] for level in prediction] == [128, 256]
    assert all(torch.equal(a, b) for a, b in zip(code.features, direct, strict=True))
    assert code.loss.item() == 0.0


def test_conditions_reach_the_part_that_declares_them() -> None:
    codec = Codec(Backbone("resnet10t", reductions=(16,)), Shift()).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = codec(x, {"shift": torch.zeros(2)}).prediction[0]
        moved = codec(x, {"shift": torch.tensor([0.0, 1.0])}).prediction[0]
    assert torch.equal(plain[0], moved[0])
    torch.testing.assert_close(plain[1] + 1, moved[1])


def test_unknown_condition_is_named() -> None:
    with pytest.raises(ValueError, match=r"no part takes the condition colour; the parts take: shift"):
        Codec(Backbone("resnet10t"), Shift())(torch.rand(1, 3, 64, 64), {"colour": torch.zeros(1)})


def test_saved_codec_computes_the_same(tmp_path: Path) -> None:
    codec, x = small().eval(), torch.rand(1, 3, 64, 64)
    codec.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codec.json", "model.safetensors"]
    again = Codec.from_pretrained(tmp_path)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(codec(x).prediction, again(x).prediction, strict=True))
    timm_model = create_timm("resnet10t")
    timm_model.load_state_dict(again.encoder.model.state_dict())


@pytest.mark.parametrize(
    "target",
    ["os:system", "torch.nn:Linear", "isthmus.codec:write_atomically", "isthmus.codec:Path", "isthmus.nothing:Here"],
)
def test_model_file_can_name_only_parts(target: str) -> None:
    with pytest.raises(UserError):
        build({"target": target, "kwargs": {}})


class Mine(nn.Module):
    """A decoder of one's own."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.linear(features[-1].mean((2, 3)))


def test_a_part_of_ones_own_is_given_again_at_loading(tmp_path: Path) -> None:
    codec = Codec(Backbone("resnet10t", reductions=(16,)), decoder=Mine(256, 10)).eval()
    codec.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the decoder of this model is a Mine of code outside .* decoder=Mine\(…\)"):
        Codec.from_pretrained(tmp_path)
    x = torch.rand(1, 3, 64, 64)
    again = Codec.from_pretrained(tmp_path, decoder=Mine(256, 10))
    with torch.no_grad():
        assert torch.equal(again(x).prediction, codec(x).prediction)
    with pytest.raises(UserError, match="its description says"):
        Codec.from_pretrained(_described(tmp_path / "e", encoder={"target": "isthmus:Backbone", "kwargs": {}}))


def _described(folder: Path, **parts: Any) -> Path:
    folder.mkdir()
    told = {"format": "isthmus-codec", "version": 1, "encoder": {"target": "isthmus:Pixels"}, **parts}
    (folder / "codec.json").write_text(json.dumps(told))
    save_weights(Codec(nn.Identity()), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"encoder": {"target": "timm:resnet18", "kwargs": [1]}}, "an object of kwargs"),
        ({"encoder": {"target": 3}}, "described by a target"),
        ({"encoder": None}, "describes no encoder"),
        ({"encoder": "resnet18"}, "describes no encoder"),
        ({"bottleneck": 7}, "describes no bottleneck"),
        ({"encoder": {"target": "isthmus:Pixels", "kwargs": {"colour": 1}}}, "cannot be made of what"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_description_that_cannot_be_is_one_sentence(tmp_path: Path, parts: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Codec.from_pretrained(_described(tmp_path / "x", **parts))


def test_a_description_nested_without_end_is_one_sentence(tmp_path: Path) -> None:
    folder = _described(tmp_path / "x")
    (folder / "codec.json").write_text('{"encoder":' + '{"a":' * 50_000 + "1" + "}" * 50_001)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Codec.from_pretrained(folder)
    deep: Any = 1
    for _ in range(900):
        deep = {"kwargs": {"x": deep}, "target": "isthmus:Pixels"}
    with pytest.raises(UserError):
        build(deep)


@pytest.mark.parametrize("tied", ['{"a": "nothing"}', '{"a": 3}', '["a"]', "{", "[" * 50_000])
def test_ties_to_nothing_are_one_sentence(tmp_path: Path, tied: str) -> None:
    save_weights(nn.Linear(2, 2), tmp_path / "m.safetensors", {"tied": tied})
    with pytest.raises(UserError):
        load_weights(nn.Linear(2, 2), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"pretrained": True}),
        ("resnet18", {"checkpoint_path": "/etc/passwd"}),
        ("resnet18", {"cache_dir": "/tmp"}),
        ("resnet18", {"pretrained_cfg": {"url": "https://example.com/x.pth"}}),
        ("resnet18", {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}),
        ("resnet18", {"model_cfg": {}}),
        ("hornet_tiny_7x7", {"pretrained": True}),
        ("hf-hub:timm/resnet18.a1_in1k", {}),
        ("local-dir:/tmp", {}),
    ],
)
def test_a_model_file_makes_timm_fetch_nothing(name: str, kwargs: dict[str, Any]) -> None:
    for spec in (
        {"target": f"timm:{name}", "kwargs": kwargs},
        {"target": "isthmus:Backbone", "kwargs": {"model": name, **kwargs}},
    ):
        with pytest.raises(UserError, match=r"refused|has no model"):
            build(spec)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"num_classes": 3, "in_chans": 1, "global_pool": "max", "stem_width": 16, "drop_path_rate": 0.1}),
        ("vit_tiny_patch16_224", {"img_size": [64, 32], "depth": 1, "class_token": False, "global_pool": "avg"}),
        ("vit_small_r26_s32_224", {"img_size": 64, "depth": 1}),
        ("regnetx_002", {"output_stride": 16, "se_ratio": 0.25}),
        ("efficientnet_b0", {"num_classes": 0}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "features_only": True, "out_indices": [1]}),
        ("hornet_tiny_7x7", {"depths": [1, 1, 1, 1], "num_classes": 2}),
        ("metamixer_ffnet_1", {"deploy": True}),
    ],
)
def test_how_an_architecture_is_built_is_allowed(name: str, kwargs: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build({"target": f"timm:{name}", "kwargs": kwargs})
    assert spec_of(model) == {"target": f"timm:{name}", "kwargs": kwargs}


def test_what_an_overlaid_configuration_changed_is_described() -> None:
    model = create_timm("resnet10t", pretrained_cfg_overlay={"num_classes": 5})
    assert build(spec_of(model)).num_classes == 5


def test_unknown_timm_name_is_answered_with_near_ones() -> None:
    with pytest.raises(UserError, match="resnet50"):
        create_timm("resnet_50")


@pytest.mark.parametrize("damage", ["cut", "absent", "foreign", "another size", "not json"])
def test_damaged_files_are_told(tmp_path: Path, damage: str) -> None:
    small().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "codec.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "absent":
        weights.unlink()
    elif damage == "foreign":
        config.write_text(json.dumps({"architectures": ["Bert"]}))
    elif damage == "not json":
        config.write_text("{")
    else:
        spec = json.loads(config.read_text())
        spec["encoder"]["kwargs"]["model"] = "resnet18"
        config.write_text(json.dumps(spec))
    with pytest.raises(UserError):
        Codec.from_pretrained(tmp_path)


def test_backbone_refuses_levels_it_does_not_have() -> None:
    with pytest.raises(UserError, match=r"levels of reduction \[2, 4, 8, 16, 32\]"):
        Backbone("resnet10t", reductions=(4, 64))
    with pytest.raises(UserError, match="ascending"):
        Backbone("resnet10t", reductions=(16, 8))


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "m.safetensors")
    load_weights(other, tmp_path / "m.safetensors")
    assert torch.equal(model.a.weight, other.b.weight)
    assert (tmp_path / "m.safetensors").stat().st_size < 1.5 * 64 * 64 * 4


def test_a_codec_without_any_weights_is_saved_and_loaded(tmp_path: Path) -> None:
    Codec(Pixels(3)).save_pretrained(tmp_path)
    image = torch.rand(1, 3, 4, 4)
    assert torch.equal(Codec.from_pretrained(tmp_path).encode(image).features[0], image)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_description_is_plain_json() -> None:
    spec = spec_of(Backbone("resnet10t", reductions=(8, 16), in_chans=1))
    assert json.loads(json.dumps(spec)) == spec
    assert build(spec).model.conv1[0].in_channels == 1


def test_a_missing_extra_is_named_with_the_command_that_brings_it() -> None:
    assert extra("json", "coding").loads("1") == 1
    with pytest.raises(UserError, match=r"needs the package absent_package: pip install 'isthmus\[coding\]'"):
        extra("absent_package.part", "coding")


def test_a_backbone_whose_branches_were_merged_is_saved_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = Codec(Backbone("unireplknet_a", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)))
    images = torch.rand(1, 3, 64, 64)
    codec(torch.rand(4, 3, 64, 64))  # batch norms see something
    before = codec.eval()(images).prediction
    codec.encoder.model.reparameterize()
    codec.save_pretrained(tmp_path)
    for again, first in zip(Codec.from_pretrained(tmp_path)(images).prediction, before, strict=True):
        assert torch.allclose(again, first, atol=1e-4)
