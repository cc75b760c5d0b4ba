"""Randomness that does not depend on how many devices share a batch.

Every process holds a :class:`ShardedGenerator` with the same seed. :func:`rows` draws for the whole global batch and
keeps the rows of this process, so one process with 64 samples and two with 32 each see the same masks and crops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any mix of integers and strings, the same on every machine and Python version."""
    digest = hashlib.blake2b("\x1f".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ShardedGenerator(torch.Generator):
    """A CPU generator that knows which share of the global batch its process holds.

    Args:
        parts: what the randomness belongs to (run seed, phase, step…), see :func:`derive_seed`.
        rank: this process among ``world`` ones.
        world: number of processes that share a global batch.
    """

    rank: int
    world: int

    def __new__(cls, *parts: int | str, rank: int = 0, world: int = 1) -> ShardedGenerator:
        return super().__new__(cls)

    def __init__(self, *parts: int | str, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, world), got rank {rank} and world {world}")
        self.rank, self.world = rank, world
        self.manual_seed(derive_seed(*parts))


def rows(draw: Callable[[int], Tensor], batch: int, generator: torch.Generator) -> Tensor:
    """Draw ``draw(global batch)`` and return this process's ``batch`` rows of it.

    ``rows(lambda n: torch.rand(n, 49, generator=g), batch, g)``: with an ordinary generator this is ``draw(batch)``.
    """
    if not isinstance(generator, ShardedGenerator) or generator.world == 1:
        return draw(batch)
    return draw(batch * generator.world)[generator.rank * batch : (generator.rank + 1) * batch]
