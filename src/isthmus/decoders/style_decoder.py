"""The style decoder of QLAE (Hsu et al., arXiv 2305.18378): latents set scale and shift of every layer of a picture.

    decoder = StyleDecoder(latents=12)
    logits = decoder([z])                             # z (B, 12) or (B, 1, 12) → (B, 3, 64, 64)

Dense layers turn latents into a style w. A learned constant map runs through transposed convolutions; after each come
leaky ReLU, instance norm *in this order*, then ``x · scale + shift`` with ``(scale, shift) = ReLU(linear(w))``, neither
of which is ever negative.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.bounds import Count, checked
from isthmus.codec import part

#: The published "style_image" decoder and its small version.
IMAGE: dict[str, Any] = {
    "widths": (256, 256, 256, 128, 128, 128, 64, 64, 64, 32, 32, 32),
    "kernels": (3, 3, 4) * 4,
    "strides": (1, 1, 2) * 4,
    "dense": (256, 256),
    "start": 256,
}
SMALL: dict[str, Any] = {
    "widths": (512, 256, 128, 64),
    "kernels": (4,) * 4,
    "strides": (2,) * 4,
    "dense": (512,),
    "start": 512,
}


class StyleBlock(nn.Module):
    """Transposed convolution, leaky ReLU, instance norm, then scale and shift by style: ``x, w`` to the next ``x``."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, style: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(before, after, kernel, stride, 1, bias=False)
        # torch would take the outputs for the fan-in of a transposed convolution.
        nn.init.uniform_(self.conv.weight, -((before * kernel**2) ** -0.5), (before * kernel**2) ** -0.5)
        self.norm = nn.InstanceNorm2d(after, eps=1e-6)
        self.style = nn.Linear(style, 2 * after)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """``(B, C, h, w)`` and ``(B, style)`` to the larger map."""
        scale, shift = F.relu(self.style(w))[..., None, None].chunk(2, 1)
        return self.norm(F.leaky_relu(self.conv(x), 0.2)) * scale + shift


@part
@checked
class StyleDecoder(nn.Module):
    """Latents to the logits of a picture.

    Args:
        latents: numbers that come in, L.
        size: pixels a side.
        channels: of the picture.
        widths, kernels, strides: of the transposed convolutions, one each; all have padding 1 and no bias.
        dense: widths of the dense layers that make the style.
        start: channels of the constant map.

    Shapes: ``(B, L)``, alone or as the last level of a pyramid, there also ``(B, 1, L)`` or ``(B, L, 1, 1)``, to
    ``(B, channels, size, size)``.

    Raises:
        ValueError: lists of different lengths, a size that no whole map grows to, or another number of latents.
    """

    def __init__(
        self,
        latents: Count,
        size: Count = 64,
        channels: Count = 3,
        widths: Sequence[Count] = IMAGE["widths"],
        kernels: Sequence[Count] = IMAGE["kernels"],
        strides: Sequence[Count] = IMAGE["strides"],
        dense: Sequence[Count] = IMAGE["dense"],
        start: Count = IMAGE["start"],
    ) -> None:
        super().__init__()
        if not len(widths) == len(kernels) == len(strides) > 0:
            raise ValueError(
                f"give as many kernels and strides as widths, got {len(widths)}, {len(kernels)}, {len(strides)}."
            )
        self.latents = latents
        side = starting_side(size, kernels, strides)
        layers, now = [], latents
        for width in dense:
            layers.append(nn.Sequential(nn.Linear(now, width), nn.ReLU()))
            now = width
        self.dense = nn.Sequential(*layers)
        self.input_map = nn.Parameter(torch.full((start, side, side), 0.1))
        befores = (start, *widths[:-1])
        self.blocks = nn.ModuleList(
            StyleBlock(*sizes, now) for sizes in zip(befores, widths, kernels, strides, strict=True)
        )
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1, bias=False)

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        """Logits of the picture; their sigmoid is the picture."""
        front, back = self.split(0)
        return back(front(features))

    def split(self, layer: int) -> tuple[StyleFront, StyleBack]:
        """The decoder as two: up to block ``layer``, latents to ``(map, style)``; and from there to the picture.

        Raises:
            ValueError: there is no such block.
        """
        if not 0 <= layer <= len(self.blocks):
            raise ValueError(
                f"a decoder of {len(self.blocks)} blocks is split at 0 to {len(self.blocks)}, not {layer}."
            )
        return StyleFront(self, layer), StyleBack(self, layer)


class StyleFront(nn.Module):
    """Latents to the map after the first blocks, and the style that later blocks need."""

    def __init__(self, decoder: StyleDecoder, layer: int) -> None:
        super().__init__()
        self.decoder, self.layer = decoder, layer

    def forward(self, features: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
        """``(B, L)`` to ``(B, C, h, w)`` and ``(B, style)``."""
        z = as_vector(features, self.decoder.latents)
        w = self.decoder.dense(z)
        x = self.decoder.input_map.expand(len(z), -1, -1, -1)
        for block in self.decoder.blocks[: self.layer]:
            x = block(x, w)
        return x, w


class StyleBack(nn.Module):
    """A map and a style to the logits of the picture."""

    def __init__(self, decoder: StyleDecoder, layer: int) -> None:
        super().__init__()
        self.decoder, self.layer = decoder, layer

    def forward(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """What :class:`StyleFront` gives, to ``(B, channels, size, size)``."""
        x, w = state
        for block in self.decoder.blocks[self.layer :]:
            x = block(x, w)
        return self.decoder.conv(x)


@part
@checked
class DenseDecoder(nn.Module):
    """Latents, dense layers with ReLU, and a linear map to the logits of all pixels: for pictures of a few pixels.

    Args:
        latents: numbers that come in, L.
        size: pixels a side.
        channels: of the picture.
        widths: of the hidden layers.

    Shapes: as of :class:`StyleDecoder`.

    Raises:
        ValueError: another number of latents.
    """

    def __init__(
        self, latents: Count, size: Count = 16, channels: Count = 3, widths: Sequence[Count] = (256, 256)
    ) -> None:
        super().__init__()
        self.latents, self.shape = latents, (channels, size, size)
        layers, now = [], latents
        for width in widths:
            layers += [nn.Linear(now, width), nn.ReLU()]
            now = width
        self.layers = nn.Sequential(*layers, nn.Linear(now, channels * size**2))

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        """Logits of the picture; their sigmoid is the picture."""
        return self.layers(as_vector(features, self.latents)).unflatten(1, self.shape)


def as_vector(features: Tensor | list[Tensor], width: int) -> Tensor:
    """Latents ``(B, width)`` from a tensor or the last level of a pyramid.

    Raises:
        ValueError: there is another number of them.
    """
    level = features if isinstance(features, Tensor) else features[-1]
    z = level.flatten(1)
    if z.shape[1] != width:
        raise ValueError(f"this decoder takes {width} latents a picture, got {tuple(level.shape)}.")
    return z


def starting_side(size: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Side of the map that transposed convolutions with padding 1 grow to ``size``.

    Raises:
        ValueError: there is none.
    """

    def grown(side: int) -> int:
        for kernel, stride in zip(kernels, strides, strict=True):
            side = (side - 1) * stride - 2 + kernel
        return side

    for side in range(1, size + 1):
        if grown(side) == size:
            return side
    raise ValueError(f"no map grows to {size} pixels by these strides; a multiple of their product often does.")


_STYLE = re.compile(r"style_conv_transpose\.blocks\.(\d+)\.(forward_block|conditioning)\.layers\.0\.(weight|bias)")


def from_official(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published decoder's parameters under our names.

    Transposed convolutions are stored there as ``(out, in, h, w)`` and used without flipping.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in params.items():
        tensor = torch.as_tensor(tensor)
        if (block := _STYLE.fullmatch(name)) is None:
            state[name.replace("conv.layers.0.", "conv.").replace("layers.", "")] = tensor
        elif block[2] == "conditioning":
            state[f"blocks.{block[1]}.style.{block[3]}"] = tensor
        else:
            state[f"blocks.{block[1]}.conv.{block[3]}"] = tensor.flip(-1, -2).transpose(0, 1).contiguous()
    return state
