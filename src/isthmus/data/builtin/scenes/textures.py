"""Textures: the lightness of every point between −½ and ½, the same bits on every machine and at any resolution.

Every function takes coordinates ``u``, ``v`` in periods, the integer ``seed`` of what is random, and ``sharp``:
periods per pixel, inverted (how many pixels a period has), which sets the width of smooth edges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.data.exact import sqrt

_ACROSS, _DOWN = 0x27D4EB2D, 0x165667B1  # odd, so that neighbours differ in all bits


def hashed(a: Tensor, b: Tensor, seed: Tensor) -> Tensor:
    """31 random bits of two integers and a seed: int32 arithmetic that wraps (the finaliser of lowbias32)."""
    x = a * _ACROSS + b * _DOWN + seed
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return (x ^ ((x >> 15) & 0x1FFFF)) & 0x7FFFFFFF


def _edge(distance: Tensor, sharp: Tensor) -> Tensor:
    """Distance beyond an edge, in periods → tone, smooth over one pixel."""
    return (distance * sharp).clamp(-0.5, 0.5)


def _square_wave(u: Tensor, sharp: Tensor) -> Tensor:
    return _edge((u - torch.floor(u) - 0.5).abs() - 0.25, sharp)


def gradient(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    """From dark to light across the picture or object: coordinates run from −½ to ½ there."""
    return u.clamp(-0.5, 0.5)


def stripes(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    return _square_wave(u, sharp)


def checker(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    return _square_wave(u, sharp) * _square_wave(v, sharp) * 2


def waves(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    """Parabolic arcs, within 6 % of a sinusoid."""
    z = (u - torch.floor(u)) * 2 - 1
    return z * (1 - z.abs()) * 2


def dots(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    u, v = u - torch.floor(u) - 0.5, v - torch.floor(v) - 0.5
    return _edge(0.3 - sqrt(u * u + v * v), sharp)


def speckle(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    """One spot of random place and size in every cell, three cells a period."""
    u, v = u * 3, v * 3
    i, j = torch.floor(u), torch.floor(v)
    bits = hashed(i.int(), j.int(), seed)
    radius = (bits & 255) * (0.3 / 256) + 0.06
    room = 0.5 - radius
    du = u - i - 0.5 - room * ((bits >> 8 & 255) * (2 / 256) - 1)
    dv = v - j - 0.5 - room * ((bits >> 16 & 255) * (2 / 256) - 1)
    return _edge(radius - sqrt(du * du + dv * dv), sharp * (1 / 3))


def noise(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    """Two octaves of value noise, fading smoothly from lattice point to lattice point."""
    coarse, fine = _lattice(u, v, seed), _lattice(u * 2 + 0.37, v * 2 + 0.71, seed + 7919)
    return coarse.mul_(0.55).add_(fine.mul_(0.3)).clamp_(-0.5, 0.5)


def _lattice(u: Tensor, v: Tensor, seed: Tensor) -> Tensor:
    """Values from −1 to 1, random at whole coordinates and smooth between them."""
    i, j = torch.floor(u), torch.floor(v)
    fu, fv = u - i, v - j
    fu, fv = fu * fu * (3 - fu * 2), fv * fv * (3 - fv * 2)
    base = (i.int() * _ACROSS).add_(j.int() * _DOWN).add_(hashed(seed, seed * 0, seed))
    low, high = (
        _random(base + down).mul_(1 - fu).add_(_random(base + (down + _ACROSS)).mul_(fu)) for down in (0, _DOWN)
    )
    return low.mul_(1 - fv).add_(high.mul_(fv))


def _random(x: Tensor) -> Tensor:
    """Integers → numbers from −1 to 1: one round of mixing, the upper half of the bits."""
    return (x ^ (x >> 15)).mul_(0x735A2D97).bitwise_right_shift_(16).float().mul_(1 / 2**15)


def bar(u: Tensor, v: Tensor, seed: Tensor, sharp: Tensor) -> Tensor:
    """One stripe, half a period wide, off the centre by up to two periods."""
    offset = (hashed(seed * 0, seed * 0, seed) & 1023) * (4 / 1024) - 2
    return _edge(0.25 - (u - offset).abs(), sharp)


#: Name → tone ``(u, v, seed, sharp) -> t``; a plain surface has none.
TONE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    f.__name__: f for f in (gradient, stripes, checker, dots, speckle, noise, waves, bar)
}
