"""UniRepLKNet: few very large kernels, much cheap local structure (arXiv 2311.15599; journal: arXiv 2410.08049).

A four-stage convnet with 13x13 depthwise kernels in the deep stages and 3x3 elsewhere. Beside every large kernel run
dilated small ones while training; ``reparameterize()`` merges them, the batch norms, the layer scale and the bias of
the response normalisation into one kernel and one linear layer a block, with the same outputs. That form is what gets
deployed and whose parameters the paper counts.

``timm.create_model("unireplknet_t")`` after ``import isthmus.encoders``. :mod:`isthmus.encoders.images.as_image` turns
sound, video, point clouds and time series into inputs of the same network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead, SqueezeExcite, calculate_drop_path_rates
from timm.layers import trunc_normal_ as trunc_normal
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Share, checked
from isthmus.codec import part
from isthmus.codec.published import Published, classes_in, with_head_norm
from isthmus.encoders.images.pyramid import Pyramid, Stage, backbone_of, imagenet_cfg
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.layers.pool import Pooling
from isthmus.layers.reparam import ReparamConv, check_mergeable, fuse_norm

#: Kernel → (kernel, dilation) of the branches beside it (appendix, table of the dilated re-param block).
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def dilated_reparam_conv(channels: int, kernel: int, deploy: bool = False) -> ReparamConv:
    """The dilated re-param block: a K x K depthwise convolution with the branches of :data:`BRANCHES`.

    Raises:
        ValueError: there is no table row for ``kernel``.
    """
    if kernel not in BRANCHES:
        raise ValueError(f"kernel {kernel} has no dilated branches; those of {sorted(BRANCHES)} do.")
    return ReparamConv(channels, kernel, BRANCHES[kernel], deploy=deploy)


class ResponseNorm(nn.Module):
    """Global response normalisation on ``(B, H, W, C)``: x · (γ·G/(mean_c G + ε) + 1) + β, G the L2 norm over the map.

    The "+ 1" is the residual of ConvNeXt V2's layer; the map is read twice and written once.
    """

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` → the same shape. The norm is taken in float32, because half precision overflows."""
        # The sum of squares runs several times faster than linalg.vector_norm over these axes; the floor keeps the
        # root's derivative finite for channels that are zero everywhere.
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum((1, 2), keepdim=True)
        response = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        scale = (self.weight * (response / (response.mean(-1, keepdim=True) + 1e-6)) + 1).to(x.dtype)
        return x * scale if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, scale)


class UniRepLKNetBlock(nn.Module):
    """x + DropPath(γ · BN(W_2 GRN(GELU(W_1 SE(BN(DW(x))))))).

    Args:
        dim: C.
        kernel: of the depthwise convolution; 7 and more have dilated branches, 0 leaves the convolution out.
        drop_path: probability of skipping the block for a sample.
        layer_scale: initial γ.
        deploy: build the merged form at once.

    Shapes: ``(B, C, H, W)`` → the same.
    """

    def __init__(
        self, dim: int, kernel: int, drop_path: float = 0.0, layer_scale: float = 1e-6, deploy: bool = False
    ) -> None:
        super().__init__()
        self.dwconv: Any = nn.Identity()
        if kernel >= 7:
            self.dwconv = dilated_reparam_conv(dim, kernel, deploy)
        elif kernel:
            self.dwconv = DepthwiseConv(dim, kernel, bias=deploy)
        self.norm: Any = nn.Identity() if deploy or not kernel else nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = ResponseNorm(4 * dim, bias=not deploy)
        self.fc2: Any = nn.Linear(4 * dim, dim, bias=deploy)
        self.norm2: Any = nn.Identity() if deploy else nn.BatchNorm2d(dim)
        self.gamma = None if deploy else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        y = self.se(self.norm(self.dwconv(x)))
        y = self.fc2(self.grn(self.act(self.fc1(y.permute(0, 2, 3, 1)))))
        y = self.norm2(y.permute(0, 3, 1, 2))
        if self.gamma is not None:
            y = y * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(y)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the block in place; a second call does nothing. Raises ``ValueError`` in training mode."""
        if self.gamma is None:
            return
        check_mergeable(self)
        if isinstance(self.dwconv, ReparamConv):
            self.dwconv.absorb(self.norm)
        elif isinstance(self.dwconv, DepthwiseConv):
            fuse_norm(self.dwconv, self.norm)
        # γ·BN(W_2(h + β)) with h the response normalisation without its bias β.
        scale = self.norm2.weight / (self.norm2.running_var + self.norm2.eps).sqrt()
        weight = self.fc2.weight * (scale * self.gamma).unsqueeze(1)
        bias = (self.norm2.bias + (self.fc2.weight @ self.grn.bias - self.norm2.running_mean) * scale) * self.gamma
        self.fc2.weight, self.fc2.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.norm, self.norm2, self.grn.bias, self.gamma = nn.Identity(), nn.Identity(), None, None


def default_kernels(depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The published kernels: 3 in stage 1, 13 in stages 2 and 4; stage 3 has 13 in every block, or in every second
    (18 blocks) or third (27 blocks), because depth is scaled with 3x3 blocks only."""
    period = {18: (13, 3), 27: (13, 3, 3)}.get(depths[2], (13,))
    third = tuple(period[i % len(period)] for i in range(depths[2]))
    return (3,) * depths[0], (13,) * depths[1], third, (13,) * depths[3]


@part
@checked
class UniRepLKNet(Pyramid):
    """The network, with timm's interface.

    Args:
        depths: blocks of the four stages.
        dims: channels of the four stages.
        kernel_sizes: kernel of every block, stage by stage; the published pattern by default.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 returns pooled, normalised features.
        global_pool: timm's name of the pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
        layer_scale: initial γ of every block.
        head_init_scale: factor on the classifier's initial weights (0.001 for fine-tuning at 384 pixels).
        norm_features: a LayerNorm on every level of the pyramid, as the dense checkpoints have.
        deploy: build the merged form, for a merged checkpoint.

    Shapes: ``(B, in_chans, H, W)`` of any size → ``(B, num_classes)``; levels of reduction 4, 8, 16, 32.

    Raises:
        ValueError: lists of unequal lengths, a kernel that is even or unknown, a wrong number of input channels.
    """

    def __init__(
        self,
        depths: Sequence[Count] = (3, 3, 18, 3),
        dims: Sequence[Count] = (80, 160, 320, 640),
        kernel_sizes: Sequence[Sequence[Natural]] | None = None,
        in_chans: Count = 3,
        num_classes: Natural = 1000,
        global_pool: Pooling = "avg",
        drop_rate: Share = 0.0,
        drop_path_rate: Share = 0.0,
        layer_scale: float = 1e-6,
        head_init_scale: float = 1.0,
        norm_features: bool = False,
        deploy: bool = False,
    ) -> None:
        if kernel_sizes is None and len(depths) != 4:
            raise ValueError(f"the published kernels are those of 4 stages; give kernel_sizes for depths {depths}.")
        kernels = default_kernels(depths) if kernel_sizes is None else kernel_sizes
        if not depths or len(depths) != len(dims) or [len(k) for k in kernels] != list(depths):
            raise ValueError(
                f"depths {tuple(depths)}, dims {tuple(dims)} and kernel_sizes {kernels} must agree: one width and one "
                "list of kernels a stage, one kernel a block."
            )
        stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0] // 2, 3, 2, 1),
            LayerNorm2d(dims[0] // 2),
            nn.GELU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1),
            LayerNorm2d(dims[0]),
        )
        rates = cast("list[list[float]]", calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        for i, dim in enumerate(dims):
            down = nn.Sequential(nn.Conv2d(dims[i - 1], dim, 3, 2, 1), LayerNorm2d(dim)) if i else nn.Identity()
            blocks = [
                UniRepLKNetBlock(dim, kernel, rate, layer_scale, deploy)
                for kernel, rate in zip(kernels[i], rates[i], strict=True)
            ]
            stages.append(Stage(down, blocks))
        head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=LayerNorm2d
        )
        super().__init__(
            stages,
            dims,
            head,
            stem=stem,
            norms=[LayerNorm2d(dim) for dim in dims] if norm_features else None,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            channels_last=True,
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.head.fc, nn.Linear):
            self.head.fc.weight.data.mul_(head_init_scale)

    def reparameterize(self) -> None:
        """Merge every block in place: the deployed network, with the same outputs. A second call does nothing.

        Raises:
            ValueError: in training mode.
        """
        for module in self.modules():
            if isinstance(module, UniRepLKNetBlock):
                module.reparameterize()
        if "_timm_spec" in self.__dict__:  # a Codec that is saved now must be rebuilt in the merged form
            self.__dict__["_timm_spec"]["kwargs"]["deploy"] = True


# ------------------------------------------------------------------------------------------------ official checkpoints

_NAMES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.se\.down\.", ".se.fc1."),
    (r"\.se\.up\.", ".se.fc2."),
    (r"\.pwconv1\.1\.", ".fc1."),
    (r"\.pwconv2\.0\.", ".fc2."),
    (r"\.pwconv2\.2\.", ".norm2."),
    (r"\.act\.1\.gamma$", ".grn.weight"),
    (r"\.act\.1\.beta$", ".grn.bias"),
    (r"^norm(\d)\.", r"norms.\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
_BRANCH = re.compile(r"^(?P<block>.*\.)?dil_(?P<kind>conv|bn)_k(?P<k>\d+)_(?P<r>\d+)\.(?P<rest>.*)$")


def convert_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published layout (AILab-CVC/UniRepLKNet) in our names: trained or merged, whole or with dense norms.

    Args:
        state: the checkpoint, with or without its level ``"model"`` or ``"state_dict"``, of the network alone or of a
            detector or segmenter with ``backbone.`` in front of its names, whose other parts are left out.
    """
    state = state.get("model", state.get("state_dict", state))
    converted = {}
    for name, tensor in convert_dilated_block(backbone_of(state)).items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        converted[name] = tensor.flatten() if ".grn." in name else tensor
    return converted


def convert_dilated_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the names inside dilated re-param blocks: ``lk_origin``, ``origin_bn``, ``dil_{conv,bn}_k{k}_{r}``.

    A block's dilations rise in the order of :data:`BRANCHES`, so their rank is the branch's number.
    """
    dilations: dict[str, set[int]] = {}
    for found in filter(None, map(_BRANCH.match, state)):
        dilations.setdefault(found["block"] or "", set()).add(int(found["r"]))
    converted = {}
    for name, tensor in state.items():
        block, middle, rest = name.rpartition("lk_origin.")
        if found := _BRANCH.match(name):
            block = found["block"] or ""
            number = sorted(dilations[block]).index(int(found["r"]))
            name = f"{block}branches.{number}.{'norm' if found['kind'] == 'bn' else 'conv'}.{found['rest']}"
        elif middle:
            name = f"{block}{'conv' if f'{block}lk_origin.bias' in state else 'main.conv'}.{rest}"
        converted[name.replace("origin_bn.", "main.norm.")] = tensor
    return converted


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook at loading: official names become ours.

    Raises:
        ValueError: a merged checkpoint for a model that is not.
    """
    state = state.get("model", state)
    ours = dict(state) if "stem.0.weight" in state else convert_official(state)
    if not any(key.endswith(".gamma") for key in ours) and any(key.endswith(".gamma") for key in model.state_dict()):
        raise ValueError("the checkpoint is merged and the model is not; create the model with deploy=True.")
    return ours


# --------------------------------------------------------------------------------------------------------------- sizes


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return imagenet_cfg("stem.0", "head.fc", hf_hub_id="DingXiaoH/UniRepLKNet", hf_hub_filename=file, **kwargs)


_AT_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_22K: dict[str, Any] = {"num_classes": 21841}

default_cfgs = generate_default_cfgs(
    {
        "unireplknet_a.in1k": _cfg("unireplknet_a_in1k_224_acc77.03.pth"),
        "unireplknet_f.in1k": _cfg("unireplknet_f_in1k_224_acc78.58.pth"),
        "unireplknet_p.in1k": _cfg("unireplknet_p_in1k_224_acc80.23.pth"),
        "unireplknet_n.in1k": _cfg("unireplknet_n_in1k_224_acc81.64.pth"),
        "unireplknet_t.in1k": _cfg("unireplknet_t_in1k_224_acc83.21.pth"),
        "unireplknet_s.in1k": _cfg("unireplknet_s_in1k_224_acc83.91.pth"),
        "unireplknet_s.in22k": _cfg("unireplknet_s_in22k_pretrain.pth", **_22K),
        "unireplknet_s.in22k_ft_in1k_384": _cfg("unireplknet_s_in22k_to_in1k_384_acc86.44.pth", **_AT_384),
        "unireplknet_b.in22k_ft_in1k_384": _cfg("unireplknet_b_in22k_to_in1k_384_acc87.40.pth", **_AT_384),
        "unireplknet_b.in22k": _cfg("unireplknet_b_in22k_pretrain.pth", **_22K),
        "unireplknet_l.in22k_ft_in1k_384": _cfg("unireplknet_l_in22k_to_in1k_384_acc87.88.pth", **_AT_384),
        "unireplknet_l.in22k": _cfg("unireplknet_l_in22k_pretrain.pth", **_22K),
        "unireplknet_xl.in22k_ft_in1k_384": _cfg("unireplknet_xl_in22k_to_in1k_384_acc87.96.pth", **_AT_384),
        "unireplknet_xl.in22k": _cfg("unireplknet_xl_in22k_pretrain.pth", **_22K),
    }
)


#: Depths of the stages and width of the first; the width doubles from stage to stage.
_SIZES = {
    "unireplknet_a": ((2, 2, 6, 2), 40),
    "unireplknet_f": ((2, 2, 6, 2), 48),
    "unireplknet_p": ((2, 2, 6, 2), 64),
    "unireplknet_n": ((2, 2, 8, 2), 80),
    "unireplknet_t": ((3, 3, 18, 3), 80),
    "unireplknet_s": ((3, 3, 27, 3), 96),
    "unireplknet_b": ((3, 3, 27, 3), 128),
    "unireplknet_l": ((3, 3, 27, 3), 192),
    "unireplknet_xl": ((3, 3, 27, 3), 256),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> UniRepLKNet:
    depths, width = _SIZES[variant]
    sizes = {"depths": depths, "dims": tuple(width * 2**i for i in range(4))}
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        UniRepLKNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **{**sizes, **kwargs},
    )


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """4.4 M parameters deployed, ImageNet 77.0."""
    return _create("unireplknet_a", pretrained, **kwargs)


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """6.2 M parameters deployed, ImageNet 78.6."""
    return _create("unireplknet_f", pretrained, **kwargs)


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """10.7 M parameters deployed, ImageNet 80.2."""
    return _create("unireplknet_p", pretrained, **kwargs)


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """18.3 M parameters deployed, ImageNet 81.6."""
    return _create("unireplknet_n", pretrained, **kwargs)


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """31.0 M parameters deployed, ImageNet 83.2."""
    return _create("unireplknet_t", pretrained, **kwargs)


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """55.6 M parameters deployed, ImageNet 83.9."""
    return _create("unireplknet_s", pretrained, **kwargs)


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """98.0 M parameters deployed, ImageNet 87.4 at 384 pixels after ImageNet-22K."""
    return _create("unireplknet_b", pretrained, **kwargs)


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """218.5 M parameters deployed, ImageNet 87.9 at 384 pixels after ImageNet-22K."""
    return _create("unireplknet_l", pretrained, **kwargs)


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """386.5 M parameters deployed, ImageNet 88.0 at 384 pixels after ImageNet-22K."""
    return _create("unireplknet_xl", pretrained, **kwargs)


# ----------------------------------------------------------------------------------------------- published checkpoints


def _arguments(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    merged = not any(name.endswith(".gamma") for name in ours)
    dense = "norms.0.weight" in ours
    return {**classes_in(ours), **({"deploy": True} if merged else {}), **({"norm_features": True} if dense else {})}


PUBLISHED = Published(
    of="unireplknet",
    marks=r"\.se\.(down|up)\.",
    rename=lambda state: with_head_norm(convert_official(state)),
    arguments=_arguments,
    names=[f"unireplknet_{size}" for size in ("a", "f", "p", "n", "t", "s", "b", "l", "xl")],
)
