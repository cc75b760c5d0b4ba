"""ConViT: forward pass and training step, beside the published way of positional attention.

    python -m benchmarks.convit_speed                     # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.convit_speed --only layers --batches 8
    python -m benchmarks.convit_speed --only networks --batches 1 --rounds 3

*Layers*: one gated positional attention of ConViT-S on 14x14 and 28x28 tokens, ours against a transcription of the
published equations (relative offsets for every sample, two softmaxes over N x N, one product with the values).

*Networks*: timm's ConViT-Ti and -S, as they are and taken over, with the same weights and the same numbers coming out;
and timm's DeiT of the same sizes, ConvNeXt-T and ResNet-50 for orientation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.transcription import Case, Settings, familiar, run
from isthmus.encoders.images.convit import GPSA, ConViT, relative_offsets


class PlainGPSA(nn.Module):
    """Gated positional self-attention written down from the paper, with all attention maps of all samples formed."""

    def __init__(self, layer: GPSA) -> None:
        super().__init__()
        self.heads = layer.num_heads
        self.qk, self.v, self.proj, self.pos_proj = layer.qk, layer.v, layer.proj, layer.pos_proj
        self.gate = layer.gating_param

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, count, dim = x.shape
        offsets = relative_offsets(grid, x.device).expand(batch, -1, -1, -1)
        q, k = self.qk(x).view(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        v = self.v(x).view(batch, count, self.heads, -1).transpose(1, 2)
        content = (q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5).softmax(-1)
        position = self.pos_proj(offsets).permute(0, 3, 1, 2).softmax(-1)
        gate = self.gate.sigmoid().view(-1, 1, 1)
        attention = (1 - gate) * content + gate * position
        attention = attention / attention.sum(-1, keepdim=True)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, count, dim))


def layers(batch: int, settings: Settings) -> Iterator[Case]:
    """A layer on two grids."""
    for side in (14, 28):
        ours = GPSA(432, 9)
        x = torch.randn(batch, side * side, 432, device=settings.device, requires_grad=True)
        parts = {"plain": PlainGPSA(ours), "ours": ours}
        yield Case(f"attention on {side}x{side} tokens", parts, (x, (side, side)))


def networks(batch: int, settings: Settings) -> Iterator[Case]:
    """Whole networks, with timm's DeiT of the same size."""
    for name, like in (("convit_tiny", "deit_tiny_patch16_224"), ("convit_small", "deit_small_patch16_224")):
        theirs: Any = timm.create_model(name, img_size=settings.size)
        others = {f"{like} (timm)": timm.create_model(like, img_size=settings.size), **familiar()}
        same = {"timm": theirs, "ours": ConViT.from_timm(theirs)}
        yield Case(name, same, settings.images(batch), others)


if __name__ == "__main__":
    run("convit_speed", __doc__, {"layers": layers, "networks": networks})
