"""TransNeXt: sharp around every place, coarse everywhere, in one softmax (arXiv 2311.17132, CVPR 2024).

A four-stage transformer. In its *aggregated attention* every query sees the keys of a small window around it and those
of a pooled view of the whole map; queries are scaled by the logarithm of the number of keys that they see, and the bias
of pooled keys comes from a small network on log-spaced coordinates, so that one set of weights serves many image sizes.
Features are mixed by a gated linear unit whose gate passes through a 3x3 depthwise convolution.

``timm.create_model("transnext_tiny")`` after ``import isthmus.encoders``. One class serves classification and dense
prediction, at any input size. The attention has a file of its own, :mod:`isthmus.encoders.images.aggregated_attention`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.layers import trunc_normal_ as trunc_normal
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isthmus.bounds import Count, Natural, Positive, Share, checked
from isthmus.codec import part
from isthmus.codec.published import Published
from isthmus.encoders.images.aggregated_attention import AggregatedAttention, Grid, Pair, PlainAttention
from isthmus.encoders.images.pyramid import Pyramid, check_settings, imagenet_cfg
from isthmus.layers.neighbourhood import visible_neighbours
from isthmus.layers.pool import Pooling

BiasMode = Literal["extrapolate", "interpolate"]


class ConvGLU(nn.Module):
    """W_2 (GELU(DWConv3x3(W_g x)) · W_v x), the hidden width two thirds of ``ratio`` · C.

    Shapes: ``(B, H, W, C)`` → the same.
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 * int(ratio * dim) / 3)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        # Two products with halves of one matrix, because the convolution wants its input in one piece.
        (gate_weight, value_weight), (gate_bias, value_bias) = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        gate = self.dwconv(F.linear(x, gate_weight, gate_bias).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(gate) * F.linear(x, value_weight, value_bias))


class TransNeXtBlock(nn.Module):
    """x += DropPath(attention(LN(x))); x += DropPath(ConvGLU(LN(x))).

    Shapes: ``(B, H, W, C)`` → the same.
    """

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn, self.mlp = attention, ConvGLU(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, H, W, C)`` → the same."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patches: a convolution of side 2s - 1 and stride s, then LayerNorm.

    Shapes: ``(B, C_in, H, W)`` → ``(B, ceil(H / s), ceil(W / s), C)``.
    """

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 2 * stride - 1, stride, stride - 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` → ``(B, H', W', C)``."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class TransNeXtStage(nn.Module):
    """Patches, blocks, LayerNorm.

    Shapes: ``(B, C_in, H, W)`` → ``(B, C, ceil(H / s), ceil(W / s))``.
    """

    def __init__(self, embed: PatchEmbed, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = embed, nn.ModuleList(blocks), nn.LayerNorm(dim, 1e-6)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, C_in, H, W)`` → ``(B, C, H', W')``."""
        x = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, grid, use_reentrant=False))
            else:
                x = block(x, grid)
        return self.norm(x).permute(0, 3, 1, 2)


@part
@checked
class TransNeXt(Pyramid):
    """The network, with timm's interface.

    Args:
        embed_dims: channels of the stages.
        depths: blocks of the stages.
        num_heads: heads of the stages.
        mlp_ratios: of the stages; the hidden width of the gated unit is two thirds of ratio · channels.
        sr_ratios: cells of the map to a cell of the pooled view, each way; 1 is plain attention.
        window_size: odd side of the window, or one for every stage.
        patch_size: stride of the first stage; the others halve the map.
        pretrain_size: image side, or (rows, columns), that coordinates of the position bias are relative to.
        bias_mode: ``"extrapolate"`` makes the bias for the actual map; ``"interpolate"`` makes it for images of
            ``img_size`` and resizes it, as detectors were trained.
        img_size: see ``bias_mode``; ``pretrain_size`` by default. Images of any size are taken either way.
        fixed_pool_size: side of the pooled view at every image size (linear complexity); by default the map's side over
            ``sr_ratios``.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 returns pooled features.
        global_pool: timm's name of the pooling.
        drop_rate: dropout before the classifier.
        attn_drop_rate: dropout of attention.
        drop_path_rate: of the last block; it grows linearly from 0.
        attention: makes the attention of stages with a pooled view from (channels, heads, window, dropout).

    Shapes: ``(B, in_chans, H, W)`` → ``(B, num_classes)``; levels of reduction 4, 8, 16, 32, each through its
    LayerNorm, their sides rounded up.

    Raises:
        ValueError: lists of unequal lengths, heads that do not divide the channels, an even window, an unknown mode, a
            width, side or rate that is out of range; in forward a wrong number of input channels, or a map too small
            for its pooled view.
    """

    def __init__(
        self,
        embed_dims: Sequence[Count] = (72, 144, 288, 576),
        depths: Sequence[Natural] = (2, 2, 15, 2),
        num_heads: Sequence[Count] = (3, 6, 12, 24),
        mlp_ratios: Sequence[Positive] = (8, 8, 4, 4),
        sr_ratios: Sequence[Count] = (8, 4, 2, 1),
        window_size: Count | Sequence[Count | None] = 3,
        patch_size: Count = 4,
        pretrain_size: Count | Pair = 224,
        bias_mode: BiasMode = "extrapolate",
        img_size: Count | Pair | None = None,
        fixed_pool_size: Count | None = None,
        in_chans: Count = 3,
        num_classes: Natural = 1000,
        global_pool: Pooling = "avg",
        drop_rate: Share = 0.0,
        attn_drop_rate: Share = 0.0,
        drop_path_rate: Share = 0.0,
        attention: Callable[[int, int, int, float], nn.Module] = AggregatedAttention,
    ) -> None:
        windows = [window_size] * len(embed_dims) if isinstance(window_size, int) else list(window_size)
        lists = (embed_dims, depths, num_heads, mlp_ratios, sr_ratios, windows)
        if len({len(entries) for entries in lists}) != 1:
            raise ValueError(
                "embed_dims, depths, num_heads, mlp_ratios, sr_ratios and window_size need one entry a stage; they "
                f"have {', '.join(str(len(entries)) for entries in lists)}."
            )
        if bias_mode not in ("extrapolate", "interpolate"):
            raise ValueError(f"bias_mode {bias_mode!r} is neither 'extrapolate' nor 'interpolate'.")
        if min(sr_ratios) < 1 or (fixed_pool_size is not None and fixed_pool_size < 1):
            raise ValueError(f"sr_ratios {sr_ratios} and fixed_pool_size {fixed_pool_size} must be at least 1.")
        check_settings(
            {
                "embed_dims": embed_dims,
                "mlp_ratios": mlp_ratios,
                "patch_size": patch_size,
                "pretrain_size": pretrain_size,
                "img_size": pretrain_size if img_size is None else img_size,
                "in_chans": in_chans,
            },
            {"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate},
        )
        windows, strides = [window or 1 for window in windows], [patch_size] + [2] * (len(embed_dims) - 1)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            make: Callable[[], nn.Module] = (
                functools.partial(PlainAttention, dim, heads, attn_drop_rate)
                if sr_ratios[i] == 1
                else functools.partial(attention, dim, heads, windows[i], attn_drop_rate)
            )
            blocks = [TransNeXtBlock(dim, make(), mlp_ratios[i], rate) for rate in rates[i]]
            embed = PatchEmbed(embed_dims[i - 1] if i else in_chans, dim, strides[i])
            stages.append(TransNeXtStage(embed, blocks, dim))
        super().__init__(
            stages,
            embed_dims,
            ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate),
            reductions=[patch_size * 2**i for i in range(len(embed_dims))],
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )
        self.pretrain_size = _pair(pretrain_size)
        self.img_size = self.pretrain_size if img_size is None else _pair(img_size)
        self.bias_mode, self.fixed_pool_size, self.sr_ratios = bias_mode, fixed_pool_size, tuple(sr_ratios)
        self.windows, self.strides = windows, strides
        self.apply(_init)

    def grids(self, height: int, width: int, device: torch.device | None = None, last: int = -1) -> list[Grid]:
        """What the stages, up to number ``last``, see of an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: a map is too small for its pooled view.
        """
        grids = []
        size, pretrained, made_for = (height, width), self.pretrain_size, self.img_size
        for i, stride in enumerate(self.strides[: last % len(self.stages) + 1]):
            size, pretrained, made_for = (_strided(side, stride) for side in (size, pretrained, made_for))
            bias_size = made_for if self.bias_mode == "interpolate" else size
            keys, bias_keys = (self._keys(i, side) for side in (size, bias_size))
            visible = visible_neighbours(*size, self.windows[i], device)
            grids.append(Grid(size, keys, bias_size, bias_keys, pretrained, visible))
        return grids

    def _keys(self, stage: int, size: Pair) -> Pair:
        """The pooled view of a map."""
        ratio, fixed = self.sr_ratios[stage], self.fixed_pool_size
        if ratio == 1:
            return size
        told = f"stage {stage + 1} has a map of {size[0]}x{size[1]} cells"
        if fixed is not None:
            if fixed >= min(size):
                raise ValueError(f"{told}; fixed_pool_size {fixed} must be smaller than its sides: use larger images.")
            return fixed, fixed
        if min(size) < ratio:
            raise ValueError(f"{told}, too small to be pooled by {ratio}: use larger images or smaller sr_ratios.")
        return size[0] // ratio, size[1] // ratio

    def stage_arguments(self, x: Tensor, last: int) -> list[tuple[Grid]]:
        """The grid of every stage."""
        return [(grid,) for grid in self.grids(x.shape[2], x.shape[3], x.device, last)]

    def no_weight_decay(self) -> set[str]:
        """timm's: parameters that are not shrunk, beside those of one dimension."""
        free = ("query_embedding", "local_bias", ".cpb.", "temperature")
        return {name for name, _ in self.named_parameters() if any(word in name for word in free)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's: parameter names → depth, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stages\.0\.embed", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.embed", "blocks": blocks}


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _pair(side: int | Sequence[int]) -> Pair:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _strided(size: Pair, stride: int) -> Pair:
    return -(-size[0] // stride), -(-size[1] // stride)


# ------------------------------------------------------------------------------------------------ official checkpoints


_PLACES = {"patch_embed": "embed", "block": "blocks", "norm": "norm"}


def convert_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published layout (DaiShiResearch/TransNeXt) in our names: a classifier, a backbone, or a whole detector, of
    which the backbone is taken.

    Args:
        state: the checkpoint, with or without its ``"model"`` or ``"state_dict"`` level.
    """
    state = state.get("model", state.get("state_dict", state))
    if any(name.startswith("backbone.") for name in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    converted = {}
    for name, tensor in state.items():
        if found := re.match(r"(patch_embed|block|norm)(\d+)\.", name):  # stages are counted from 1 there
            name = f"stages.{int(found[2]) - 1}.{_PLACES[found[1]]}.{name[found.end() :]}"
        name = re.sub(r"\.attn\.cpb_(fc[12])\.", r".attn.cpb.\1.", name)
        name = name.replace(".relative_pos_bias_local", ".local_bias").replace(".dwconv.dwconv.", ".dwconv.")
        converted[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)] = tensor
    return converted


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook at loading: official names become ours."""
    return dict(state) if "stages.0.embed.proj.weight" in state else convert_official(state)


# --------------------------------------------------------------------------------------------------------------- sizes


def _cfg(name: str, side: int = 224, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg(
        "stages.0.embed.proj",
        "head.fc",
        hf_hub_id=f"DaiShiResearch/transnext-{name.replace('_', '-')}",
        hf_hub_filename=f"transnext_{name}.pth",
        input_size=(3, side, side),
        pool_size=(side // 32, side // 32),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "transnext_micro.in1k": _cfg("micro_224_1k"),
        "transnext_tiny.in1k": _cfg("tiny_224_1k"),
        "transnext_small.in1k": _cfg("small_224_1k"),
        "transnext_small.in1k_ft_384": _cfg("small_384_1k_ft_1k", 384, crop_pct=1.0),
        "transnext_base.in1k": _cfg("base_224_1k"),
        "transnext_base.in1k_ft_384": _cfg("base_384_1k_ft_1k", 384, crop_pct=1.0),
        "transnext_micro_aaaa.in1k": _cfg("micro_AAAA_256_1k", 256),
    }
)

_SIZES: dict[str, dict[str, Any]] = {
    "transnext_micro": {"embed_dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16), "depths": (2, 2, 15, 2)},
    "transnext_tiny": {"embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 15, 2)},
    "transnext_small": {"embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "depths": (5, 5, 22, 5)},
    "transnext_base": {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)},
}
_SIZES["transnext_micro_aaaa"] = {**_SIZES["transnext_micro"], "sr_ratios": (16, 8, 4, 2), "pretrain_size": 256}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> TransNeXt:
    return build_model_with_cfg(
        TransNeXt,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**_SIZES[variant], **kwargs},
    )


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """12.8 M parameters, ImageNet 82.5."""
    return _create("transnext_micro", pretrained, **kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """28.3 M parameters, ImageNet 84.0."""
    return _create("transnext_tiny", pretrained, **kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """49.7 M parameters, ImageNet 84.7; 86.0 at 384 pixels."""
    return _create("transnext_small", pretrained, **kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """89.7 M parameters, ImageNet 84.8; 86.2 at 384 pixels."""
    return _create("transnext_base", pretrained, **kwargs)


@register_model
def transnext_micro_aaaa(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """13.1 M parameters, aggregated attention in all four stages, ImageNet 82.6 at 256 pixels."""
    return _create("transnext_micro_aaaa", pretrained, **kwargs)


PUBLISHED = Published(
    of="transnext",
    marks=r"\.attn\.(relative_pos_bias_local|cpb_fc1)",
    rename=convert_official,
    names=[f"transnext_{size}" for size in ("micro", "tiny", "small", "base", "micro_aaaa")],
)
