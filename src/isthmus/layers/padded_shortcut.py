"""A shortcut without parameters where a residual network gets narrower and wider (He et al. 2016, arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn


class PaddedShortcut(nn.Module):
    """Every ``stride``-th place, with zero channels on both sides (option A of the paper).

    Args:
        channels: of the input.
        out_channels: of the output; an odd number of zero channels has one more behind.
        stride: between the places that stay.

    Raises:
        ValueError: fewer channels come out than go in.
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if not 0 < channels <= out_channels or stride < 1:
            raise ValueError(f"cannot pad {channels} to {out_channels} channels at a stride of {stride}.")
        self.channels = channels
        self.zeros_before = (out_channels - channels) // 2
        self.zeros_after = out_channels - channels - self.zeros_before
        self.stride = stride

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.zeros_before + self.channels + self.zeros_after

    def drop(self, outputs: Iterable[int]) -> None:
        """These channels of the output are no more; those that are no padding are no more in the input either."""
        gone = set(outputs)
        before = sum(i < self.zeros_before for i in gone)
        own = sum(self.zeros_before <= i < self.zeros_before + self.channels for i in gone)
        self.zeros_before -= before
        self.channels -= own
        self.zeros_after -= len(gone) - before - own

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` → ``(B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)``."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        zeros = (self.zeros_before, self.zeros_after)
        return F.pad(x, (0, 0, 0, 0, *zeros)) if any(zeros) else x
