"""Constructors of all parts refuse what no network can be made of, in one sentence that names the argument."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from isthmus.codec import FeatureInfo, tables
from isthmus.codec.parts import _named
from isthmus.decoders.digit_sequence import DigitSequence
from isthmus.decoders.spark_unet import SparKUNet
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.as_image import VideoImage
from isthmus.encoders.images.perception import SeriesRows
from isthmus.encoders.images.pixels import Pixels
from isthmus.objectives.spark import SparK


class _Encoder(nn.Module):
    feature_info = (FeatureInfo(4, 4), FeatureInfo(8, 8))


class _Network(nn.Identity):
    num_features = 3


INFO = _Encoder.feature_info
STAGES = {"depths": (1, 1, 1, 1), "num_classes": 2}

#: Arguments with which every part is made, small.
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "KeyValueBottleneck": lambda: {"splitter": _named("isthmus:Chunk")(8, 2), "pairs": 4, "value_dim": 2},
    "LatentQuantization": lambda: {"latents": 3, "channels": 4},
    "FSQ": lambda: {"latents": 3, "channels": 4},
    "GaussianLatents": lambda: {"latents": 3, "channels": 4},
    "PlainLatents": lambda: {"latents": 3, "channels": 4},
    "Chunk": lambda: {"channels": 8, "codebooks": 2},
    "LearnedProjection": lambda: {"channels": 8, "codebooks": 2, "dim": 3},
    "RandomProjection": lambda: {"channels": 8, "codebooks": 2, "dim": 3},
    "VQ": lambda: {"codes": 4, "dim": 2},
    "Codec": lambda: {"encoder": Pixels()},
    "PassThrough": dict,
    "Reshaped": lambda: {"network": nn.Linear(2, 2), "shapes": {}},
    "ConvDetokenizer": lambda: {"dim": 2, "width": 4},
    "AbsentDigits": lambda: {"decoder": DigitSequence(2, 2, 3, 1)},
    "DigitSequence": lambda: {"channels": 2},
    "FFNetClassifier": lambda: {"channels": [4, 8, 8, 8], "classes": 2, "divisor": 16},
    "FFNetHead": lambda: {"channels": [4, 8, 8, 8], "classes": 2, "divisor": 16},
    "LatentHeads": lambda: {"in_channels": 4, "features": 3, "length": 5, "hidden": 4},
    "LatentPainter": lambda: {"features": 4, "width": 8},
    "MetaMixerHead": lambda: {"in_channels": (4, 8), "num_classes": 2, "width": 8, "depth": 1},
    "MetaMixerSR": lambda: {"dim": 8, "depth": 1},
    "FPN": lambda: {"feature_info": INFO, "width": 8},
    "HorFPN": lambda: {"feature_info": INFO, "width": 8},
    "AlexNetProbe": lambda: {"channels": 2, "classes": 2, "side": 6, "width": 4},
    "AttentiveProbe": lambda: {"channels": 8, "classes": 2},
    "ConvProbe": lambda: {"channels": 4, "classes": 2, "width": 4},
    "LinearProbe": lambda: {"channels": 4, "classes": 2},
    "NonLinearProbe": lambda: {"values": 4, "classes": 2, "hidden": 3},
    "PooledProbe": lambda: {"channels": 4, "classes": 2, "grid": 2},
    "Ridge": lambda: {"in_features": 2, "out_features": 3},
    "Densify": lambda: {"feature_info": INFO, "width": 8},
    "SparKUNet": lambda: {"feature_info": INFO, "width": 8},
    "DenseDecoder": lambda: {"latents": 3, "size": 4, "widths": (4,)},
    "StyleDecoder": lambda: {"latents": 3, "size": 8, "widths": (4,), "kernels": (3,), "strides": (1,), "dense": (4,)},
    "FlatHead": lambda: {"values": 4, "classes": 2, "hidden": 3},
    "Vote": lambda: {"classes": 3},
    "Backbone": lambda: {"model": "resnet10t"},
    "AsImage": lambda: {"adapter": VideoImage(), "encoder": _Encoder()},
    "AudioImage": dict,
    "PointImage": dict,
    "SeriesImage": lambda: {"channels": 2, "length": 4, "dim": 4},
    "VideoImage": dict,
    "ConViT": lambda: {"img_size": 32, "embed_dim": 8, "num_heads": 4, "depth": 2, "local_up_to_layer": 1},
    "HorNet": lambda: {**STAGES, "dims": (16, 16, 16, 16)},
    "InceptionNeXtMixers": lambda: {"mixer": "inception", "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "MaxoutCNN": lambda: {"size": 16, "widths": (4,), "strides": (2,), "local": 2, "dense": (3,)},
    "PatchNet": lambda: {"num_classes": 2},
    "MapForecaster": lambda: {"adapter": SeriesRows(2, 4, 4), "network": _Network(), "channels": 2, "horizon": 2},
    "Perception": lambda: {"adapter": None, "network": _Network(), "views": 1, "classes": 2},
    "SeriesRows": lambda: {"channels": 2, "length": 4, "dim": 4},
    "VideoFrames": lambda: {"layout": "raw"},
    "Pixels": dict,
    "DenseEncoder": lambda: {"latents": 3, "size": 4, "widths": (4,)},
    "QLAEEncoder": lambda: {"latents": 3, "size": 8, "widths": (4,), "kernels": (3,), "strides": (1,), "dense": (4,)},
    "PooledCNN": lambda: {"num_classes": 2, "width": 4},
    "SmoothAutoencoder": lambda: {"width": 4},
    "UpscalingCNN": lambda: {"width": 4},
    "MetaMixerMixers": lambda: {"mixer": "identity", "depths": (1,), "dims": (8,), "heads": 2},
    "TransNeXt": lambda: {**STAGES, "embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 2), "pretrain_size": 64},
    "UniRepLKNet": lambda: {**STAGES, "dims": (4, 4, 8, 8)},
    "MEGConv": lambda: {"in_channels": 4, "attention": 4, "position_dim": 32, "hidden": 4, "out_channels": 4, "mix": 4},
    "MetaMixerForecaster": lambda: {"variables": 2, "dims": (4,)},
    "SeriesEncoder": lambda: {"variables": 2, "dims": (4,)},
    "PlaneNet": lambda: {"num_classes": 2, "width": 4},
    "SpatialAttention": lambda: {"channels": 4, "dim": 32},
    "ConvTokenizer": lambda: {"dim": 2, "width": 4},
    "Embedding": lambda: {"encoder": Pixels(), "channels": 3},
    "EMACodebook": lambda: {"size": 4, "dim": 2, "groups": 2},
    "RobustScale": lambda: {"channels": 3},
    "SubjectLinear": lambda: {"in_features": 3, "out_features": 3, "subjects": 2},
    "SparK": lambda: {"encoder": _Encoder(), "decoder": nn.Identity()},
    "HCLT": lambda: {"parents": (-1, 0), "categories": 3, "latents": 2},
    "tiny_llama": lambda: {"vocab": 8, "layers": 1, "width": 8},
    "CropSelection": lambda: {"model": nn.Identity(), "crop": 4, "size": 4},
}
WRONG = (-1, 0, math.nan, "", "no such word")


def numeric(part: Any) -> list[str]:
    """Arguments whose annotation has a number, or a word of a few."""
    hints = typing.get_type_hints(part.__init__ if isinstance(part, type) else inspect.unwrap(part))
    return [name for name, hint in hints.items() if name != "return" and _has(hint)]


def _has(hint: Any) -> bool:
    return hint in (int, float) or typing.get_origin(hint) is typing.Literal or any(map(_has, typing.get_args(hint)))


@pytest.mark.parametrize("name", tables.PARTS)
def test_a_part_refuses_in_one_sentence_what_it_cannot_be_made_of(name: str) -> None:
    part = _named(f"isthmus:{name}")
    made = part(**GOOD[name]())
    assert isinstance(made, nn.Module)
    for argument in numeric(part):
        for wrong in WRONG:
            try:
                part(**{**GOOD[name](), argument: wrong})
            except ValueError as error:
                text = str(error)
                assert argument in text, text
                assert "\n" not in text
            except Exception as error:
                pytest.fail(f"{name}({argument}={wrong!r}) ends in {type(error).__name__}: {error}")
            else:
                assert wrong in (-1, 0), f"{name} takes {argument}={wrong!r}"


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("HorNet", {"dims": (16, 16, 16, -1)}, "dims is at least 1, got -1."),
        ("HorNet", {"global_pool": "average"}, "global_pool is one of , avg, max"),
        ("ConViT", {"global_pool": "average"}, "global_pool is one of token, avg, , got 'average'."),
        ("TransNeXt", {"img_size": (64,)}, "img_size is a list of 2 values, got (64,)."),
        ("UniRepLKNet", {"depths": ()}, "give kernel_sizes"),
        ("FPN", {"feature_info": (4, 8)}, "feature_info has a FeatureInfo(channels, reduction) a level, got 4."),
        ("SparKUNet", {"feature_info": ((4, 4), (-8, 8))}, "channels and reductions of at least 1, got (-8, 8)."),
        ("DigitSequence", {"hidden": "wide"}, "hidden is a list of values, got 'wide'."),
        ("MEGConv", {"depth": 2.5}, "depth is a whole number, got 2.5."),
        ("SeriesImage", {"channels": 16, "length": 1, "dim": 11}, "dim=16 would"),
        ("SparK", {"std": (0.2, 0.2, 0.0)}, "std above 0"),
    ],
)
def test_lists_and_words_are_refused_alike(name: str, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        _named(f"isthmus:{name}")(**{**GOOD[name](), **wrong})


def test_lists_of_a_model_file_stand_for_pairs() -> None:
    part = _named("isthmus:ConViT")
    assert part(**{**GOOD["ConViT"](), "img_size": [32, 16]}).num_classes == 1000


@pytest.mark.parametrize("channels", [1, 4])
def test_spark_wants_statistics_and_a_decoder_of_the_encoders_channels(channels: int) -> None:
    encoder = Backbone("resnet10t", in_chans=channels)
    decoder = SparKUNet(encoder.feature_info, 32, channels=channels)
    statistics = {"mean": (0.5,) * channels, "std": (0.2,) * channels}
    with pytest.raises(ValueError, match=f"images of {channels} channels, mean and std are those of 3"):
        SparK(encoder, decoder)
    with pytest.raises(ValueError, match="make the decoder with channels="):
        SparK(encoder, SparKUNet(encoder.feature_info, 32), **statistics)
    batch = {"image": torch.rand(2, channels, 64, 64)}
    assert SparK(encoder, decoder, **statistics)(batch, torch.Generator()).loss.isfinite()
