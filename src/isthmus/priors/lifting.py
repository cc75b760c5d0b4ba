"""Pixels to integers that are easier to predict, and back exactly: what stands between a picture and a circuit.

The paper puts a circuit behind an integer flow (arXiv 2111.11632, section 5). This is the smallest such flow, without
parameters: colours as differences to green, then every pixel less what its three neighbours to the left and above
suggest, all modulo 256. What is left is 128 where the guess was right.
"""

from __future__ import annotations

import numpy as np


def decorrelate(pixels: np.ndarray) -> np.ndarray:
    """``(H, W, 3)`` uint8 red, green, blue to green, red less green, blue less green; the differences around 128."""
    red, green, blue = (pixels[..., i] for i in range(3))
    return np.stack([green, red - green + np.uint8(128), blue - green + np.uint8(128)], axis=-1)


def recorrelate(planes: np.ndarray) -> np.ndarray:
    """The inverse of :func:`decorrelate`."""
    green, red, blue = (planes[..., i] for i in range(3))
    return np.stack([red + green - np.uint8(128), green, blue + green - np.uint8(128)], axis=-1)


def residuals(planes: np.ndarray) -> np.ndarray:
    """``(H, W, P)`` uint8: every pixel less the median of west, north and west + north - northwest, plus 128.

    The first row is guessed from the west, the first column from the north, the first pixel as 128.
    """
    wide = planes.astype(np.int16)
    guess = np.full_like(wide, 128)
    guess[0, 1:], guess[1:, 0] = wide[0, :-1], wide[:-1, 0]
    guess[1:, 1:] = _median(wide[1:, :-1], wide[:-1, 1:], wide[:-1, :-1])
    return (wide - guess + 128).astype(np.uint8)


def restore(residual: np.ndarray) -> np.ndarray:
    """The inverse of :func:`residuals`, a diagonal after the other: all its pixels have their neighbours."""
    height, width, planes = residual.shape
    if height > width:
        return restore(residual.transpose(1, 0, 2)).transpose(1, 0, 2)  # the guess treats rows and columns alike
    steps = height + width - 1
    rows, columns = np.arange(height)[:, None], np.arange(width)
    # Skewed: [diagonal, row]. One row more at either end holds what stands for neighbours beyond the border.
    left = np.zeros((steps, height, planes), np.int16)
    left[rows + columns, rows] = residual
    done = np.full((steps + 2, height + 2, planes), 128, np.int16)
    for step in range(steps):
        first, last = max(0, step - width + 1), min(height, step + 1)
        here, before, above = done[step + 2], done[step + 1], done[step]
        west, north, northwest = before[first + 1 : last + 1], before[first:last], above[first:last]
        guess = _median(west, north, northwest)
        here[first + 1 : last + 1] = (left[step, first:last] + guess - 128) & 255
        here[first] = here[first + 1]  # north of the first row, and never looked at elsewhere
        if last == step + 1:
            here[last + 1] = here[last]  # west of the first column
    return np.ascontiguousarray(done[rows + columns + 2, rows + 1].astype(np.uint8))


def _median(west: np.ndarray, north: np.ndarray, northwest: np.ndarray) -> np.ndarray:
    low, high = np.minimum(west, north), np.maximum(west, north)
    return np.maximum(low, np.minimum(high, west + north - northwest))
