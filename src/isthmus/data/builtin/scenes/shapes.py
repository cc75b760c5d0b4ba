"""Signed distances to the shapes, written so that every machine gets the same bits.

Every function takes coordinates ``p`` (right) and ``q`` (down) in which the circle around the shape has radius 1, and
returns the distance to its edge, negative inside. Only additions, products, square roots, minima and maxima occur:
IEEE 754 rounds those alike everywhere, which cannot be said of sines and exponentials.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.data.exact import sqrt

_HALF = 0.70710678  # √½
_SIN60 = 0.8660254


def _length(p: Tensor, q: Tensor) -> Tensor:
    return sqrt(p * p + q * q)


def circle(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    return _length(p, q) - 0.88


def square(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    return torch.maximum(p.abs(), q.abs()) - _HALF


def triangle(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    return torch.maximum(q - 0.5, p.abs() * _SIN60 - q * 0.5 - 0.5)


def star(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    """Five points: fold the plane into one wedge of 36°, then the distance to the one edge left there."""
    p = p.abs()
    p, q = _mirror(p, q, 0.30901699, 0.95105652)  # across the line at 72° from the top
    p, q = _mirror(p, q, 0.80901699, 0.58778525)  # across the line at 36°
    # From the tip (0, −1) to the valley at 36° and radius 0.46.
    return p.abs() * 0.91845 + q * -0.39553 - 0.39553


def _mirror(p: Tensor, q: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Mirror the half plane ``a·p + b·q > 0`` onto the other one."""
    beyond = (p * a + q * b).clamp(min=0)
    return p - beyond * (2 * a), q - beyond * (2 * b)


def ring(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    return (_length(p, q) - 0.69).abs() - 0.2


def cross(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    p, q = p.abs(), q.abs()
    return torch.maximum(torch.maximum(p, q) - 0.95, torch.minimum(p, q) - 0.31)


def moon(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    return torch.maximum(_length(p, q) - 0.95, 0.8 - _length(p - 0.52, q))


def ellipse(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    """First-order distance: the level-set function over its gradient; exact on the edge, which is all that is drawn."""
    a, b = p, q / aspect
    level = a * a + b * b
    c = b / aspect
    return (level - 1) / (sqrt(a * a + c * c) * 2 + 1e-3)


def rectangle(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    width = 1 / sqrt(aspect * aspect + 1)
    return torch.maximum(p.abs() - width, q.abs() - width * aspect)


def heart(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    """A square on its corner and two discs on its upper sides."""
    p, q = p.abs(), q - 0.2
    square_ = (p + q.abs()) * _HALF - 0.555
    return torch.minimum(square_, _length(p - 0.555 * _HALF, q + 0.555 * _HALF) - 0.555)


def hexagon(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    p, q = p.abs(), q.abs()
    return torch.maximum(p * _SIN60 + q * 0.5, q) - _SIN60 * 0.96


def arrow(p: Tensor, q: Tensor, aspect: Tensor) -> Tensor:
    """Pointing right."""
    q = q.abs()
    head = torch.maximum(-0.05 - p, p * 0.61714 + q * 0.78686 - 0.59863)
    shaft = torch.maximum(q - 0.28, (p + 0.45).abs() - 0.5)
    return torch.minimum(head, shaft)


#: Name → signed distance ``(p, q, aspect) -> d``; ``aspect`` is height over width.
DISTANCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (circle, square, triangle, star, ring, cross, moon, ellipse, rectangle, heart, hexagon, arrow)
}


def _turns() -> Tensor:
    """From the power series in whole numbers, so that no mathematics library has a say."""
    one = 2**96
    pi = 314159265358979323846264338327950288 * one // 10**35
    quarter = []
    for degree in range(91):
        x = pi * degree // 180
        term, total = x, x
        for k in range(1, 12):
            term = -term * x // one * x // (one * (2 * k) * (2 * k + 1))
            total += term
        quarter.append((total * 2**14 + one // 2) // one)
    half = quarter + quarter[89:0:-1]
    sine = half + [-s for s in half]
    return torch.tensor([[sine[(degree + 90) % 360] for degree in range(360)], sine])


#: Cosine and sine of 0 to 359 degrees in units of 2⁻¹⁴, int64 ``(2, 360)``.
TURN = _turns()
