"""The segmentation head of FFNet: three levels side by side, FFNified attention at stride 8 (arXiv 2406.02021).

The coarser maps are enlarged bicubically to the finest, squeezed to a small width, mixed by FFNet's blocks with 9x9
strip units and a GELU behind every residual, widened again and classified place by place::

    encoder = Backbone("metamixer_ffnet_seg", reductions=(8, 16, 32))
    head = MetaMixerHead([level.channels for level in encoder.feature_info], num_classes=150)
    scores = head(encoder(images))                     # (B, 150, H / 8, W / 8)

It reads any pyramid. Training at paper scale: AdamW at 6e-5, 160k steps of 16 images, ten times the rate for the head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Positive, Share, checked
from isthmus.codec import Codec, build, part
from isthmus.codec.checkpoints import Checkpoint, load_into
from isthmus.codec.published import Published, with_encoder
from isthmus.layers.metamixer import (
    ConvNorm,
    convert_blocks,
    convolutional_ffn,
    ffnet_block,
    ffnified_attention,
    reparameterize,
    strip_depthwise,
)


@part
@checked
class MetaMixerHead(nn.Module):
    """A pyramid to scores of classes on its finest level.

    Args:
        in_channels: of every level, finest first.
        num_classes: K.
        width: of the blocks.
        depth: blocks.
        token_kernel: of the key and value operators.
        channel_kernel: of the channel mixer.
        ratio: hidden width of the channel mixer over ``width``.
        final_ratio: width before the classifier over ``width``; 0 leaves that layer out.
        drop_rate: dropout of whole channels before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
        deploy: build the merged form, for a merged checkpoint.

    Shapes: levels ``(B, C_i, H_i, W_i)`` → ``(B, K, H_0, W_0)``.

    Raises:
        ValueError: no level, an even kernel; in ``forward``, levels of another number or width.
    """

    def __init__(
        self,
        in_channels: Sequence[Count],
        num_classes: Count,
        width: Count = 256,
        depth: Count = 3,
        token_kernel: Count = 9,
        channel_kernel: Count = 9,
        ratio: Positive = 4,
        final_ratio: Natural = 4,
        drop_rate: Share = 0.1,
        drop_path_rate: Share = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        if not in_channels or num_classes < 1:
            raise ValueError(f"levels of {list(in_channels)} channels and {num_classes} classes: at least one of each.")
        self.in_channels, self.deploy = tuple(in_channels), deploy
        total = sum(in_channels)
        self.squeeze = nn.Sequential(
            ConvNorm(total, total, deploy=deploy), nn.GELU(), ConvNorm(total, width, deploy=deploy)
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential()
        for rate in rates:
            token = ffnified_attention(width, token_kernel, operator=strip_depthwise, deploy=deploy)
            channel = convolutional_ffn(width, channel_kernel, ratio, operator=strip_depthwise, deploy=deploy)
            self.blocks.append(ffnet_block(width, token, channel, rate, activation=nn.GELU))
        wide = width * final_ratio if final_ratio else width
        self.align: nn.Module = (
            nn.Sequential(ConvNorm(width, wide, deploy=deploy), nn.GELU()) if final_ratio else nn.Identity()
        )
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(wide, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Levels ``(B, C_i, H_i, W_i)``, finest first → ``(B, K, H_0, W_0)``."""
        if tuple(level.shape[1] for level in features) != self.in_channels:
            told = [level.shape[1] for level in features]
            raise ValueError(f"the levels have {told} channels; this head reads {list(self.in_channels)}.")
        size = features[0].shape[-2:]
        # To the size of the finest and not by a factor, so that images fit whose sides are no multiples of 32.
        levels = [features[0], *(F.interpolate(level, size, mode="bicubic") for level in features[1:])]
        x = self.blocks(self.squeeze(torch.cat(levels, 1)))
        return self.classifier(self.drop(self.align(x)))

    def reparameterize(self) -> None:
        """Merge norms and branches in place.

        Raises:
            ValueError: in training mode, or merged already.
        """
        if self.deploy:
            raise ValueError("this head is merged already; it cannot be merged twice.")
        reparameterize(self)
        self.deploy = True
        self.__dict__["_part_arguments"]["deploy"] = True  # a Codec that is saved now is rebuilt in the merged form


def convert_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published names (ysj9909/FFNet, ``decode_head.``) in ours; the names of a backbone are left out.

    Args:
        state: the checkpoint of the system, with or without its level ``"state_dict"``, or of the head alone.
    """
    state = state.get("state_dict", state)
    head = {k.removeprefix("decode_head."): v for k, v in state.items() if k.startswith("decode_head.")} or state
    names = ((r"^head_blocks\.", "blocks."), (r"^conv_seg\.", "classifier."))
    renamed: dict[str, Tensor] = {}
    for key, value in head.items():
        for pattern, ours in names:
            key = re.sub(pattern, ours, key)
        renamed[key] = value
    return convert_blocks(renamed)


def _read(found: Checkpoint) -> Codec:
    """The segmentation system: backbone and head."""
    encoder = {"target": "isthmus:Backbone", "kwargs": {"model": _BACKBONE, "reductions": [8, 16, 32]}}
    channels = [level.channels for level in build(encoder).feature_info]
    head = convert_official(found.state)
    decoder = MetaMixerHead(channels, max(1, len(head.get("classifier.weight", ()))))
    load_into(decoder, found, "MetaMixerHead", convert_official)
    return with_encoder(found, encoder, decoder)


_BACKBONE = {"target": "timm:metamixer_ffnet_seg", "kwargs": {"num_classes": 0}}

PUBLISHED = Published(of="metamixer", marks=r"^decode_head\.head_blocks\.", make=_read)
