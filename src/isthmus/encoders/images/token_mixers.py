"""Token mixers of one size for the frame of MetaMixer, to compare what fills it (arXiv 2406.02021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from isthmus.bounds import Count, checked
from isthmus.codec import UserError, part
from isthmus.encoders.images.metamixer import MixerNet
from isthmus.layers.metamixer import ConvNorm, ffnified_attention, reparam_depthwise, self_attention


@part("MetaMixerMixers")
@checked
def mixer_network(
    mixer: str, depths: Sequence[Count], dims: Sequence[Count], heads: Count, **arguments: Any
) -> MixerNet:
    """A :class:`MixerNet` whose mixer is named as in :func:`token_mixer`; ``arguments`` are those of the network."""
    return MixerNet(token_mixer(mixer, heads, len(dims)), depths, dims, **arguments)


def token_mixer(name: str, heads: int, stages: int) -> Callable[[int, int], nn.Module]:
    """``mixer(dim, stage)`` for :class:`MixerNet`; merged, all have the same parameters.

    FFNified attention has C² + 101·C of them. The others get the inner width that comes nearest: of queries, keys and
    values in self-attention, and between two 1x1 convolutions elsewhere, so that mixers without kernels of their own
    mix channels instead.

    Raises:
        UserError: an unknown name.
    """

    def budget(dim: int) -> int:
        return dim**2 + 101 * dim

    def attention(dim: int, stage: int) -> nn.Module:  # 4·C·E + 3·E + C
        width = (budget(dim) - dim) / (4 * dim + 3)
        return self_attention(dim, heads, max(1, round(width / heads)) * heads)

    def between(places: Callable[[int], nn.Module], kernel: int) -> Callable[[int, int], nn.Module]:
        def make(dim: int, stage: int) -> nn.Module:  # 2·C·E + E + C, and k² + 1 for every channel of E
            width = round((budget(dim) - dim) / (2 * dim + 1 + (kernel**2 + 1 if kernel else 0)))
            return nn.Sequential(ConvNorm(dim, width), places(width), nn.Conv2d(width, dim, 1))

        return make

    def ffnified(dim: int, stage: int) -> nn.Module:
        return ffnified_attention(dim, 7)

    known: dict[str, Callable[[int, int], nn.Module]] = {
        "ffnified": ffnified,
        "attention": attention,
        "hybrid": lambda dim, stage: (attention if stage == stages - 1 else ffnified)(dim, stage),
        "pooling": between(lambda width: nn.AvgPool2d(3, 1, 1, count_include_pad=False), 0),
        "depthwise": between(lambda width: reparam_depthwise(width, 7), 7),
        "identity": between(lambda width: nn.Identity(), 0),
    }
    if name not in known:
        raise UserError(f"no mixer {name!r}; choose from {', '.join(known)}.")
    return known[name]
