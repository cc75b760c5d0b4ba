"""FFNet backbones: residual networks of basic blocks, deeper and narrower (Mehta et al., arXiv 2206.08236, section 3).

Two 3×3 convolutions a block see twice as far as the one of a bottleneck, which is all that a segmentation baseline
lacked. Three bodies: ``resnet`` (7×7 stem and max pool), ``slim`` (two 3×3 convolutions as stem, narrower stages) and
``narrow`` (three convolutions, of which the last is the first level, then three stages). ``_d`` names halve the map in
the first stage too. ``timm.create_model("ffnet86s")`` after ``import isthmus.encoders``; the heads are in
``decoders/ffnet_head.py``. (The MetaMixer paper's networks of the same name are ``metamixer_ffnet_*``.)
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from isthmus.bounds import Share, checked
from isthmus.codec.published import Published
from isthmus.encoders.images.pyramid import Pyramid, Stage, imagenet_cfg
from isthmus.layers.pool import Pooling

Body = Literal["resnet", "slim", "narrow"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the stride is on the first."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` → ``(B, width, ⌈H/stride⌉, ⌈W/stride⌉)``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.drop_path(y) + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride, 1×1 to four times the width."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, drop_path: float = 0.0) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` → ``(B, 4 width, ⌈H/stride⌉, ⌈W/stride⌉)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(self.drop_path(y) + self.downsample(x))


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class Smoothing(nn.Module):
    """A 5×5 Gaussian (σ 0.7) at every second place, after one mirrored row above and below; columns are not padded.

    So 1024×2048 becomes 511×1022, as released.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        place = torch.arange(5, dtype=torch.float64) - 2
        line = torch.exp(-place.square() / (2 * 0.7**2))
        kernel = torch.outer(line, line)
        self.register_buffer("weight", (kernel / kernel.sum()).float().expand(channels, 1, 5, 5).clone())

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → ``(B, C, ⌊(H − 3) / 2⌋ + 1, ⌊(W − 5) / 2⌋ + 1)``.

        Raises:
            ValueError: a side below five pixels.
        """
        if min(x.shape[2:]) < 5:
            raise ValueError(f"smoothing needs at least 5×5 pixels, got {x.shape[2]}×{x.shape[3]}.")
        weight: Any = self.weight
        return F.conv2d(F.pad(x, (0, 0, 1, 1), mode="reflect"), weight.to(x.dtype), stride=2, groups=x.shape[1])


@checked
class FFNet(Pyramid):
    """Body and a pooled classifier; four levels of reduction 4, 8, 16 and 32 (8 to 64 where the first stage strides).

    Args:
        body: ``resnet``, ``slim`` or ``narrow``.
        layers: blocks a stage: four, or three of the narrow body.
        widths: channels of the four levels, before the expansion of bottlenecks; for the narrow body the first is
            that of the stem.
        stem: channels of the stem's convolutions (one, two or two; the narrow body's third has ``widths[0]``).
        stride_first: halve the map in the first stage too.
        bottleneck: blocks of one 3×3 convolution, which the paper argues against.
        pre_down: smooth and halve the image first.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        global_pool: timm's name of the pooling.

    Raises:
        ValueError: layers, widths or stem that do not fit the body.
    """

    def __init__(
        self,
        body: Body = "resnet",
        layers: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: Sequence[int] = (64,),
        stride_first: bool = False,
        bottleneck: bool = False,
        pre_down: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: Share = 0.0,
        drop_path_rate: Share = 0.0,
        global_pool: Pooling = "avg",
    ) -> None:
        convolutions = {"resnet": 1, "slim": 2, "narrow": 2}
        if body not in convolutions:
            raise ValueError(f"body is resnet, slim or narrow, got {body!r}.")
        stages = 3 if body == "narrow" else 4
        if len(layers) != stages or len(widths) != 4 or len(stem) != convolutions[body] or min(layers) < 1:
            raise ValueError(
                f"a {body} body has {stages} stages of at least one block, 4 widths and {convolutions[body]} stem "
                f"channels; got layers {tuple(layers)}, widths {tuple(widths)} and stem {tuple(stem)}."
            )
        if min(*widths, *stem) < 1:
            raise ValueError(f"widths and stem must be 1 or more, got {tuple(widths)} and {tuple(stem)}.")
        if body == "narrow" and stride_first:
            raise ValueError("the narrow body has no first stage that could stride.")
        block = Bottleneck if bottleneck else BasicBlock
        first: OrderedDict[str, nn.Module] = OrderedDict()
        if pre_down:
            first["smoothing"] = Smoothing(in_chans)
        if body == "resnet":
            first["conv1"] = nn.Conv2d(in_chans, stem[0], 7, 2, 3, bias=False)
            first |= {"bn1": nn.BatchNorm2d(stem[0]), "act1": nn.ReLU(), "pool": nn.MaxPool2d(3, 2, 1)}
        else:
            before = in_chans
            for i, out in enumerate(stem):
                first[f"conv{i}"] = nn.Conv2d(before, out, 3, 2, 1, bias=False)
                first |= {f"bn{i}": nn.BatchNorm2d(out), f"act{i}": nn.ReLU()}
                before = out
        made: list[nn.Module] = []
        channels, strides = stem[-1], [2 if stride_first else 1, 2, 2, 2]
        if body == "narrow":
            last: OrderedDict[str, nn.Module] = OrderedDict(
                conv2=nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), bn2=nn.BatchNorm2d(widths[0]), act2=nn.ReLU()
            )
            made.append(nn.Sequential(last))
            channels = widths[0]
        rates = iter(cast("list[float]", calculate_drop_path_rates(drop_path_rate, sum(layers))))
        for depth, width, stride in zip(layers, widths[-stages:], strides[-stages:], strict=True):
            blocks: list[nn.Module] = []
            for index in range(depth):
                blocks.append(block(channels, width, stride if index == 0 else 1, next(rates)))
                channels = width * block.expansion
            made.append(Stage(nn.Identity(), blocks))
        dims = [w * block.expansion for w in widths]
        if body == "narrow":
            dims[0] = widths[0]
        scale = (2 if stride_first else 1) * (2 if pre_down else 1)
        super().__init__(
            made,
            dims,
            ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate),
            stem=nn.Sequential(first),
            reductions=[4 * 2**i * scale for i in range(4)],
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )
        self.apply(initialise)


def initialise(module: nn.Module) -> None:
    """The published start: convolutions N(0, 0.01) with biases of 1e-4, linear weights uniform by fan-out."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.constant_(module.bias, 1e-4)
    elif isinstance(module, nn.Linear):
        bound = module.out_features**-0.5
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------- published checkpoints


def convert_official(state: Mapping[str, Tensor], narrow: bool | None = None) -> dict[str, Tensor]:
    """The backbone's share of a published state dict (``backbone_model.…``, ``smoothing.weight``) under our names.

    Args:
        state: of a whole network, or of a backbone alone.
        narrow: whether the body is the narrow one; seen from the third stem convolution without it.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    prefix = "backbone_model." if any(name.startswith("backbone_model.") for name in state) else ""
    body = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    narrow = "conv2.weight" in body if narrow is None else narrow
    ours: dict[str, Tensor] = {}
    for name, tensor in body.items():
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name):
            ours[f"stages.{int(match[1]) - (0 if narrow else 1)}.blocks.{match[2]}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"(conv|bn)(\d)\.(\w+)", name):
            ours[f"{'stages.0' if narrow and match[2] == '2' else 'stem'}.{name}"] = tensor
    if "smoothing.weight" in state:
        ours["stem.smoothing.weight"] = state["smoothing.weight"]
    return ours


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """timm's hook: a published backbone becomes ours, with the classifier that the model has."""
    if not any("layer1." in name for name in state):
        return state
    own = model.state_dict()
    return {**{name: own[name] for name in own if name.startswith("head.")}, **convert_official(state)}


# --------------------------------------------------------------------------------------------------- registered sizes

_RESNET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 56: (4, 8, 12, 3), 86: (8, 12, 16, 6)}
_RESNET |= {101: (3, 4, 23, 3), 134: (8, 18, 28, 12), 150: (16, 18, 28, 12)}
_SLIM = {22: (2, 3, 3, 2), 30: (3, 4, 4, 3), 40: (4, 5, 6, 4), 54: (5, 8, 8, 5), 78: (6, 12, 12, 8)}
_SLIM |= {86: (8, 12, 16, 6), 150: (16, 18, 28, 12)}
_NARROW = {46: (6, 8, 8), 74: (8, 12, 16), 122: (16, 24, 20)}
_BOTTLENECKS = (50, 101)


def arguments_of(depth: int, kind: str = "", stride_first: bool = False) -> dict[str, Any]:
    """What :class:`FFNet` is made with for a published depth and kind ("", ``S``, ``N`` or ``NS``).

    Raises:
        ValueError: no such network was published.
    """
    table = {"": _RESNET, "S": _SLIM, "N": _NARROW, "NS": _NARROW}.get(kind)
    if table is None or depth not in table:
        known = ", ".join(map(str, table)) if table else "kinds '', S, N and NS"
        raise ValueError(f"there is no FFNet of depth {depth}{kind}; there are {known}.")
    if kind == "":
        return {
            "layers": table[depth],
            "stride_first": stride_first,
            "bottleneck": depth in _BOTTLENECKS,
        }
    if kind == "S":
        widths = {"widths": (64, 128, 192, 320), "stem": (32, 64)}
        return {"body": "slim", "layers": table[depth], "stride_first": stride_first, **widths}
    widths = (64, 96, 160, 320) if kind == "N" else (64, 64, 128, 256)
    return {"body": "narrow", "layers": table[depth], "widths": widths, "stem": (64, 64)}


def _sizes() -> dict[str, dict[str, Any]]:
    found = {}
    for kind, table in (("", _RESNET), ("S", _SLIM), ("N", _NARROW), ("NS", _NARROW)):
        for depth in table:
            found[f"ffnet{depth}{kind.lower()}"] = arguments_of(depth, kind)
            if "N" not in kind:
                found[f"ffnet{depth}{kind.lower()}_d"] = arguments_of(depth, kind, stride_first=True)
    return found


SIZES = _sizes()


def _first(name: str) -> str:
    return "stem.conv1" if SIZES[name].get("body", "resnet") == "resnet" else "stem.conv0"


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": imagenet_cfg(
            _first(name), "head.fc", **({"pool_size": (4, 4)} if name.endswith("_d") else {})
        )
        for name in SIZES
    }
)


def body_of(bottleneck: bool, divisor: int = 1) -> FFNet:
    """Basic blocks in the layout of ResNet-34, or bottleneck blocks in that of ResNet-50, without a classifier."""
    widths = tuple(w // divisor for w in (64, 128, 256, 512))
    body = FFNet("resnet", (3, 4, 6, 3), widths, (widths[0],), bottleneck=bottleneck, num_classes=0)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _registered(name: str) -> Callable[..., FFNet]:
    def create(pretrained: bool = False, **kwargs: Any) -> FFNet:
        return build_model_with_cfg(
            FFNet,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3)},
            **{**SIZES[name], **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"The backbone of {name.replace('ffnet', 'FFNet-')}."
    return register_model(create)


for _name in SIZES:
    globals()[_name] = _registered(_name)


#: The body's share of a segmenter or classifier, which :mod:`isthmus.decoders.ffnet_head` reads whole.
PUBLISHED = Published(of="simple-segmentation", marks=r"^backbone_model\.", rename=convert_official)
