"""The convnets of multi-digit number recognition (Goodfellow et al., arXiv 1312.6082, sections 4 and 5).

Every layer convolves, is made non-linear, max-pools over 2×2 places and subtracts the mean of its surroundings; then
come a locally connected layer and dense ones. No skip connections, and no batch norm unless asked for. The paper leaves
open how maps of odd size are halved, the window of the subtraction, the kernel of the local layer and the dropout rate;
the choices here are options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, Natural, Share, checked
from isthmus.codec import FeatureInfo, part

Border = Literal["valid", "zero"]


class SubtractMean(nn.Module):
    """Every value less the mean of the 3×3 values around it, channel by channel.

    Args:
        border: ``valid`` averages what lies inside the map, ``zero`` takes zeros around it.
    """

    def __init__(self, border: Border = "valid") -> None:
        super().__init__()
        if border not in ("valid", "zero"):
            raise ValueError(f"border is valid or zero, got {border!r}.")
        self.border = border

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        return x - F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=self.border == "zero")


class Pool(nn.Module):
    """The maximum over 2×2 places at every place (stride 1, the map keeps its size) or at every second.

    Args:
        stride: 1 or 2; 0 pools nothing.
        ceil: whether a last odd row or column makes a place of its own.
    """

    def __init__(self, stride: int, ceil: bool = True) -> None:
        super().__init__()
        if stride not in (0, 1, 2):
            raise ValueError(f"pools stride by 1 or 2, or not at all (0); got {stride}.")
        self.stride, self.ceil = stride, ceil

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` → ``(B, C, H, W)``, or half as many rows and columns."""
        if self.stride == 1:
            return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2, 1)
        return F.max_pool2d(x, 2, 2, ceil_mode=self.ceil) if self.stride else x

    def out(self, side: int) -> int:
        """The length of a side afterwards."""
        return side if self.stride < 2 else (side + self.ceil) // 2


class ConvUnit(nn.Module):
    """Convolution, maxout or ReLU, pooling, subtraction.

    Args:
        channels: of the input.
        units: of the output.
        kernel: odd side.
        pieces: linear filters of which every unit takes the largest; 1 is a ReLU instead.
        pool_stride, ceil: of :class:`Pool`.
        border: of :class:`SubtractMean`; ``None`` subtracts nothing.
        batch_norm: between convolution and non-linearity.
        dropout: of whole maps' values, behind all.
        subtract_first: subtract before pooling.
    """

    def __init__(
        self,
        channels: int,
        units: int,
        kernel: int = 5,
        pieces: int = 1,
        pool_stride: int = 2,
        ceil: bool = True,
        border: Border | None = "valid",
        batch_norm: bool = False,
        dropout: float = 0.0,
        subtract_first: bool = False,
    ) -> None:
        super().__init__()
        self.pieces = pieces
        self.conv = nn.Conv2d(channels, units * pieces, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(units * pieces) if batch_norm else nn.Identity()
        subtract = nn.Identity() if border is None else SubtractMean(border)
        pool = Pool(pool_stride, ceil)
        self.after = nn.Sequential(*((subtract, pool) if subtract_first else (pool, subtract)), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` → ``(B, units, H', W')``."""
        x = self.norm(self.conv(x))
        return self.after(maxout(x, self.pieces) if self.pieces > 1 else F.relu(x))


def maxout(x: Tensor, pieces: int) -> Tensor:
    """``(B, units·pieces, H, W)`` → ``(B, units, H, W)``; the filters of one unit stand next to each other."""
    return x.unflatten(1, (-1, pieces)).amax(2)


class LocallyConnected(nn.Module):
    """A convolution whose every place has weights of its own.

    Args:
        channels, units: of input and output.
        size: rows and columns of the map.
        kernel: odd side; zeros lie around the map.
    """

    def __init__(self, channels: int, units: int, size: tuple[int, int], kernel: int = 5) -> None:
        super().__init__()
        self.size, self.kernel = size, kernel
        places = size[0] * size[1]
        self.weight = nn.Parameter(torch.empty(places, units, channels * kernel**2))
        self.bias = nn.Parameter(torch.zeros(places, units))
        bound = (3 / (channels * kernel**2)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` → ``(B, units, H, W)``."""
        windows = F.unfold(x, self.kernel, padding=self.kernel // 2)  # (B, channels·kernel², places)
        y = torch.baddbmm(self.bias[:, None], windows.permute(2, 0, 1), self.weight.transpose(1, 2))
        return y.permute(1, 2, 0).unflatten(2, self.size)


@part
@checked
class MaxoutCNN(nn.Module):
    """An encoder of one level: ``(B, 3, H, W)`` → ``[(B, D, 1, 1)]``, or maps where ``dense`` is empty.

    ``MaxoutCNN()`` is the paper's best network for public SVHN; :func:`street_view` that for the internal data.

    Args:
        size: side of the image, or height and width; the network has weights for this size only.
        widths: units of the convolutional layers.
        kernel: side of their kernels.
        pieces: linear filters a unit of the first layer; the others are ReLUs.
        strides: of the pools, a number a layer; 0 does not pool.
        local: units of the locally connected layer; 0 leaves it out.
        dense: widths of the dense layers.
        dropout: on all hidden layers, not on the input.
        ceil: how odd maps are halved.
        border: of the subtraction; ``None`` subtracts nothing.
        batch_norm: of the convolutional layers (later than the paper).
        centre: subtract the mean of every image first.

    Raises:
        ValueError: widths and strides of different length, or an image that is pooled away.
    """

    def __init__(
        self,
        size: Count | Sequence[Count] = 54,
        widths: Sequence[Count] = (48, 64, 128, 160, 192, 192, 192, 192),
        kernel: Count = 5,
        pieces: Count = 3,
        strides: Sequence[Natural] = (2, 1, 2, 1, 2, 1, 2, 1),
        local: Natural = 192,
        dense: Sequence[Count] = (3072, 3072),
        dropout: Share = 0.5,
        ceil: bool = True,
        border: Border | None = "valid",
        batch_norm: bool = False,
        centre: bool = True,
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        if len(widths) != len(strides) or not widths:
            raise ValueError(f"every layer has a width and a stride; got {len(widths)} and {len(strides)}.")
        if min(*widths, *dense, pieces, kernel) < 1:
            raise ValueError(
                f"widths, dense layers, pieces and kernel must be 1 or more, got {tuple(widths)}, {tuple(dense)}, "
                f"{pieces} and {kernel}."
            )
        if kernel % 2 == 0:
            raise ValueError(f"kernels are odd, got {kernel}.")
        self.size, self.centre = (height, width), centre
        self.features = nn.Sequential()
        channels, reduction = 3, 1
        for number, (units, stride) in enumerate(zip(widths, strides, strict=True)):
            unit = ConvUnit(
                channels, units, kernel, pieces if number == 0 else 1, stride, ceil, border, batch_norm, dropout
            )
            self.features.append(unit)
            pool = Pool(stride, ceil)
            height, width, channels = pool.out(height), pool.out(width), units
            reduction *= max(1, stride)
        if min(height, width) < 1:
            raise ValueError(f"an image of {self.size} is smaller than the pools; it is pooled away.")
        if local:
            relu = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
            self.local = nn.Sequential(LocallyConnected(channels, local, (height, width)), relu)
            channels = local
        else:
            self.local = nn.Identity()
        self.dense = nn.ModuleList()
        before = channels * height * width
        for after in dense:
            self.dense.append(nn.Sequential(nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)))
            before = after
        whole = max(self.size)
        self.feature_info = [FeatureInfo(before, whole) if dense else FeatureInfo(channels, reduction)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images ``(B, 3, H, W)`` to one level.

        Raises:
            ValueError: images of another size.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, *self.size):
            raise ValueError(
                f"the input is {tuple(x.shape)}; this network takes (B, 3, {self.size[0]}, {self.size[1]})."
            )
        if self.centre:
            x = x - x.mean((1, 2, 3), keepdim=True)
        x = self.local(self.features(x))
        if not self.dense:
            return [x]
        x = x.flatten(1)
        for layer in self.dense:
            x = layer(x)
        return [x[:, :, None, None]]


def street_view(size: int = 128, widths: Sequence[int] = (48, 64, 128, 160, 192)) -> MaxoutCNN:
    """The network for the internal data: five layers, all ReLU, no dropout; the paper does not tell their widths."""
    return MaxoutCNN(size, widths, pieces=1, strides=(2, 1, 2, 1, 2), local=128, dense=(4096, 4096), dropout=0.0)
