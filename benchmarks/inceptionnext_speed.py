"""InceptionNeXt's mixer and network: forward pass and training step, beside chunk-and-concat and depthwise 7x7.

    python -m benchmarks.inceptionnext_speed                       # everything, 224 px, batch 1 and 32, one thread
    python -m benchmarks.inceptionnext_speed --only mixers --batches 8
    python -m benchmarks.inceptionnext_speed --only networks --batches 1 --rounds 3

*Mixers*: ours, the published way (chunk, convolve, concatenate, with ``torch.nn.Conv2d``), and a depthwise 7x7, on the
maps that a 224 px image has in the four stages of InceptionNeXt-T.

*Networks*: timm's InceptionNeXt-T as it is, with our mixers, and with our mixers and merged norms (forward only), with
the same weights and the same numbers coming out; and timm's ConvNeXt-T and ResNet-50 for orientation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

from benchmarks.transcription import Case, Settings, familiar, run, warmed
from isthmus.encoders.images.inceptionnext import InceptionDWConv2d, accelerate
from isthmus.encoders.images.metanext import reparameterize
from isthmus.layers.large_kernel import DepthwiseConv

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))


class ChunkAndConcat(nn.Module):
    """The mixer written down from the paper: channels in four groups, three plain convolutions, one concatenation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        g = dim // 8
        self.dwconv_hw = nn.Conv2d(g, g, 3, padding=1, groups=g)
        self.dwconv_w = nn.Conv2d(g, g, (1, 11), padding=(0, 5), groups=g)
        self.dwconv_h = nn.Conv2d(g, g, (11, 1), padding=(5, 0), groups=g)
        self.sizes = [dim - 3 * g, g, g, g]

    def forward(self, x: Tensor) -> Tensor:
        same, square, wide, high = x.split(self.sizes, 1)
        return torch.cat([same, self.dwconv_hw(square), self.dwconv_w(wide), self.dwconv_h(high)], 1)


def mixers(batch: int, settings: Settings) -> Iterator[Case]:
    """Every stage's map."""
    for dim, side in STAGES:
        ours, plain = InceptionDWConv2d(dim), ChunkAndConcat(dim)
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(batch, dim, side, side, device=settings.device, requires_grad=True)
        seven = {
            "depthwise 7x7, ours": DepthwiseConv(dim, 7),
            "depthwise 7x7, Conv2d": nn.Conv2d(dim, dim, 7, padding=3, groups=dim),
        }
        yield Case(f"{dim} channels of {side}x{side}", {"chunk and concat": plain, "ours": ours}, x, seven)


def networks(batch: int, settings: Settings) -> Iterator[Case]:
    """Whole networks."""
    theirs = warmed(timm.create_model("inception_next_tiny"))
    ours = accelerate(copy.deepcopy(theirs))
    merged = copy.deepcopy(ours).eval()
    reparameterize(merged)
    same = {"chunk and concat (timm)": theirs, "ours": ours, "ours, merged": merged}
    yield Case("inception_next_tiny", same, settings.images(batch), familiar(), forward_only=("ours, merged",))


if __name__ == "__main__":
    run("inceptionnext_speed", __doc__, {"mixers": mixers, "networks": networks})
