"""HorNet: a four-stage convnet whose blocks mix space by products of high order (arXiv 2207.14284).

ConvNeXt's pyramid with recursive gated convolutions (:mod:`isthmus.layers.gnconv`) of order 2, 3, 4 and 5 in its four
stages. The GF sizes have global filters in the last two; they run at any size, because filters are resized.

    import timm
    import isthmus.encoders  # registers the sizes
    model = timm.create_model("hornet_tiny_7x7", num_classes=10)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm, LayerNorm2d, calculate_drop_path_rates
from timm.layers import trunc_normal_ as trunc_normal
from timm.models import build_model_with_cfg, convnext, generate_default_cfgs, register_model
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Share, checked
from isthmus.codec import part
from isthmus.codec.published import Published, classes_in, with_head_norm
from isthmus.layers.gnconv import GnConv, Pair
from isthmus.layers.pool import Pooling


class HorNetBlock(nn.Module):
    """x + DropPath(γ₁ · g^nConv(LN(x))), then x + DropPath(γ₂ · W₂ GELU(W₁ LN(x))) with hidden width 4 C.

    Args:
        dim: C.
        order: of the products.
        kernel: odd side of the depthwise convolution.
        scale: of the convolved features.
        filter: stored size of a global filter in place of the depthwise convolution.
        drop_path: probability of skipping a branch for a sample.
        layer_scale: initial γ₁ and γ₂; 0 leaves both out.

    Shapes: ``(B, C, H, W)`` → the same.
    """

    def __init__(
        self,
        dim: int,
        order: int,
        kernel: int = 7,
        scale: float = 1 / 3,
        filter: Pair | None = None,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.gnconv = GnConv(dim, None, order, kernel, scale, filter)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        x = self._add(x, self.gnconv(self.norm1(x)), self.gamma1, (-1, 1, 1))
        x = x.permute(0, 2, 3, 1)
        x = self._add(x, self.pwconv2(self.act(self.pwconv1(self.norm2(x)))), self.gamma2, (-1,))
        return x.permute(0, 3, 1, 2)

    def _add(self, x: Tensor, y: Tensor, gamma: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """x + DropPath(γ y), in one pass where nothing is dropped."""
        if gamma is None:
            return x + self.drop_path(y)
        if self.training and not isinstance(self.drop_path, nn.Identity):
            return x + self.drop_path(y * gamma.view(shape))
        return torch.addcmul(x, y, gamma.view(shape))


@part
@checked
class HorNet(convnext.ConvNeXt):
    """The network; stem, transitions, head and interface are those of timm's ConvNeXt.

    Args:
        depths: blocks of the four stages.
        dims: channels of the four stages.
        orders: of the products in the four stages.
        kernel: odd side of the depthwise convolutions.
        scales: s in the four stages, or one for all.
        filters: for every stage the stored size of its global filters, ``(h, h // 2 + 1)`` for an ``h x h`` map, or
            ``None`` where it has depthwise convolutions.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 returns pooled, normalised features.
        global_pool: timm's name of the pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
        layer_scale: initial γ of every block; 1e-6 is published, 0 leaves γ out.
        head_init_scale: factor on the classifier's initial weights.
        stem_stride: side and stride of the stem's convolution: 4 is published, 1 or 2 suit small pictures.
        norm_features: a layer norm on every level of the pyramid, as the dense checkpoints have.
        uniform_init: Xavier's uniform initial weights in place of normal ones of deviation 0.02.

    Shapes: ``(B, in_chans, H, W)`` → ``(B, num_classes)``; level i is ``(B, dims[i], ⌊H / r⌋, ⌊W / r⌋)`` with
    r = stem_stride · 2^i, because nothing is padded.

    Raises:
        ValueError: not four of each; a width that cannot be halved as often as the order asks; an input with other
            channels, or too small for the last stage.
    """

    stages: Any

    def __init__(
        self,
        depths: Sequence[Count] = (2, 3, 18, 2),
        dims: Sequence[Count] = (64, 128, 256, 512),
        orders: Sequence[Count] = (2, 3, 4, 5),
        kernel: Count = 7,
        scales: float | Sequence[float] = 1 / 3,
        filters: Sequence[Pair | None] | None = None,
        *,
        in_chans: Count = 3,
        num_classes: Natural = 1000,
        global_pool: Pooling = "avg",
        drop_rate: Share = 0.0,
        drop_path_rate: Share = 0.0,
        layer_scale: float = 1e-6,
        head_init_scale: float = 1.0,
        stem_stride: Count = 4,
        norm_features: bool = False,
        uniform_init: bool = False,
    ) -> None:
        scales = list(scales) if isinstance(scales, Sequence) else [scales] * 4
        filters = [None] * 4 if filters is None else list(filters)
        if not len(depths) == len(dims) == len(orders) == len(scales) == len(filters) == 4:
            raise ValueError(
                f"depths {tuple(depths)}, dims {tuple(dims)}, orders {tuple(orders)}, scales {tuple(scales)} and "
                f"filters {tuple(filters)}: four of each, one a stage."
            )
        if stem_stride < 1:
            raise ValueError(f"stem_stride {stem_stride}: it must be at least 1.")
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            depths=(0, 0, 0, 0),  # its own blocks are not made
            dims=tuple(dims),  # type: ignore[arg-type]
            norm_eps=1e-6,
            drop_rate=drop_rate,
        )
        self.stem_stride = stem_stride
        if stem_stride != 4:
            self.stem[0] = nn.Conv2d(in_chans, dims[0], stem_stride, stem_stride)
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, stage in enumerate(self.stages):
            stage.blocks = nn.Sequential(
                *(HorNetBlock(dims[i], orders[i], kernel, scales[i], filters[i], r, layer_scale) for r in rates[i])
            )
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-6) for dim in dims) if norm_features else None
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if uniform_init:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    trunc_normal(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        head: Any = self.head
        if isinstance(head.fc, nn.Linear):
            head.fc.weight.data.mul_(head_init_scale)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` → the map of the last stage."""
        return super().forward_features(self._checked(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's: the maps of the stages asked for, finest first; with ``norm_features`` each through its layer norm.

        Raises:
            ValueError: ``output_fmt`` is not ``"NCHW"``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: the maps of a convnet are 'NCHW'.")
        x = self._checked(x)
        last, levels = super().forward_intermediates(x, indices, norm, stop_early, output_fmt)  # type: ignore[misc]
        if self.norms is not None:
            take, _ = convnext.feature_take_indices(len(self.stages), indices)
            levels = [self.norms[i](level) for i, level in zip(sorted(take), levels, strict=True)]
        return levels if intermediates_only else (last, levels)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """timm's: drop the stages after the last one asked for, and the head."""
        take = super().prune_intermediate_layers(*args, **kwargs)
        if self.norms is not None:
            self.norms = self.norms[: len(self.stages)]
        return take

    def _checked(self, x: Tensor) -> Tensor:
        """The input, in the memory format in which CPUs run this network fastest."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"the input is {tuple(x.shape)}; this network takes (B, {self.in_chans}, H, W).")
        least = self.stem_stride * 2 ** (len(self.stages) - 1)
        if min(x.shape[-2:]) < least:
            raise ValueError(
                f"the input is {x.shape[-2]}x{x.shape[-1]} pixels; the last stage of this network needs {least} a side."
            )
        return x.contiguous(memory_format=torch.channels_last) if type(x) is Tensor and x.device.type == "cpu" else x


# ------------------------------------------------------------------------------------------------ official checkpoints

_NAMES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm(\d)\.", r"norms.\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def convert_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published layout (raoyongming/HorNet) in our names: a classifier, or a dense backbone with its norms.

    Args:
        state: the checkpoint, with or without its level ``"model"`` or ``"state_dict"``, with or without ``backbone.``
            in front of every name; names of other parts of a detector are left out then.
    """
    state = state.get("model", state.get("state_dict", state))
    if any(name.startswith("backbone.") for name in state):
        state = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    converted = {}
    for name, tensor in state.items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        converted[name] = tensor
    return converted


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook at loading: official names become ours, and global filters stay in the size of the model.

    Raises:
        ValueError: the checkpoint is of another size.
    """
    state = state.get("model", state.get("state_dict", state))
    ours = dict(state) if "stem.0.weight" in state else convert_official(state)
    for name, parameter in model.state_dict().items():
        given = ours.get(name)
        if name.endswith(".complex_weight") and given is not None and given.shape[1:] != parameter.shape[1:]:
            given = nn.functional.interpolate(
                given.float().permute(3, 0, 1, 2), parameter.shape[1:3], mode="bilinear", align_corners=True
            )
            ours[name] = given.permute(1, 2, 3, 0)
        if given is not None and not name.startswith("head.fc.") and ours[name].shape != parameter.shape:
            raise ValueError(
                f"{name} of the checkpoint is {tuple(ours[name].shape)}, of the model {tuple(parameter.shape)}: "
                "they are two different sizes of HorNet."
            )
    return ours


# --------------------------------------------------------------------------------------------------------------- sizes


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


_AT_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_22K: dict[str, Any] = {"num_classes": 10450}
_FILTERS_224 = (None, None, (14, 8), (7, 4))
_FILTERS_384 = (None, None, (24, 13), (12, 7))

default_cfgs = generate_default_cfgs(
    {
        "hornet_tiny_7x7.in1k": _cfg(),
        "hornet_tiny_gf.in1k": _cfg(),
        "hornet_small_7x7.in1k": _cfg(),
        "hornet_small_gf.in1k": _cfg(),
        "hornet_base_7x7.in1k": _cfg(),
        "hornet_base_gf.in1k": _cfg(),
        "hornet_base_gf_img384.in1k": _cfg(**_AT_384),
        "hornet_large_7x7.in22k_ft_in1k": _cfg(),
        "hornet_large_7x7.in22k_ft_in1k_384": _cfg(**_AT_384),
        "hornet_large_7x7.in22k": _cfg(**_22K),
        "hornet_large_gf.in22k_ft_in1k": _cfg(),
        "hornet_large_gf.in22k": _cfg(**_22K),
        "hornet_large_gf_img384.in22k_ft_in1k": _cfg(**_AT_384),
        "hornet_large_gf_img384.in22k": _cfg(**_AT_384, **_22K),
    }
)


def _create(variant: str, width: int, filters: Any, pretrained: bool, **kwargs: Any) -> HorNet:
    sizes = {"dims": tuple(width * 2**i for i in range(4)), "filters": filters}
    return build_model_with_cfg(
        HorNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**sizes, **kwargs},
    )


@register_model
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """22.4 M parameters, 4.0 GFLOPs, ImageNet 82.8."""
    return _create("hornet_tiny_7x7", 64, None, pretrained, **kwargs)


@register_model
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """23.0 M parameters, 3.9 GFLOPs, ImageNet 83.0."""
    return _create("hornet_tiny_gf", 64, _FILTERS_224, pretrained, **kwargs)


@register_model
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """49.5 M parameters, 8.8 GFLOPs, ImageNet 83.8."""
    return _create("hornet_small_7x7", 96, None, pretrained, **kwargs)


@register_model
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """50.4 M parameters, 8.7 GFLOPs, ImageNet 84.0."""
    return _create("hornet_small_gf", 96, _FILTERS_224, pretrained, **kwargs)


@register_model
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """87.3 M parameters, 15.6 GFLOPs, ImageNet 84.2."""
    return _create("hornet_base_7x7", 128, None, pretrained, **kwargs)


@register_model
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """88.4 M parameters, 15.5 GFLOPs, ImageNet 84.3."""
    return _create("hornet_base_gf", 128, _FILTERS_224, pretrained, **kwargs)


@register_model
def hornet_base_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """Filters for 384 pixels, 92.1 M parameters."""
    return _create("hornet_base_gf_img384", 128, _FILTERS_384, pretrained, **kwargs)


@register_model
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """194.5 M parameters, 34.8 GFLOPs, ImageNet 86.8 after ImageNet-22K (``num_classes=10450`` has its head)."""
    return _create("hornet_large_7x7", 192, None, pretrained, **kwargs)


@register_model
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """196.3 M parameters, 34.7 GFLOPs, ImageNet 87.0 after ImageNet-22K (``num_classes=10450`` has its head)."""
    return _create("hornet_large_gf", 192, _FILTERS_224, pretrained, **kwargs)


@register_model
def hornet_large_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """Filters for 384 pixels, 201.8 M parameters, 101.8 GFLOPs, ImageNet 87.7 after ImageNet-22K."""
    return _create("hornet_large_gf_img384", 192, _FILTERS_384, pretrained, **kwargs)


# ----------------------------------------------------------------------------------------------- published checkpoints


def _arguments(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**classes_in(ours), **({"norm_features": True} if "norms.0.weight" in ours else {})}


PUBLISHED = Published(
    of="hornet",
    marks=r"\.gnconv\.",
    rename=lambda state: with_head_norm(convert_official(state)),
    arguments=_arguments,
    names=[
        *(f"hornet_{size}_{kind}" for size in ("tiny", "small", "base", "large") for kind in ("7x7", "gf")),
        *("hornet_base_gf_img384", "hornet_large_gf_img384"),
    ],
)
