"""MetaNeXt: a four-stage pyramid whose spatial mixer is a slot (arXiv 2303.16900, section 3.1).

A block is y = x + DropPath(γ · MLP(Norm(Mixer(x)))): one residual, one norm, and the norm behind the mixer. With a
depthwise 7x7 in the slot it is nearly ConvNeXt; InceptionNeXt puts four branches there, and the recipes of this family
compare mixers in otherwise equal networks.

The classes and the parameter names are timm's, so that its checkpoints load and its functions work; what is added:
any mixer, norm, stem stride and head, checks of the input, and :func:`reparameterize`, which merges every norm and
layer scale of a network of this family, timm's own included, into the convolutions around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import inception_next
from torch import Tensor, nn

from isthmus.bounds import checked
from isthmus.encoders.images.pyramid import check_images, check_settings
from isthmus.layers.pool import Pooling
from isthmus.layers.reparam import check_mergeable, warn_if_untrained

#: ``mixer(dim, stage)``: a module that maps ``(B, dim, H, W)`` to itself, for the stage counted from 0.
Mixer = Callable[[int, int], nn.Module]
#: ``norm(dim)``: a norm of maps ``(B, dim, H, W)``.
Norm = Callable[[int], nn.Module]


@checked
class MetaNeXt(inception_next.MetaNeXt):
    """The pyramid with a swappable mixer; a timm model in every respect.

    Args:
        depths: blocks of every stage.
        dims: width of every stage.
        mixer: called with the width and the number of the stage, once a block.
        norm: called with a width: in the stem, between stages and once a block.
        mlp_ratios: hidden width of the MLP over that of the block, for every stage or for all.
        in_chans: channels of the input.
        num_classes: 0 leaves the classifier out.
        global_pool: pooling of the head, timm's names.
        stem_stride: the stem is a convolution with this kernel and stride: 4 is published, 1 or 2 suit small
            pictures, 16 makes an isotropic network of a single stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        layer_scale: initial γ; 0 or ``None`` leaves γ out.
        mlp_head: classify with the published two-layer MLP; ``False`` with one linear layer.

    Shapes: ``(B, in_chans, H, W)`` → ``(B, num_classes)``; level i is
    ``(B, dims[i], ⌊H / r⌋, ⌊W / r⌋)`` with r = stem_stride · 2^i, because nothing is padded.

    Raises:
        ValueError: depths, widths and ratios of different lengths, or out of range; a mixer that changes the shape
            shows at the first forward pass; an input with other channels, or too small for the last stage.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mixer: Mixer,
        norm: Norm = nn.BatchNorm2d,
        mlp_ratios: float | Sequence[float] = (4, 4, 4, 3),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pooling = "avg",
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = 1e-6,
        mlp_head: bool = True,
    ) -> None:
        ratios = list(mlp_ratios) if isinstance(mlp_ratios, Sequence) else [mlp_ratios] * len(depths)
        if not len(depths) == len(dims) == len(ratios):
            raise ValueError(
                f"depths {tuple(depths)}, dims {tuple(dims)} and mlp_ratios {tuple(ratios)}: one of each a stage."
            )
        if stem_stride < 1:
            raise ValueError(f"stem_stride {stem_stride}: it must be at least 1.")
        check_settings(
            {"depths": tuple(depths), "dims": tuple(dims), "mlp_ratios": tuple(ratios), "in_chans": in_chans},
            {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate},
        )
        if not math.isfinite(layer_scale or 0.0):
            raise ValueError(f"layer_scale {layer_scale}: it must be a number, or None to leave it out.")

        def of_stage(stage: int) -> Callable[..., nn.Module]:
            return lambda dim, **_: mixer(dim, stage)

        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            depths=tuple(depths),
            dims=tuple(dims),
            token_mixers=[of_stage(i) for i in range(len(depths))],  # type: ignore[arg-type]
            norm_layer=lambda dim, **_: norm(dim),  # type: ignore[arg-type]
            mlp_ratios=tuple(ratios),  # type: ignore[arg-type]
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            ls_init_value=layer_scale or 0.0,
        )
        if stem_stride != 4:
            self.stem[0] = nn.Conv2d(in_chans, dims[0], stem_stride, stem_stride)
            self._init_weights(self.stem[0])
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        if not mlp_head:
            self.head: Any = LinearHead(dims[-1], num_classes, global_pool, drop_rate)
            self.head_hidden_size = dims[-1]
            self._init_weights(self.head.fc2)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` → the map of the last stage."""
        return super().forward_features(self._checked(x))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's: the maps of the stages asked for, finest first.

        Raises:
            ValueError: ``output_fmt`` is not ``"NCHW"``.
        """
        if (form := kwargs.get("output_fmt", "NCHW")) != "NCHW":
            raise ValueError(f"output_fmt {form!r}: the maps of a convnet are 'NCHW'.")
        return super().forward_intermediates(self._checked(x), *args, **kwargs)

    def reparameterize(self) -> None:
        """:func:`reparameterize` of this network, in place."""
        reparameterize(self)

    def _checked(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans)
        stages: Any = self.stages
        least = self.feature_info[len(stages) - 1]["reduction"]
        if min(x.shape[-2:]) < least:
            raise ValueError(
                f"the input is {x.shape[-2]}x{x.shape[-1]} pixels; the last stage of this network needs {least} a side."
            )
        return x


class LinearHead(nn.Module):
    """Pool, dropout, one linear layer, with the attributes that timm's models expect of a head."""

    def __init__(self, in_features: int, num_classes: int, pool_type: str = "avg", drop: float = 0.0) -> None:
        super().__init__()
        self.in_features = self.num_features = in_features
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
        self.drop = nn.Dropout(drop)
        self.fc2: nn.Module = nn.Linear(in_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``(B, C, H, W)`` → ``(B, num_classes)``."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc2(x)

    def reset(self, num_classes: int, pool_type: str | None = None, **_: Any) -> None:
        """timm's: a new linear layer on the device and in the dtype of the old one."""
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
        like = next(self.fc2.parameters(), torch.empty(0))
        layer = nn.Linear(self.in_features, num_classes) if num_classes > 0 else nn.Identity()
        self.fc2 = layer.to(like.device, like.dtype)


# ------------------------------------------------------------------------------------------------------------ merging


@torch.no_grad()
def reparameterize(model: nn.Module) -> None:
    """Merge batch norms and layer scales into neighbouring convolutions, in place and exactly, in eval mode.

    The norm of a block stands before the MLP's first 1x1 convolution and that of a transition before an unpadded 2x2
    one; both are linear maps of the same pixels, so W' = W·diag(s) and b' = b + W·t with s, t the norm's scale and
    shift. γ goes into the MLP's second convolution, and the stem's norm into the convolution before it. Norms other
    than batch norm stay. A second call does nothing.

    Args:
        model: a network of timm's MetaNeXt family (InceptionNeXt) or of ours, or a part of one.

    Raises:
        ValueError: in training mode; or nothing in the model is of this family.
    """
    check_mergeable(model)
    stems: list[Any] = [m.stem for m in model.modules() if isinstance(m, inception_next.MetaNeXt)]
    stages: list[Any] = [m for m in model.modules() if isinstance(m, inception_next.MetaNeXtStage)]
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, inception_next.MetaNeXtBlock)]
    if not (stems or stages or blocks):
        raise ValueError(f"{type(model).__name__} has no MetaNeXt block; only networks of that family are merged.")
    for stem in stems:
        if isinstance(stem[1], nn.BatchNorm2d):
            scale, shift = _affine(stem[1])
            _replace(stem[0], stem[0].weight * scale.view(-1, 1, 1, 1), stem[0].bias * scale + shift)
            stem[1] = nn.Identity()
    for stage in stages:
        down: Any = stage.downsample
        if isinstance(down, nn.Sequential) and isinstance(down[0], nn.BatchNorm2d):
            _norm_into_next(down[0], down[1])  # type: ignore[arg-type]
            down[0] = nn.Identity()
    for block in blocks:
        if isinstance(block.norm, nn.BatchNorm2d):
            _norm_into_next(block.norm, block.mlp.fc1)
            block.norm = nn.Identity()
        if block.gamma is not None:
            fc2 = block.mlp.fc2
            _replace(fc2, fc2.weight * block.gamma.view(-1, 1, 1, 1), fc2.bias * block.gamma)
            block.gamma = None


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode."""
    warn_if_untrained(norm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def _norm_into_next(norm: nn.BatchNorm2d, conv: Any) -> None:
    """A batch norm into the unpadded convolution after it."""
    scale, shift = _affine(norm)
    bias = conv.bias + (conv.weight.sum((2, 3)) @ shift)
    _replace(conv, conv.weight * scale.view(1, -1, 1, 1), bias)


def _replace(conv: Any, weight: Tensor, bias: Tensor) -> None:
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
