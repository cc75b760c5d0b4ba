"""MetaMixer's segmentation head: any pyramid, merging, published names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.codec import Codec, build, spec_of
from isthmus.decoders.metamixer_head import MetaMixerHead, convert_official
from isthmus.encoders.backbone import Backbone
from tests.layers.test_metamixer import close, maps
from tests.layers.test_reparam import trained

TINY: dict[str, Any] = {"width": 8, "depth": 2, "token_kernel": 9, "channel_kernel": 3, "ratio": 2, "final_ratio": 2}


def levels() -> list[Tensor]:
    """Of an image of 72 x 104 pixels: sides that are no multiples of 32, which factors of 2 and 4 would not join."""
    return [maps(9, 13, 4), maps(5, 7, 6), maps(3, 4, 8)]


def head(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return trained(MetaMixerHead((4, 6, 8), 5, **{**TINY, **kwargs}))


def test_any_pyramid_gives_scores_at_its_finest_level() -> None:
    assert head()(levels()).shape == (2, 5, 9, 13)
    assert head(final_ratio=0)(levels()).shape == (2, 5, 9, 13)
    backbone = Backbone("resnet10t", reductions=(8, 16, 32))
    decoder = MetaMixerHead([info.channels for info in backbone.feature_info], 3, **TINY)
    assert Codec(backbone, decoder=decoder).eval()(torch.randn(1, 3, 50, 70)).prediction.shape == (1, 3, 7, 9)


def test_residuals_end_in_an_activation() -> None:
    model = head()
    residuals = [part for block in model.blocks for part in block]
    assert len(residuals) == 4
    assert all(isinstance(part.activation, nn.GELU) for part in residuals)


def test_merged_head_gives_the_same_scores_and_is_rebuilt_merged() -> None:
    model = head()
    with torch.no_grad():
        before = model(levels())
        model.reparameterize()
        close(model(levels()), before)
        again = build(spec_of(model)).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(levels()), model(levels()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(ValueError, match="merged already"):
        model.reparameterize()


def test_published_names_load_alone_and_among_those_of_a_system() -> None:
    model = head()
    official = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^blocks\.", "head_blocks.", key)
        key = key.replace("classifier.", "conv_seg.").replace(".conv.weight", ".c.weight").replace(".norm.", ".bn.")
        key = key.replace("token_mixer.main.query.", "token_mixer.main.fc.")
        key = key.replace("channel_mixer.main.query.", "channel_mixer.main.conv.")
        key = re.sub(r"channel_mixer\.main\.(key|value)\.", lambda m: f"channel_mixer.main.{_FC[m[1]]}.", key)
        key = re.sub(r"token_mixer\.main\.(key|value)\.", lambda m: f"token_mixer.main.{_CONV[m[1]]}.", key)
        names = _NINE if "token_mixer" in key else _THREE
        key = re.sub(r"\.(main|branches\.\d)\.(c|bn)\.", lambda m, names=names: f".{names[m[1]]}.{m[2]}.", key)
        official[f"decode_head.{key}"] = value
    system = {"state_dict": {**official, "backbone.patch_embed.0.c.weight": torch.zeros(1)}}
    for given in (system, {k.removeprefix("decode_head."): v for k, v in official.items()}):
        assert {k: v.shape for k, v in convert_official(given).items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }


_FC = {"key": "fc1", "value": "fc2"}
_CONV = {"key": "conv1", "value": "conv2"}
_NINE = {"main": "conv1", "branches.0": "conv2", "branches.1": "strip_conv1", "branches.2": "strip_conv2"}
_THREE = {"main": "conv1", "branches.0": "strip_conv1", "branches.1": "strip_conv2"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetaMixerHead((), 5), "levels of [] channels and 5 classes: at least one of each"),
        (lambda: MetaMixerHead((4,), 0), "num_classes is at least 1, got 0"),
        (lambda: head(token_kernel=8), "must be odd"),
        (lambda: head()(levels()[:2]), "the levels have [4, 6] channels; this head reads [4, 6, 8]"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
