"""FFNet for super-resolution: FFNified attention, convolutional FFNs, at low resolution (MetaMixer, arXiv 2406.02021).

One 3x3 convolution, many blocks with 3x3 depthwise operators and no norm, one 3x3 convolution to s² pixels a place, and
the input enlarged by repetition added to it::

    model = MetaMixerSR(scale=2)                       # 2.4 M parameters; depth=36 is the light one
    large = model([small])                             # (B, 3, H, W) in [0, 1] → (B, 3, 2H, 2W)
    codec = Codec(Pixels(), decoder=model)             # saves and loads

:class:`isthmus.objectives.super_resolution.SuperResolution` trains it with the paper's loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from isthmus.bounds import Count, Positive, checked
from isthmus.codec import Codec, build, part
from isthmus.codec.checkpoints import Checkpoint, load_into
from isthmus.codec.published import Published
from isthmus.layers.large_kernel import DepthwiseConv
from isthmus.layers.metamixer import MetaMixer, ffnet_block
from isthmus.layers.reparam import check_mergeable, fuse_norm


@part
@checked
class MetaMixerSR(nn.Module):
    """An image to one ``scale`` times as large.

    Args:
        scale: s, at least 1.
        dim: width of the blocks.
        depth: blocks.
        ratio: hidden width of the channel mixers over ``dim``.
        norm: ``"layer"`` before the first convolution of every mixer, ``"batch"`` after it; the published networks have
            none.
        channels: of the image.

    Shapes: ``[(B, channels, H, W)]`` → ``(B, channels, s·H, s·W)``.

    Raises:
        ValueError: a scale below 1, an unknown norm; in ``forward``, more than one level or other channels.
    """

    def __init__(
        self,
        scale: Count = 2,
        dim: Count = 96,
        depth: Count = 48,
        ratio: Positive = 2,
        norm: str | None = None,
        channels: Count = 3,
    ) -> None:
        super().__init__()
        if norm not in (None, "layer", "batch"):
            raise ValueError(f"norm {norm!r}: it is 'layer', 'batch' or None.")
        self.scale, self.channels = int(scale), channels
        hidden = int(dim * ratio)
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            token = MetaMixer(
                _Query(nn.Conv2d(dim, dim, 1), norm), DepthwiseConv(dim, 3), nn.GELU(), DepthwiseConv(dim, 3)
            )
            channel = MetaMixer(
                _Query(DepthwiseConv(dim, 3), norm), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1)
            )
            self.blocks.append(ffnet_block(dim, token, channel))
        self.to_pixels = nn.Conv2d(dim, channels * self.scale**2, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """``[(B, channels, H, W)]`` → ``(B, channels, s·H, s·W)``."""
        if len(features) != 1 or features[0].ndim != 4 or features[0].shape[1] != self.channels:
            told = [tuple(level.shape) for level in features]
            raise ValueError(f"the levels are {told}; this decoder reads one, (B, {self.channels}, H, W).")
        x = features[0]
        y = F.pixel_shuffle(self.to_pixels(self.blocks(self.stem(x))), self.scale)
        return y + F.interpolate(x, scale_factor=self.scale, mode="nearest")

    def reparameterize(self) -> None:
        """Merge batch norms, where there are any, in place; a second call does nothing.

        Raises:
            ValueError: in training mode.
        """
        check_mergeable(self)
        for module in self.modules():
            if isinstance(module, _Query) and isinstance(module.after, nn.BatchNorm2d):
                fuse_norm(module.conv, module.after)
                module.after = nn.Identity()
        if self.__dict__["_part_arguments"].get("norm") == "batch":
            self.__dict__["_part_arguments"]["norm"] = None  # a Codec that is saved now is rebuilt in the merged form


class _Query(nn.Module):
    """A convolution with layer norm before or batch norm after it."""

    def __init__(self, conv: nn.Conv2d, norm: str | None) -> None:
        super().__init__()
        self.before = LayerNorm2d(conv.in_channels, eps=1e-6) if norm == "layer" else nn.Identity()
        self.conv = conv
        self.after: nn.Module = nn.BatchNorm2d(conv.out_channels) if norm == "batch" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(self.before(x)))


def convert_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published names (ysj9909/FFNet, super-resolution) in ours, without norm and with either.

    Args:
        state: the checkpoint, with or without its level ``"params_ema"`` or ``"params"``.
    """
    for level in ("params_ema", "params"):
        state = state.get(level, state)
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := re.match(r"body\.(\d+)\.(token|channel)_mixer\.(\d+)\.(\w+)$", key):
            block, mixer, place, name = found.groups()
            whole = f"body.{block}.{mixer}_mixer"
            order = ["query.conv", "key", "activation", "value"]
            if state[f"{whole}.0.weight"].ndim == 1:
                order.insert(0, "query.before")
            elif f"{whole}.1.running_mean" in state:
                order.insert(1, "query.after")
            key = f"blocks.{block}.{mixer}_mixer.main.{order[int(place)]}.{name}"
        converted[re.sub(r"^proj\.", "stem.", re.sub(r"^conv_bef_up\.", "to_pixels.", key))] = value
    return converted


def _read(found: Checkpoint) -> Codec:
    """The enlarger, its sizes read off the shapes."""
    official = found.state
    dim, channels = official["proj.weight"].shape[:2]
    blocks = [int(name.split(".")[1]) for name in official if name.startswith("body.")]
    norm = "batch" if "body.0.token_mixer.1.running_mean" in official else None
    if official.get("body.0.token_mixer.0.weight", official["proj.weight"]).ndim == 1:
        norm = "layer"
    state = convert_official(official)
    hidden = state.get("blocks.0.channel_mixer.main.key.weight", official["proj.weight"])
    scale = round((len(official["conv_bef_up.weight"]) / channels) ** 0.5)
    model = MetaMixerSR(scale, dim, max(blocks, default=-1) + 1, len(hidden) / dim, norm, channels)
    load_into(model, found, "MetaMixerSR", convert_official)
    return Codec(build({"target": "isthmus:Pixels", "kwargs": {"channels": channels}}), decoder=model)


PUBLISHED = Published(of="metamixer", marks=r"^conv_bef_up\.weight$", make=_read)
