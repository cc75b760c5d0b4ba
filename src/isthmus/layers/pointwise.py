"""1x1 convolutions as matrix products, which is what they are.

On one thread PyTorch runs a 1x1 convolution sample by sample, and its gradients too: products with a 14x14 or 7x7 map
behind them are too small to be fast. As one product over all places of all samples the two layers of an MLP of 384 and
768 channels reach 130 and 120 instead of 120 and 85 GFLOP/s (batch of 8, forward and backward, one core with AVX-512),
and no slower than before on larger maps or for a batch of one. The result then lies channels-last in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.layers.large_kernel import is_plain_cpu


class PointwiseConv(nn.Conv2d):
    """A 1x1 ``nn.Conv2d`` of one group and stride 1; parameters and numbers are those of ``nn.Conv2d``.

    Off the CPU, in other types than float32, and where something watches what torch calls, it is one.

    Args:
        channels: of the input.
        out_channels: of the output.
        bias: add one number a channel.

    Shapes: ``(B, channels, H, W)`` → ``(B, out_channels, H, W)``.
    """

    def __init__(self, channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(channels, out_channels, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, channels, H, W)`` → ``(B, out_channels, H, W)``."""
        if input.ndim != 4 or not is_plain_cpu(input, self.weight) or not self._pays(input):
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _pays(self, input: Tensor) -> bool:
        """Gradients gain most; a forward pass alone gains where the map need not be turned round first."""
        learning = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        return learning or input.is_contiguous(memory_format=torch.channels_last)
