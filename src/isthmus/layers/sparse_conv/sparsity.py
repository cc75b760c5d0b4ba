"""How sparse an encoder's features are: what leaks, what tiles cost in precision, and which places are filled."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .features import sparse_features


class Sparsity(NamedTuple):
    """What :func:`sparsity` finds.

    Attributes:
        leak: largest change of a feature when all hidden pixels change.
        tile_error: largest difference between tiles and masked maps, over the largest value of a level.
        filled_excess: share of places that hold something, over the share that is visible; of the fullest level.
        filled_dense: share of places that the dense encoder fills at its last level, with hidden pixels at zero.
    """

    leak: float
    tile_error: float
    filled_excess: float
    filled_dense: float


@torch.no_grad()
def sparsity(encoder: nn.Module, image: Tensor, visible: Tensor, patch: int) -> Sparsity:
    """Measure a copy of an encoder, in evaluation mode.

    Args:
        encoder: images to a pyramid.
        image: normalised, ``(B, C, H, W)``.
        visible: boolean ``(B, h, w)``.
        patch: pixels a side of a cell of it.
    """
    features: Any = sparse_features
    encoder = copy.deepcopy(encoder).eval()
    pixels = visible.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    masked = features(encoder, image, visible, "masked")
    changed = features(encoder, torch.where(pixels, image, 1 - image.flip(0)), visible, "masked")
    tiled = features(encoder, image, visible, "tiled")
    share = float(visible.float().mean())
    filled = [float((level != 0).any(1).float().mean()) for level in masked]
    dense = [float((level != 0).any(1).float().mean()) for level in encoder(image * pixels)]
    return Sparsity(
        leak=max(float((a - b).abs().max()) for a, b in zip(masked, changed, strict=True)),
        tile_error=max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(masked, tiled, strict=True)),
        filled_excess=max(filled) - share,
        filled_dense=dense[-1],
    )
