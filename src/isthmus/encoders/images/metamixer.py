"""FFNet: a pure convolutional pyramid in which FFNs mix places as well as channels (MetaMixer, arXiv 2406.02021).

Every block is FFNified attention, then a convolutional FFN (:mod:`isthmus.layers.metamixer`). Most norms and all
parallel branches are there for training only: ``reparameterize()`` leaves one convolution of each, with the same
outputs, and that network is the one whose parameters and latency the paper reports.

    model = timm.create_model("metamixer_ffnet_2", num_classes=10)         # after import isthmus.encoders
    maps = timm.create_model("metamixer_ffnet_seg", features_only=True)    # backbone of the segmentation system
    model.eval().reparameterize()

The FFNets of :mod:`isthmus.encoders.images.ffnet` are others that share the name. The paper's network for point clouds
is not here (see :mod:`isthmus.layers.metamixer`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from timm.layers import ClassifierHead, LayerNorm2d, SelectAdaptivePool2d, calculate_drop_path_rates
from timm.layers import trunc_normal_ as trunc_normal
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from isthmus.bounds import checked
from isthmus.codec.published import Published, classes_in
from isthmus.encoders.images.pyramid import Pyramid, Stage, backbone_of, imagenet_cfg
from isthmus.layers import metamixer
from isthmus.layers.metamixer import (
    ConvNorm,
    NormConvSkip,
    convert_blocks,
    convolutional_ffn,
    ffnet_block,
    ffnified_attention,
    reparam_depthwise,
    single_depthwise,
    strip_depthwise,
)
from isthmus.layers.pool import Pooling

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Mergeable(Pyramid):
    """A pyramid of mergeable parts, with the initialisation of FFNet."""

    deploy: bool

    def init_weights(self) -> None:
        """Truncated normal of standard deviation 0.02 for kernels and matrices, zero biases."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def reparameterize(self, fold_scales: bool = False) -> None:
        """Merge batch norms and branches, in place: the network that is deployed, with the same outputs.

        The norms before the head and on levels of the pyramid stay.

        Args:
            fold_scales: also multiply every layer scale into the convolution before it. The published networks keep
                them, and their parameter counts too.

        Raises:
            ValueError: in training mode, or merged already.
        """
        if self.deploy:
            raise ValueError(f"this {type(self).__name__} is merged already; it cannot be merged twice.")
        metamixer.reparameterize(self, fold_scales)
        self.deploy = True
        if "_timm_spec" in self.__dict__:  # a Codec that is saved now must be rebuilt in the merged form
            self.__dict__["_timm_spec"]["kwargs"] |= {"deploy": True, **({"layer_scale": 0.0} if fold_scales else {})}


@checked
class FFNet(Mergeable):
    """The network, with timm's interface.

    Args:
        depths: blocks of every stage.
        dims: width of every stage; each a multiple of the one before.
        kernels: of the channel mixer, for every stage.
        key_kernels: of the token mixer's first depthwise convolution, for every stage.
        value_kernels: of its second.
        mlp_ratios: hidden width of the channel mixer over that of the stage.
        stem_width: channels between the two convolutions of the stem.
        activations: ``"gelu"`` or ``"relu"``, for every stage; one word is for all.
        squeeze_excite: for every stage, whether its even blocks have one; one truth value is for all.
        layer_scale: initial γ of every residual; ``None`` or 0 leaves γ out.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 returns pooled features.
        global_pool: timm's name of the pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
        tail_norm: on the last map: ``"batch"``, ``"layer"``.
        norm_features: the backbone for dense prediction: a LayerNorm on every level, none before the head.
        deploy: build the merged form, for a merged checkpoint.

    Shapes: ``(B, in_chans, H, W)`` of any size → ``(B, num_classes)``; levels ``⌈H / r⌉`` of reduction 4, 8, 16, 32.

    Raises:
        ValueError: settings of different lengths, an even kernel, a width that is no multiple of the one before, an
            unknown activation or norm, an input of other channels.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (80, 160, 320, 640),
        kernels: Sequence[int] = (3, 3, 3, 3),
        key_kernels: Sequence[int] = (3, 3, 7, 7),
        value_kernels: Sequence[int] = (3, 3, 7, 7),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        stem_width: int = 64,
        activations: str | Sequence[str] = "gelu",
        squeeze_excite: bool | Sequence[bool] = False,
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pooling = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        tail_norm: str = "batch",
        norm_features: bool = False,
        deploy: bool = False,
    ) -> None:
        count = len(depths)
        acts = [activations] * count if isinstance(activations, str) else list(activations)
        excite = [squeeze_excite] * count if isinstance(squeeze_excite, bool) else list(squeeze_excite)
        per_stage = {
            "depths": depths,
            "dims": dims,
            "kernels": kernels,
            "key_kernels": key_kernels,
            "value_kernels": value_kernels,
            "mlp_ratios": mlp_ratios,
            "activations": acts,
            "squeeze_excite": excite,
        }
        _check_lengths(per_stage)
        if unknown := set(acts) - set(_ACTIVATIONS):
            raise ValueError(f"activations {sorted(unknown)}: choose from {', '.join(_ACTIVATIONS)}.")
        if tail_norm not in ("batch", "layer"):
            raise ValueError(f"tail_norm {tail_norm!r}: it is 'batch' or 'layer'.")
        for before, after in pairwise(dims):
            if after % before:
                raise ValueError(
                    f"dims {tuple(dims)}: {after} is no multiple of {before}, and stages are joined by a depthwise "
                    "convolution with a whole number of kernels a channel."
                )

        def down(before: int, after: int) -> nn.Module:
            wide = reparam_depthwise(before, 7, stride=2, out_channels=after, deploy=deploy)
            return nn.Sequential(wide, NormConvSkip(after, deploy))

        def block(stage: int, number: int, drop_path: float) -> nn.Module:
            dim, act = dims[stage], _ACTIVATIONS[acts[stage]]
            token = ffnified_attention(dim, key_kernels[stage], value_kernels[stage], act, deploy=deploy)
            channel = convolutional_ffn(dim, kernels[stage], mlp_ratios[stage], act, deploy=deploy)
            return ffnet_block(dim, token, channel, drop_path, layer_scale or None, excite[stage] and number % 2 == 0)

        norm = nn.BatchNorm2d(dims[-1]) if tail_norm == "batch" else LayerNorm2d(dims[-1])
        super().__init__(
            _stages(depths, dims, down, block, drop_path_rate),
            dims,
            ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
            stem=nn.Sequential(
                ConvNorm(in_chans, stem_width, 3, 2, deploy=deploy),
                nn.GELU(),
                ConvNorm(stem_width, dims[0], 3, 2, deploy=deploy),
            ),
            norm=None if norm_features else norm,
            norms=[LayerNorm2d(dim) for dim in dims] if norm_features else None,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )
        self.deploy = deploy
        self.init_weights()


@checked
class FFNetSeg(Mergeable):
    """The backbone of the paper's segmentation system: strip convolutions beside square ones, dense downsampling.

    What differs from :class:`FFNet`: a stem of four convolutions; key and value operators of every kernel have the
    branches of :func:`~isthmus.layers.metamixer.strip_depthwise`; the channel mixer has one depthwise convolution;
    stages are joined by a dense 3x3 of twice the width and a 1x1; a head of two hidden layers for pre-training.
    :class:`isthmus.decoders.metamixer_head.MetaMixerHead` reads its levels of reduction 8, 16 and 32.

    Args:
        depths: blocks of every stage.
        dims: width of every stage.
        kernels: of the channel mixer, for every stage.
        key_kernels: of the token mixer's first depthwise convolution, for every stage.
        value_kernels: of its second.
        mlp_ratios: hidden width of the channel mixer over that of the stage.
        stem_width: channels of the stem's first two convolutions.
        squeeze_excite: for every stage, whether its even blocks have one; one truth value is for all.
        layer_scale: initial γ of every residual; ``None`` or 0 leaves γ out.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 leaves all of it but the pooling out, as the checkpoints of the system do.
        global_pool: timm's name of the pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
        deploy: build the merged form, for a merged checkpoint.

    Shapes: as of :class:`FFNet`.

    Raises:
        ValueError: settings of different lengths, an even kernel, an input of other channels.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 18, 5),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernels: Sequence[int] = (3, 3, 3, 3),
        key_kernels: Sequence[int] = (3, 3, 9, 9),
        value_kernels: Sequence[int] = (3, 3, 9, 9),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        stem_width: int = 64,
        squeeze_excite: bool | Sequence[bool] = False,
        layer_scale: float | None = 1e-5,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pooling = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
    ) -> None:
        excite = [squeeze_excite] * len(depths) if isinstance(squeeze_excite, bool) else list(squeeze_excite)
        per_stage = {
            "depths": depths,
            "dims": dims,
            "kernels": kernels,
            "key_kernels": key_kernels,
            "value_kernels": value_kernels,
            "mlp_ratios": mlp_ratios,
            "squeeze_excite": excite,
        }
        _check_lengths(per_stage)

        def down(before: int, after: int) -> nn.Module:
            dense = ConvNorm(before, 2 * after, 3, 2, deploy=deploy)
            return nn.Sequential(dense, nn.GELU(), ConvNorm(2 * after, after, deploy=deploy))

        def block(stage: int, number: int, drop_path: float) -> nn.Module:
            dim = dims[stage]
            token = ffnified_attention(
                dim, key_kernels[stage], value_kernels[stage], operator=strip_depthwise, deploy=deploy
            )
            channel = convolutional_ffn(
                dim, kernels[stage], mlp_ratios[stage], operator=single_depthwise, deploy=deploy
            )
            return ffnet_block(dim, token, channel, drop_path, layer_scale or None, excite[stage] and number % 2 == 0)

        stem = nn.Sequential(
            ConvNorm(in_chans, stem_width, 3, 2, deploy=deploy),
            nn.GELU(),
            ConvNorm(stem_width, stem_width, 3, deploy=deploy),
            nn.GELU(),
            ConvNorm(stem_width, dims[0], 3, deploy=deploy),
            ConvNorm(dims[0], dims[0], 3, 2, deploy=deploy),
        )
        head = (
            TwoLayerHead(dims[-1], num_classes, global_pool, drop_rate, deploy=deploy)
            if num_classes
            else ClassifierHead(dims[-1], 0, pool_type=global_pool, drop_rate=drop_rate)
        )
        super().__init__(
            _stages(depths, dims, down, block, drop_path_rate),
            dims,
            head,
            stem=stem,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )
        self.head_hidden_size = self.head.num_features
        self.deploy = deploy
        self.init_weights()


@checked
class MixerNet(Mergeable):
    """A small pyramid of FFNet's blocks with any token mixer, to compare mixers in otherwise equal networks.

    Stem and downsampling are one 3x3 convolution + BN each, so that any width follows any other.

    Args:
        mixer: ``mixer(dim, stage)`` makes the token mixer of a block, stages counted from 0.
        depths: blocks of every stage.
        dims: width of every stage.
        kernel: of the channel mixers.
        mlp_ratio: hidden width of the channel mixers over that of the stage.
        stem_stride: input pixels a side of a cell of the first stage.
        layer_scale: initial γ of every residual; ``None`` or 0 leaves γ out.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 returns pooled features.
        drop_path_rate: of the last block; it grows linearly from 0.

    Shapes: ``(B, in_chans, H, W)`` → ``(B, num_classes)``.

    Raises:
        ValueError: depths and dims of different lengths, an even kernel, a stem stride below 1.
    """

    def __init__(
        self,
        mixer: Callable[[int, int], nn.Module],
        depths: Sequence[int] = (1, 1, 2, 1),
        dims: Sequence[int] = (24, 48, 64, 96),
        kernel: int = 3,
        mlp_ratio: float = 3,
        stem_stride: int = 2,
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        _check_lengths({"depths": depths, "dims": dims})
        if stem_stride < 1:
            raise ValueError(f"stem_stride {stem_stride}: it must be at least 1.")

        def block(stage: int, number: int, drop_path: float) -> nn.Module:
            channel = convolutional_ffn(dims[stage], kernel, mlp_ratio)
            return ffnet_block(dims[stage], mixer(dims[stage], stage), channel, drop_path, layer_scale or None)

        super().__init__(
            _stages(depths, dims, lambda before, after: ConvNorm(before, after, 3, 2), block, drop_path_rate),
            dims,
            ClassifierHead(dims[-1], num_classes),
            stem=nn.Sequential(ConvNorm(in_chans, dims[0], 3, stem_stride), nn.GELU()),
            norm=nn.BatchNorm2d(dims[-1]),
            reductions=[stem_stride * 2**i for i in range(len(dims))],
            in_chans=in_chans,
            num_classes=num_classes,
            channels_last=True,
        )
        self.deploy = False
        self.init_weights()


class TwoLayerHead(nn.Module):
    """1x1 + BN to 1024, hard swish, pool; linear to 1280, LayerNorm, hard swish, dropout, linear."""

    def __init__(
        self, dim: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0, deploy: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.num_features = dim, 1280
        self.expand, self.act = ConvNorm(dim, 1024, deploy=deploy), nn.Hardswish()
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
        self.hidden, self.norm = nn.Linear(1024, self.num_features), nn.LayerNorm(self.num_features, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(B, C, H, W)`` → ``(B, num_classes)``, or ``(B, 1280)`` with ``pre_logits``."""
        x = self.hidden(self.global_pool(self.act(self.expand(x))))
        x = self.drop(self.act(self.norm(x)))
        return x if pre_logits else self.fc(x)

    def reset(self, num_classes: int, pool_type: str | None = None, **_: Any) -> None:
        """timm's: a new classifier on the device and in the dtype of the head."""
        if pool_type is not None:
            pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
            if pool.feat_mult() != 1 or not pool_type:
                raise ValueError(f"pooling {pool_type!r} does not give the 1024 features that this head reads.")
            self.global_pool = pool
        layer = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.fc = layer.to(self.hidden.weight.device, self.hidden.weight.dtype)


def _check_lengths(per_stage: Mapping[str, Sequence[Any]]) -> None:
    if len({len(values) for values in per_stage.values()}) > 1:
        told = ", ".join(f"{name} {tuple(values)}" for name, values in per_stage.items())
        raise ValueError(f"{told}: one of each a stage.")


def _stages(
    depths: Sequence[int],
    dims: Sequence[int],
    down: Callable[[int, int], nn.Module],
    block: Callable[[int, int, float], nn.Module],
    drop_path_rate: float,
) -> list[nn.Module]:
    rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
    return [
        Stage(
            down(dims[i - 1], dims[i]) if i else nn.Identity(), [block(i, j, rate) for j, rate in enumerate(rates[i])]
        )
        for i in range(len(depths))
    ]


# ------------------------------------------------------------------------------------------------ official checkpoints

_NAMES = [
    (r"^patch_embed\.", "stem."),
    (r"^stages\.(\d+)\.0\.proj\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm(\d)\.", r"norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^head1\.0\.", "head.expand."),
    (r"^head2\.0\.", "head.hidden."),
    (r"^head2\.1\.", "head.norm."),
    (r"^head2\.3\.", "head.fc."),
]


def convert_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published layout (ysj9909/FFNet: classification, dense prediction, segmentation, merged) in our names.

    Args:
        state: the checkpoint, with or without a level ``"state_dict"`` or ``"model"``, and with or without ``module.``,
            ``backbone.`` or ``encoder.`` before the names. Those of other parts of a detector or segmenter (``neck.``,
            ``decode_head.``, …) are left out.
    """
    for level in ("state_dict", "model"):
        state = state.get(level, state)
    named: dict[str, Tensor] = {}
    for key, value in backbone_of(state).items():
        key = key.removeprefix("encoder.")
        if key.startswith(("decode_head.", "auxiliary_head.")):
            continue
        if found := re.match(r"^stages\.([1-9]\d*)\.(\d+)\.(?!proj\.)(.*)$", key):
            key = f"stages.{found[1]}.{int(found[2]) - 1}.{found[3]}"  # the downsampling counts as block 0
        for pattern, ours in _NAMES:
            key = re.sub(pattern, ours, key)
        named[key] = value
    return convert_blocks(named)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook at loading: official names become ours.

    Raises:
        ValueError: a merged checkpoint for a model that is not, or the other way round.
    """
    for level in ("state_dict", "model"):
        state = state.get(level, state)
    ours = dict(state) if "stem.0.conv.weight" in state else convert_official(state)
    merged, deploy = "stem.0.conv.bias" in ours, getattr(model, "deploy", False)
    if merged != deploy and "stem.0.conv.weight" in ours:
        told = ("merged", "is not; create it with deploy=True") if merged else ("not merged", "is; leave deploy out")
        raise ValueError(f"the checkpoint is {told[0]} and the model {told[1]}.")
    return ours


# --------------------------------------------------------------------------------------------------------------- sizes


def _cfg(side: int = 256, crop_pct: float = 0.95, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        "stem.0.conv",
        kwargs.pop("classifier", "head.fc"),
        input_size=(3, side, side),
        pool_size=(side // 32, side // 32),
        crop_pct=crop_pct,
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "metamixer_ffnet_1.in1k": _cfg(crop_pct=0.9),
        "metamixer_ffnet_1.dist_in1k": _cfg(crop_pct=0.9),
        "metamixer_ffnet_2.in1k": _cfg(crop_pct=0.9),
        "metamixer_ffnet_2.dist_in1k": _cfg(crop_pct=0.9),
        "metamixer_ffnet_3.in1k": _cfg(),
        "metamixer_ffnet_3.dist_in1k": _cfg(),
        "metamixer_ffnet_3.in1k_384": _cfg(384, 1.0),
        "metamixer_ffnet_4.in1k_384": _cfg(384, 1.0),
        "metamixer_ffnet_seg.in1k": _cfg(),
    }
)

_SIZES: dict[str, dict[str, Any]] = {
    "metamixer_ffnet_1": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)},
    "metamixer_ffnet_2": {"depths": (3, 3, 15, 3), "dims": (88, 176, 352, 704), "kernels": (7, 7, 7, 7)},
    "metamixer_ffnet_3": {
        "depths": (4, 4, 22, 5),
        "dims": (96, 192, 384, 768),
        "kernels": (7, 7, 7, 7),
        "layer_scale": 1e-6,
    },
    "metamixer_ffnet_4": {
        "depths": (4, 4, 27, 3),
        "dims": (128, 256, 512, 1024),
        "kernels": (7, 7, 7, 7),
        "layer_scale": 1e-6,
    },
    "metamixer_ffnet_seg": {},
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_model_with_cfg(
        FFNetSeg if variant.endswith("seg") else FFNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**_SIZES[variant], **kwargs},
    )


@register_model
def metamixer_ffnet_1(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """13.7 M parameters merged; ImageNet 81.3 at 256 pixels, 82.1 distilled."""
    return _create("metamixer_ffnet_1", pretrained, **kwargs)


@register_model
def metamixer_ffnet_2(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """26.9 M parameters merged; ImageNet 82.9 at 256 pixels, 83.7 distilled."""
    return _create("metamixer_ffnet_2", pretrained, **kwargs)


@register_model
def metamixer_ffnet_3(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """48.3 M parameters merged; ImageNet 83.9 at 256 pixels, 84.5 distilled, 84.5 at 384."""
    return _create("metamixer_ffnet_3", pretrained, **kwargs)


@register_model
def metamixer_ffnet_4(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """79.2 M parameters merged; ImageNet 85.3 at 384 pixels."""
    return _create("metamixer_ffnet_4", pretrained, **kwargs)


@register_model
def metamixer_ffnet_seg(pretrained: bool = False, **kwargs: Any) -> FFNetSeg:
    """The backbone of the segmentation system, 67.2 M parameters with its head for pre-training."""
    return _create("metamixer_ffnet_seg", pretrained, **kwargs)


# ----------------------------------------------------------------------------------------------- published checkpoints


def _arguments(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    merged, dense = "stem.0.conv.bias" in ours, "norms.0.weight" in ours
    return {**classes_in(ours), **({"deploy": True} if merged else {}), **({"norm_features": True} if dense else {})}


PUBLISHED = Published(
    of="metamixer",
    marks=r"^(backbone\.|encoder\.)*stages\.\d\.\d+\.(token|channel)_mixer\.",
    rename=convert_official,
    arguments=_arguments,
    names=[f"metamixer_ffnet_{size}" for size in ("1", "2", "3", "4", "seg")],
)
